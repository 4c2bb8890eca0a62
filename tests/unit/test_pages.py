"""HTML of bars and tables: well-formed, escaped, bounded."""

from __future__ import annotations

from html.parser import HTMLParser

from nbcache.jupyter.panels import render_status_html
from nbcache.manifest import Extent, place_tensors
from nbcache.pages import FILTER_FROM, MOST_ROWS, TensorRow, bar, page, table, tensor_table
from nbcache.protocol import messages as m


class Reader(HTMLParser):
    """Fails for a tag that is not closed in its place; keeps what is to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        if tag not in ("input", "br"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def rows(count: int) -> list[TensorRow]:
    return [TensorRow(f"t.{number}", "float32", (2, number), 8 * number) for number in range(count)]


def test_a_tensor_is_a_row():
    assert read(page(tensor_table(rows(2)))).cells == ["t.0", "float32", "2\u00d70", "0 B", "t.1", "float32", "2\u00d71", "8 B"]
    assert "scalar" in read(tensor_table([TensorRow("s", "int8", (), 1)])).text


def test_a_long_table_has_a_filter_and_an_end():
    assert "<input" not in tensor_table(rows(FILTER_FROM - 1))
    assert "<input" in tensor_table(rows(FILTER_FROM))
    long = read(tensor_table(rows(MOST_ROWS + 7)))
    assert len(long.cells) == 4 * MOST_ROWS
    assert "and 7 more" in long.text


def test_names_are_text():
    html = tensor_table([TensorRow("<b onclick=x>", "<i>", (), 1)])
    assert read(html).cells[:2] == ["<b onclick=x>", "<i>"]


def test_a_bar_stays_within_its_frame():
    assert [bar(part, whole).partition("width:")[2][:5] for part, whole in ((0, 4), (1, 4), (9, 4), (1, 0))] == [
        "0.0%\"", "25.0%", "100.0", "0.0%\"",
    ]  # fmt: skip


def test_parts_open_below_their_rows():
    html = table(("a",), [("1",), ("2",)], opened=["<p>one</p>", ""])
    assert read(html).cells == ["1", "one", "2"]


def status(**changes):
    fields = {
        "name": "/home/me/models/flux-dev/transformer", "aliases": (), "provenance": "file", "source": (), "bytes": 100,
        "tensors": 1, "host": "staged", "host_kind": "pinned", "devices": (m.DeviceResidence("GPU-1", "BF16", "resident", 1),),
        "leases": 1, "pinned": True, "last_used_s": 3.0, "key": "k", "used_by": (m.Lease(7, "/home/me/a.ipynb"),),
    }  # fmt: skip
    entry = m.EntryStatus(**(fields | changes))
    return m.Status("1", 1, 9, 5.0, m.HostStatus(1, 4), (m.DeviceStatus("GPU-1", "H100", 3, 4),), (entry,))


MANIFEST = place_tensors([Extent("w", "U8", (100,), 0, 0, 100, 0)], (), {})


def test_a_status():
    reader = read(render_status_html(status(), lambda key: MANIFEST, {"k": 40}))
    for words in (
        "flux-dev/transformer",
        "pinned",
        "host, gpu 0 as BF16",
        "me/a.ipynb (pid 7)",
        "40 B",
        "1 tensor",
        "1 B of 4 B",
    ):
        assert words in reader.text
    assert "w" in reader.cells  # its tensor
    staging = render_status_html(status(host="staging", staged_bytes=25, leases=0, used_by=()), lambda key: MANIFEST, {})
    assert "width:25.0%" in staging and "host (staging)" in read(staging).text and "nobody yet" in read(staging).text
