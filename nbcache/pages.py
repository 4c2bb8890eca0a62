"""HTML for notebooks: bars and tables of tensors that read well on light and dark themes, without anything to load.

Colours come from the theme (JupyterLab's and VS Code's variables, else the text's own). The filter of a long table is one line
of script in its input; where scripts are off, the whole table is there. Knows sizes and names; no daemon, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import msgspec

from nbcache.units import format_size

MOST_ROWS = 3000
"""Rows of one table: a page of 20 000 tensors makes a notebook slow, and a file of megabytes."""
FILTER_FROM = 12

STYLE = """
.nbcache{font-size:var(--jp-ui-font-size1,13px);line-height:1.5;max-width:72em;color:inherit;overflow-x:auto}
.nbcache.nbcache table{border-collapse:collapse;margin:0 0 .6em;border:none;font-size:inherit;table-layout:auto}
.nbcache.nbcache table th,.nbcache.nbcache table td{text-align:left;padding:.15em .9em .15em 0;
border:none;background:none;color:inherit;vertical-align:top}
.nbcache.nbcache table th{font-weight:600;opacity:.65}
.nbcache.nbcache tbody tr{border-top:1px solid rgba(128,128,128,.25);background:none!important}
.nbcache.nbcache tbody tr.more{border-top:none}
.nbcache.nbcache table .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.nbcache.nbcache table th.n{white-space:normal}
.nbcache code{background:none!important;padding:0!important;color:inherit!important}
.nbcache td b{display:inline-block;min-width:13em;overflow-wrap:anywhere}
.nbcache .dim{opacity:.65}
.nbcache .bar{display:inline-block;vertical-align:middle;width:16em;max-width:100%;
height:.7em;border-radius:.35em;overflow:hidden;background:rgba(128,128,128,.25)}
.nbcache .bar i{display:block;height:100%;background:var(--jp-brand-color1,var(--vscode-charts-blue,#2f7ed8))}
.nbcache .small .bar{width:6em}
.nbcache summary{cursor:pointer}
.nbcache .tag{border:1px solid rgba(128,128,128,.5);border-radius:.6em;padding:0 .5em;font-size:.85em}
.nbcache .tensors{max-height:24em;overflow:auto;margin:.3em 0 .6em 1em}
.nbcache input{font:inherit;color:inherit;background:transparent;border:1px solid rgba(128,128,128,.5);border-radius:.3em;
padding:.1em .5em;margin:.2em 0 .3em 1em;width:20em}
""".strip().replace("\n", "")
"""Doubled classes go before what JupyterLab says of every table in an output."""

_FILTER = (
    "const q=this.value.toLowerCase();for(const r of this.nextElementSibling.querySelectorAll('tbody tr'))"
    "r.style.display=r.textContent.toLowerCase().includes(q)?'':'none'"
)


class TensorRow(msgspec.Struct, frozen=True):
    """A tensor in a table."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def page(*parts: str) -> str:
    """Parts as one element, with its style."""
    return f'<div class="nbcache"><style>{STYLE}</style>{"".join(parts)}</div>'


def bar(part: float, whole: float, title: str = "") -> str:
    """How much of a whole."""
    percent = min(100.0, 100 * part / whole) if whole > 0 else 0.0
    return f'<span class="bar" role="img" title="{escape(title)}"><i style="width:{percent:.1f}%"></i></span>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), opened: Sequence[str] | None = None
) -> str:
    """A table of cells that are HTML already; ``numbers`` are the columns that align right.

    ``opened`` gives a part below each row, across all columns; an empty one is left out.
    """
    kind = [' class="n"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f"<th{attribute}>{escape(cell)}</th>" for cell, attribute in zip(head, kind, strict=True))
    below = [f'<tr class="more"><td colspan="{len(head)}">{part}</td></tr>' if part else "" for part in opened or ()]
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td{attribute}>{cell}</td>" for cell, attribute in zip(row, kind, strict=True))
        body += f"<tr>{cells}</tr>{below[number] if below else ''}"
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def tensor_table(tensors: Sequence[TensorRow]) -> str:
    """Name, dtype, shape and size of each, with a filter if they are many."""
    shown = tensors[:MOST_ROWS]
    rows = [
        (
            f"<code>{escape(tensor.name)}</code>",
            escape(tensor.dtype),
            "&times;".join(map(str, tensor.shape)) or "scalar",
            format_size(tensor.nbytes),
        )
        for tensor in shown
    ]
    field = ""
    if len(tensors) >= FILTER_FROM:
        field = f'<input type="search" placeholder="filter {len(shown)} tensors" oninput="{escape(_FILTER)}">'
    more = f'<p class="dim">and {len(tensors) - len(shown)} more</p>' if len(tensors) > len(shown) else ""
    return f'{field}<div class="tensors">{table(("tensor", "dtype", "shape", "size"), rows, (3,))}{more}</div>'


def details(summary: str, body: str) -> str:
    """A row that opens."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def tag(text: str) -> str:
    """A word in a frame."""
    return f'<span class="tag">{escape(text)}</span>'
