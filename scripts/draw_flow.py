"""Draw the picture of the flow from docs/flow.toml: `draw_flow.py [SVG]`, by default docs/flow.svg."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import msgspec

DOCS = Path(__file__).parents[1] / "docs"
# Boxes have their own fill, and lines a grey that reads on white and on black, for viewers that ignore the media query.
STYLE = """
text { font-family: -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif }
text { font-size: 14px; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.name { font-weight: 600 }
.outside { fill: #6e7681 }
.box { fill: #ddebff; stroke: #4078c8; stroke-width: 1.5 }
.frame { fill: #f3f5f8; stroke: #8b949e; stroke-width: 1.5; stroke-dasharray: 6 4 }
.arrow { fill: none; stroke: #6e7681; stroke-width: 2 }
.head { fill: #6e7681 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .outside { fill: #9aa4af }
  .box { fill: #16304f; stroke: #5b9bea }
  .frame { fill: #161b22 }
  .arrow { stroke: #9aa4af }
  .head { fill: #9aa4af }
}
"""
MARGIN, PAD, TITLE, LINE, HEAD = 8, 14, 22, 20, 9


def draw(picture: dict[str, Any]) -> str:
    """SVG of the boxes, frames, rows and arrows of flow.toml."""
    width, height = picture["size"]
    view = f"{-MARGIN} {-MARGIN} {width + 2 * MARGIN} {height + 2 * MARGIN}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" role="img">',
        "<title>The flow of a case</title>",
        f"<style>{STYLE}</style>",
    ]
    parts += [_frame(one) for one in picture["frame"]]
    parts += [_arrow(one["points"]) for one in picture["arrow"]]
    parts += [_box(one) for one in picture["box"]]
    parts += [
        _text(x, row["y"], cell, "name" if not i else "")
        for row in picture["row"]
        for i, (x, cell) in enumerate(row["cells"])
    ]
    return "\n".join([*parts, "</svg>", ""])


def _rectangle(one: dict[str, Any], kind: str) -> str:
    (x, y), (width, height) = one["at"], one["size"]
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def _text(x: int, y: int, text: str, kind: str) -> str:
    return f'<text{f" class={kind!r}" if kind else ""} x="{x}" y="{y}">{escape(text)}</text>'


def _frame(one: dict[str, Any]) -> str:
    x, y = one["at"]
    return _rectangle(one, "frame") + _text(x + PAD, y + TITLE - 2, one["title"], "title")


def _box(one: dict[str, Any]) -> str:
    x, y = one["at"]
    texts = [_text(x + PAD, y + TITLE, one["title"], "title")]
    texts += [_text(x + PAD, y + TITLE + LINE * (i + 1), line, "") for i, line in enumerate(one["lines"])]
    return "".join([_rectangle(one, "box"), *texts])


def _arrow(points: list[list[int]]) -> str:
    """A line along horizontal and vertical pieces, with a head at its end."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    bx, by = x - HEAD * dx, y - HEAD * dy
    line = " ".join(f"{px},{py}" for px, py in [*points[:-1], [bx, by]])
    half = HEAD / 2
    head = f"{x},{y} {bx + half * dy:g},{by + half * dx:g} {bx - half * dy:g},{by - half * dx:g}"
    return f'<polyline class="arrow" points="{line}"/><polygon class="head" points="{head}"/>'


def main() -> None:
    """Write the picture."""
    picture = msgspec.toml.decode((DOCS / "flow.toml").read_bytes())
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "flow.svg"
    target.write_text(draw(picture), encoding="utf-8")


if __name__ == "__main__":
    main()
