"""The boxes of a picture as SVG, of one file and without scripts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple
from xml.sax import saxutils

from crucible.kitchen.outline import Node, Words

__all__ = ["GREY", "INK", "svg"]

FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
INK, GREY, LINE = "#1f2933", "#707c89", "#8a96a3"
LOOKS = {  # the attributes of each look's rectangle
    "host": 'rx="5" fill="#fff1d6" stroke="#c98a2b"',
    "device": 'rx="5" fill="#d8e8fb" stroke="#3b76b5"',
    "program": 'rx="9" fill="#eceafd" stroke="#5b4fcf" stroke-width="2" stroke-dasharray="7 4"',
    "scope": 'rx="9" fill="#1f2933" fill-opacity=".025" stroke="#aab4bf"',
    "branch": 'rx="7" fill="#ffffff" fill-opacity=".6" stroke="#cfd6dd"',
    "given": 'rx="13" fill="#ffffff" stroke="#aab4bf"',
}
KEYS = {"host": "host stage", "device": "device stage", "program": "XLA program"}
PAD, ROW, SPINE = 12, 14, 24  # around boxes, between lines of text, from a box's left to its arrow


class _Picture(NamedTuple):
    """A piece of the image, at least so wide; `paint` makes it for a width.

    Of a column, `top` is where its first box begins.
    """

    width: float
    height: float
    paint: Callable[[float], str]
    top: float = 0


def svg(nodes: tuple[Node, ...]) -> str:
    """The picture of an outline."""
    column, all_nodes = _column(nodes), list(_every(nodes))
    looks, takes = {n.look for n in all_nodes}, [near for n in all_nodes for _, near in n.takes]
    keys = [(look, text, INK) for look, text in KEYS.items() if look in looks]
    if not all(takes):
        keys += [("", "slot of the box before", INK), ("", "slot from further up", GREY)]
    inner = max(column.width, 200)
    x, y, legend = 0.0, column.height + 16, ""
    for look, text, ink in keys:
        indent = 20 if look else 0
        if x and x + indent + _width(text, 11) > inner:
            x, y = 0.0, y + 19
        swatch = f'<rect y="1" width="14" height="11" {LOOKS[look]}/>' if look else ""
        swatch = re.sub(r'rx="\d+"(.*) stroke-w.*"', r'rx="4"\1 stroke-dasharray="3 2"', swatch)
        legend += _at(x, y, swatch + _text(indent, 10, _span(text, ink), "legend", 11))
        x += indent + _width(text, 11) + 14
    width, height = inner + 2 * PAD, y + 14 + 2 * PAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="{FONT}"><g class="box">'
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="8" fill="#ffffff" '
        f'stroke="#d5dbe1"/>{_at(PAD, PAD, column.paint(inner))}{_at(PAD, PAD, legend)}</g></svg>\n'
    )


def _every(nodes: Iterable[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        for column in node.columns:
            yield from _every(column)


def _column(nodes: Sequence[Node]) -> _Picture:
    """Boxes of the same width below each other, and the arrows into them."""
    boxes, arrows = [_box(node) for node in nodes], []
    for i, node in enumerate(nodes):
        arrows.append(_arrow(node.takes) if i or node.takes else _Picture(0, 9, lambda width: ""))
    rows = [picture for pair in zip(arrows, boxes, strict=True) for picture in pair]

    def paint(width: float) -> str:
        y, pieces = 0.0, []
        for row in rows:
            pieces.append(_at(0, y, row.paint(width)))
            y += row.height
        return "".join(pieces)

    top = arrows[0].height if arrows else 0
    return _Picture(max(r.width for r in rows), sum(r.height for r in rows), paint, top)


def _arrow(takes: Words) -> _Picture:
    """An arrow down, and the slots that go along it."""
    lines = _lines(takes, 40)
    height = max(20, ROW * len(lines) + 10)
    art = _line(f"M{SPINE} 0V{height - 1}") + _head(SPINE, height, "-4 -7h8")
    for i, line in enumerate(lines):
        spans = "".join(_span(name, INK if near else GREY) for name, near in line)
        y = height / 2 + 3 - ROW * (len(lines) - 1) / 2 + ROW * i
        art += _text(SPINE + 11, y, spans, "slots", 11)
    width = SPINE + 11 + max([_width(_joined(line), 11) for line in lines], default=0)
    return _Picture(width, height, lambda _: f'<g class="arrow">{art}</g>')


def _box(node: Node) -> _Picture:
    """A box with its heading, and the boxes in it."""
    word, after = node.word, f" {node.title}" if node.word and node.title else node.title
    bold = f'<tspan font-weight="bold">{_escaped(word or after)}</tspan>'
    heading = bold + (_span(after, INK) if word else "")
    aside = _lines([(name, True) for name in node.aside], 40)
    left = PAD + _width(word + after, 12) + (16 if aside else 0)
    head = 28 + ROW * max(0, len(aside) - 1)
    least = left + max([_width(_joined(line), 11) for line in aside], default=0) + PAD
    text = _text(PAD, 18, heading, "title", 12)
    for i, line in enumerate(aside):
        text += _text(left, 18 + ROW * i, _span(_joined(line), GREY), "aside", 11)
    body = _body(node) if any(node.columns) else None
    height = head + (body.height + PAD if body else 0)
    hint = f"<title>{_escaped(node.hint)}</title>" if node.hint else ""

    def paint(width: float) -> str:
        rect = f'<rect width="{width:g}" height="{height:g}" {LOOKS[node.look]}/>'
        inside = ""
        if body:
            rule = f'<path d="M0 {head}H{width:g}" stroke="{LINE}" stroke-opacity=".4"/>'
            inside = rule + _at(PAD, head, body.paint(width - 2 * PAD))
        return f'<g class="box {node.look}">{hint}{rect}{text}{inside}</g>'

    return _Picture(max(least, body.width + 2 * PAD if body else 0), height, paint)


def _body(node: Node) -> _Picture:
    """The columns of a box, and what goes between them and back to its beginning."""
    columns = [_column(column) for column in node.columns]
    links = [_lines([(n, True) for n in names], 20) for names in (node.over, node.back)]
    named = [_width(_joined(line), 11) for lines in links for line in lines]
    gap = max(named) + 20 if named else 2 * PAD
    lane = 24 + max([_width(name, 11) for name in node.carried]) if node.carried else 0
    gaps = gap * (len(columns) - 1)
    least = sum(column.width for column in columns) + gaps + lane
    needed = [PAD + ROW * (len(named) + 2) if named else 0, PAD + ROW * len(node.carried)]
    height = max([column.height for column in columns] + needed)

    def paint(width: float) -> str:
        extra, x, pieces = (width - least) / len(columns), 0.0, []
        for i, column in enumerate(columns):
            if i == 1 and named:
                pieces.append(_at(x - gap, PAD, _links(links[0], links[1], gap)))
            pieces.append(_at(x, 0, column.paint(column.width + extra)))
            x += column.width + extra + gap
        if node.carried:
            first = columns[0]
            pieces.append(_at(x - gap, 0, _loop(node.carried, first.top + 8, first.height - 8)))
        return "".join(pieces)

    return _Picture(least, height, paint)


def _loop(names: Sequence[str], top: float, bottom: float) -> str:
    """The way back from the last box of a turn to the first of the next."""
    art = _line(f"M0 {bottom:g}H9q5 0 5 -5V{top + 5:g}q0 -5 -5 -5H1") + _head(0, top, "7 -4v8")
    for i, name in enumerate(names):
        y = (top + bottom) / 2 + 4 + ROW * (i - (len(names) - 1) / 2)
        art += _text(20, max(y, ROW * (i + 1)), _span(name, INK), "slots", 11)
    return f'<g class="loop">{art}</g>'


def _links(over: Sequence[Words], back: Sequence[Words], gap: float) -> str:
    """An arrow from the left column to the right, and one back."""
    art, y = "", ROW * len(over) + 5.0
    for i, line in enumerate(over):
        art += _text(gap / 2, ROW * (i + 1), _span(_joined(line), INK), "slots", 11, "middle")
    for i, line in enumerate(back):
        y_line = y + 23 + ROW * i
        art += _text(gap / 2, y_line, _span(_joined(line), INK), "slots", 11, "middle")
    art += _line(f"M0 {y:g}H{gap - 1:g}") + _head(gap, y, "-7 -4v8")
    if back:
        art += _line(f"M1 {y + 9:g}H{gap:g}") + _head(0, y + 9, "7 -4v8")
    return f'<g class="arrow">{art}</g>'


def _lines(words: Words, limit: int) -> Sequence[Words]:
    """Words with commas between them, in lines of so many letters or one word."""
    lines: list[list[tuple[str, bool]]] = []
    for i, (word, near) in enumerate(words):
        comma = "," if i < len(words) - 1 else ""
        if lines and len(_joined(lines[-1])) + len(word) + len(comma) < limit:
            lines[-1].append((f" {word}{comma}", near))
        else:
            lines.append([(f"{word}{comma}", near)])
    return lines


def _joined(line: Words) -> str:
    return "".join(word for word, _ in line)


def _width(text: str, size: int) -> float:
    """What a text takes at most in a monospaced font; East Asian letters take two places."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text) * size * 0.61


def _at(x: float, y: float, art: str) -> str:
    return f'<g transform="translate({x:g} {y:g})">{art}</g>' if art else ""


def _span(text: str, ink: str) -> str:
    return f'<tspan fill="{ink}">{_escaped(text)}</tspan>'


def _text(x: float, y: float, spans: str, role: str, size: int, anchor: str = "start") -> str:
    return (
        f'<text class="{role}" x="{x:g}" y="{y:g}" font-size="{size}" fill="{INK}" '
        f'text-anchor="{anchor}">{spans}</text>'
    )


def _escaped(text: str) -> str:
    """Text for XML, which cannot hold control characters at all."""
    return saxutils.escape("".join(c if c.isprintable() or c == "\n" else "�" for c in text))


def _line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.3"/>'


def _head(x: float, y: float, path: str) -> str:
    return f'<path d="M{x:g} {y:g}l{path}z" fill="{LINE}"/>'
