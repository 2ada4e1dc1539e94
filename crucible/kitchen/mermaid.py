"""The boxes of a picture as a Mermaid flowchart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from crucible.kitchen.outline import Node

__all__ = ["mermaid"]


class _Ends(NamedTuple):
    """Where a part of the flowchart is entered, with which slots, and where it is left."""

    first: list[tuple[str, tuple[str, ...]]]
    last: list[str]


CLASSES = """\
  classDef host fill:#fff1d6,stroke:#c98a2b,color:#1f2933
  classDef device fill:#d8e8fb,stroke:#3b76b5,color:#1f2933
  classDef program fill:#eceafd,stroke:#5b4fcf,color:#1f2933,stroke-width:2px,stroke-dasharray:7 4
  classDef scope fill:#f7f8f9,stroke:#aab4bf,color:#1f2933
  classDef given fill:#ffffff,stroke:#aab4bf,color:#1f2933
"""


def mermaid(nodes: tuple[Node, ...]) -> str:
    """The picture of an outline."""
    lines, edges, scopes = ["flowchart TB"], [], []

    def new(prefix: str) -> str:
        numbers[prefix] = numbers.get(prefix, 0) + 1
        return f"{prefix}{numbers[prefix]}"

    def connect(last: Iterable[str], first: _Ends, dotted: tuple[str, ...] = ()) -> None:
        for start in last:
            for end, slots in first.first:
                arrow, names = ("-.->", dotted) if dotted else ("-->", dict.fromkeys(slots))
                label = f"|{_quoted(', '.join(names))}|" if names else ""
                edges.append(f"  {start} {arrow}{label} {end}")

    def row(nodes: Sequence[Node], indent: str) -> _Ends:
        ends = [box(node, indent) for node in nodes]
        for before, after in itertools.pairwise(ends):
            connect(before.last, after)
        return _Ends(ends[0].first, ends[-1].last)

    def box(node: Node, indent: str) -> _Ends:
        takes = tuple(name for name, _ in node.takes)
        if not any(node.columns):
            name = new("n")
            aside = f" {', '.join(node.aside)}" if node.look == "given" else ""
            text = f"{node.word}{node.title}{aside}"
            lines.append(f"{indent}{name}[{_quoted(text)}]:::{node.look}")
            return _Ends([(name, takes)], [name])
        name = new("s")
        scopes.append(f"  class {name} {'program' if node.look == 'program' else 'scope'}")
        lines.append(f"{indent}subgraph {name}[{_quoted(f'{node.word} {node.title}'.strip())}]")
        columns = [row(column, indent + "  ") for column in node.columns]
        lines.append(f"{indent}end")
        if node.carried:
            connect(columns[-1].last, columns[0], node.carried)
        if node.over:
            connect(columns[0].last, columns[1], node.over)
        if node.back:
            connect(columns[1].last, columns[0], node.back)
        first = [(n, (*takes, *slots)) for column in columns for n, slots in column.first]
        left = columns[1:] if node.over else columns
        return _Ends(first, [name for column in left for name in column.last])

    numbers: dict[str, int] = {}
    row(nodes, "  ")
    return "\n".join([*lines, *edges, *scopes]) + "\n" + CLASSES


def _quoted(text: str) -> str:
    """A label of Mermaid, in which letters of its own language are written as entities."""
    return '"' + "".join(f"#{ord(c)};" if c in '"#&<>`' else c for c in text) + '"'
