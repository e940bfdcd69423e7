"""Golden files: what a report said when somebody last looked at it.

Set ASSAY_WRITE_GOLDEN=1 to write them anew, and read the difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def assert_golden(name: str, text: str) -> None:
    """Compare with tests/golden/<name>."""
    path = FOLDER / name
    if os.environ.get("ASSAY_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; see tests/report/golden.py"
