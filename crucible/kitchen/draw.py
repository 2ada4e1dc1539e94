"""A workflow as a picture, and as data.

The picture is of the workflow as it is; of a compiled one it shows the programs. On the arrow into
a stage stands what it takes: dark if the box directly before gives it, grey if it comes from
further up. The arrow into a program has what its stages take from outside, and the arrow into
another combinator what its argument asks for. What can never run (`every(0, ...)`, the other branch
of a decided `when`) is left out.
"""

from __future__ import annotations

from pathlib import Path

from crucible.kitchen.mermaid import mermaid
from crucible.kitchen.outline import outline
from crucible.kitchen.stage import Stage
from crucible.kitchen.svg import svg
from crucible.kitchen.words import did_you_mean

__all__ = ["draw", "save"]


def draw(workflow: Stage, format: str = "svg") -> str:
    """A picture of a workflow: the text of an SVG image, or of a Mermaid flowchart.

    Args:
        workflow: any stage, compiled or not.
        format: "svg" or "mermaid".

    Raises:
        ValueError: it is another format.

    Example:
        >>> from crucible.kitchen import sequence, stage
        >>> @stage("data", host=True)
        ... def load():
        ...     return [1, 2]
        >>> @stage("total")
        ... def add(data):
        ...     return sum(data)
        >>> print(draw(sequence(load, add), "mermaid").partition("  classDef")[0].rstrip())
        flowchart TB
          n1["load"]:::host
          n2["add"]:::device
          n1 -->|"data"| n2
    """
    formats = {"svg": svg, "mermaid": mermaid}
    if format not in formats:
        raise ValueError(f"There is no format {format!r}.{did_you_mean(format, formats)}")
    return formats[format](outline(workflow))


def save(workflow: Stage, path: str | Path) -> Path:
    """Write a picture of a workflow to a file, in the format that its ending says.

    Args:
        workflow: any stage, compiled or not.
        path: ends in .svg, in .mmd or .mermaid, or in .md, a Markdown page with the Mermaid chart.

    Returns:
        The path.

    Raises:
        ValueError: it has another ending.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".svg":
            text = draw(workflow)
        case ".mmd" | ".mermaid":
            text = draw(workflow, "mermaid")
        case ".md":
            text = f"```mermaid\n{draw(workflow, 'mermaid')}```\n"
        case other:
            raise ValueError(
                f"A picture cannot be saved as {path.name!r}: its ending, {other!r}, is none of "
                ".svg, .mmd, .mermaid, .md."
            )
    path.write_text(text, encoding="utf-8")
    return path
