"""Imports what NAMES in the environment lists, so that processes forked from this one have it already.

What fails to import here fails again, and is told, where it is wanted.
"""

import contextlib
import importlib
import os

__all__ = ["NAMES"]

NAMES = "ASSAY_IMPORT_AHEAD"  # separated by commas

for _name in filter(None, os.environ.get(NAMES, "").split(",")):
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
