"""Decoder language models: shapes and costs, the model, its oracle, caches, generation, the adapter.

    from assay.systems.decoder import Generator, load
    model = load("tiny")                                     # a Decoder: call it, train it
    Generator(model).generate([[1, 2, 3]], max_new_tokens=8)

Read shapes.py, then model.py; docs/library.md shows how to use it. Importing this package, `shapes` or `cost`
does not import torch: the names below are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.lazy import exports

if TYPE_CHECKING:
    from assay.systems.decoder.build import load
    from assay.systems.decoder.generator import Generator
    from assay.systems.decoder.loading import save
    from assay.systems.decoder.model import Decoder
    from assay.systems.decoder.parts import Parts
    from assay.systems.decoder.shapes import SHAPES, DecoderConfig, RopeScaling

__all__ = ["SHAPES", "Decoder", "DecoderConfig", "Generator", "Parts", "RopeScaling", "load", "save"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "SHAPES": "shapes",
        "Decoder": "model",
        "DecoderConfig": "shapes",
        "Generator": "generator",
        "Parts": "parts",
        "RopeScaling": "shapes",
        "load": "build",
        "save": "loading",
    },
)
