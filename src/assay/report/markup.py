"""HTML that is safe by construction: text is escaped unless this module made it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Safe", "element", "join", "table"]

_NOTHING: Mapping[str, str] = {}


class Safe(str):
    """Markup that was escaped already."""

    __slots__ = ()


def _safe(child: object) -> str:
    return child if isinstance(child, Safe) else html.escape(str(child))


def element(tag: str, *children: object, attributes: Mapping[str, str] = _NOTHING) -> Safe:
    """`<tag attributes>children</tag>`, attributes and plain children escaped."""
    written = "".join(f' {name}="{html.escape(value)}"' for name, value in attributes.items())
    return Safe(f"<{tag}{written}>{''.join(map(_safe, children))}</{tag}>")


def join(children: Iterable[object]) -> Safe:
    """The children one after another, plain ones escaped."""
    return Safe("".join(map(_safe, children)))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Safe:
    """A table that scrolls sideways on its own; `right` names the columns of numbers. Empty without rows.

    The first cell of a row heads the row.
    """
    css = [' class="number"' if header in right else "" for header in headers]
    opening = [f'<th scope="row"{css[0]}>', *(f"<td{one}>" for one in css[1:])]
    closing = ["</th>", *["</td>"] * (len(css) - 1)]
    lines = [
        "".join([o + _safe(c) + e for o, c, e in zip(opening, row, closing, strict=True)]) for row in rows
    ]
    if not lines:
        return Safe("")
    heads = [f'<th scope="col"{one}>{_safe(header)}</th>' for header, one in zip(headers, css, strict=True)]
    body = f"<tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody>"
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return Safe(f'<div class="scroll" tabindex="0"><table>{head}{body}</table></div>')
