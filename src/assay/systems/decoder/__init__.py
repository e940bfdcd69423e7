"""Decoder language models: shapes and costs, the model, its oracle, caches, generation, the adapter.

Read shapes.py, then model.py. Importing this package, `shapes` or `cost` does not import torch.
"""
