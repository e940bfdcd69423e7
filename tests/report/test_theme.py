import json

from assay.report.theme import theme


def test_themes_differ_in_their_colours_only() -> None:
    page, paper = (json.dumps(theme(name)["style"]) for name in ("page", "paper"))
    assert "var(--other)" in page
    assert "var(" not in paper
