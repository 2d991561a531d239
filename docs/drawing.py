"""Boxes, arrows and text as SVG that is readable on light and on dark pages: it brings its own paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal
from xml.sax.saxutils import escape

Colour = Literal["window", "entries", "keys", "tails", "tables", "model", "values", "codes", "scales", "zeros"]

COLOURS: dict[str, tuple[str, str]] = {  # light, dark
    "paper": ("#ffffff", "#161a1f"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#4d5761", "#b3bcc6"),
    "window": ("#d3e5ff", "#1d3d6b"),
    "entries": ("#cdeed6", "#1d4d30"),
    "keys": ("#fde8bd", "#5c4512"),
    "tails": ("#e6dafb", "#453170"),
    "tables": ("#e4e8ec", "#333a42"),
    "model": ("#ffffff", "#161a1f"),
    "values": ("#d3e5ff", "#1d3d6b"),
    "codes": ("#cdeed6", "#1d4d30"),
    "scales": ("#f5a97a", "#a8562a"),
    "zeros": ("#ffffff", "#161a1f"),
}
SIZE = 13
WIDTH_OF_LETTER = 0.56  # of the size: more than letters of common fonts take on average


class TooLong(ValueError):
    """Text that would not fit its box."""


class Drawing:
    """A picture under construction.

    Args:
      width: in units, about a pixel each at the width of the site's column.
      height: likewise.
      title: what it shows, for those who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self._parts: list[str] = []
        self._width, self._height, self._title = width, height, title

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: Literal["start", "middle", "end"] = "start",
        bold: bool = False,
        soft: bool = False,
        size: float = SIZE,
    ) -> None:
        """A line of text whose baseline begins, has its middle, or ends at (x, y).

        Raises:
          TooLong: it would leave the picture.
        """
        long = len(text) * size * WIDTH_OF_LETTER
        left = x - {"start": 0, "middle": long / 2, "end": long}[anchor]
        if left < 0 or left + long > self._width:
            raise TooLong(f"{text!r} leaves the picture {self._title!r}: from {left:.0f} to {left + long:.0f}")
        look = f' class="{"b " * bold}{"s" * soft}"' if bold or soft else ""
        size_of = "" if size == SIZE else f' font-size="{size:g}"'
        self._parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{look}{size_of}>{escape(text)}</text>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: Colour,
        lines: Sequence[str] = (),
        *,
        dashed: bool = False,
        size: float = SIZE,
    ) -> None:
        """A box with lines of text in its middle; the first one is bold if there are several.

        Raises:
          TooLong: a line is wider than the box.
        """
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" class="{colour}"{dash}/>'
        )
        step = size * 1.3
        top = y + height / 2 - step * (len(lines) - 1) / 2 + size * 0.35
        for number, line in enumerate(lines):
            if len(line) * size * WIDTH_OF_LETTER > width:
                raise TooLong(f"{line!r} does not fit a box {width:g} wide in {self._title!r}")
            first = number == 0 and len(lines) > 1
            self.text(x + width / 2, top + number * step, line, anchor="middle", bold=first, soft=number > 0, size=size)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Straight lines from point to point, with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        angle = math.atan2(y - y0, x - x0)
        head = [(x - 8 * math.cos(angle + turn), y - 8 * math.sin(angle + turn)) for turn in (0.4, -0.4)]
        path = " ".join(f"{px:g},{py:g}" for px, py in points)
        tip = " ".join(f"{px:.1f},{py:.1f}" for px, py in (head[0], (x, y), head[1]))
        self._parts.append(f'<polyline points="{path}" class="l"/><polygon points="{tip}" class="h"/>')

    def line(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Straight lines from point to point."""
        path = " ".join(f"{px:g},{py:g}" for px, py in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<polyline points="{path}" class="l"{dash}/>')

    def svg(self) -> str:
        """The picture as a file."""
        light, dark = (" ".join(f"--{name}:{pair[place]};" for name, pair in COLOURS.items()) for place in (0, 1))
        fills = "\n".join(f".{name} {{ fill: var(--{name}); stroke: var(--soft); }}" for name in list(COLOURS)[3:])
        style = f"""svg {{ {light} font-family: system-ui, "Helvetica Neue", Arial, sans-serif; font-size: {SIZE}px; }}
@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}
text {{ fill: var(--ink); }} .b {{ font-weight: 600; }} .s {{ fill: var(--soft); }}
.l {{ fill: none; stroke: var(--soft); stroke-width: 1.3; }} .h {{ fill: var(--soft); }} .p {{ fill: var(--paper); }}
{fills}"""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width:g} {self._height:g}" '
            f'width="{self._width:g}" height="{self._height:g}" role="img">'
        )
        paper = f'<rect class="p" width="{self._width:g}" height="{self._height:g}" rx="6"/>'
        lines = [head, f"<title>{escape(self._title)}</title>", f"<style>\n{style}\n</style>", paper, *self._parts]
        return "\n".join([*lines, "</svg>\n"])
