"""What no fork survives."""

import torch

torch.cuda.init()
