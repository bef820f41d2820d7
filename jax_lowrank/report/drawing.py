"""One matplotlib panel as inline SVG: coloured by the page's CSS, the same bytes every time.

Panels are small and stand alone, so that a page can lay them out in one column on a phone. Colours
are placeholders that become CSS variables (`--base`, `--full`, ...), which follow light and dark
themes; text stays text.
"""

import html
import io
import re
from collections.abc import Callable
from typing import NamedTuple

ROLES = ("ink", "muted", "grid", "base", "full", "lora", "low", "high")
NUM_RANK_COLORS = 8
COLORS = {name: f"#0{place:x}0{place:x}0{place:x}" for place, name in enumerate(ROLES, 1)}
COLORS |= {f"rank{place}": f"#0{place:x}0{place:x}ff" for place in range(NUM_RANK_COLORS)}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
WIDTH, HEIGHT = 3.7, 2.6  # inches; 72 units each in the SVG


class Panel(NamedTuple):
    """A drawing with its heading; `svg` is markup, `alt` says in words what it shows."""

    title: str
    svg: str
    alt: str


class Key(NamedTuple):
    """A legend entry: a CSS variable's name, the sign drawn in that colour, what it stands for."""

    color: str
    glyph: str
    text: str


def panel(
    title: str,
    alt: str,
    draw: Callable,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Panel:
    """Call draw(axes) on fresh axes of this size (inches) and return the SVG; no pyplot state."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "axes.unicode_minus": True,
        "text.color": COLORS["ink"],
        "axes.labelcolor": COLORS["ink"],
        "axes.edgecolor": COLORS["muted"],
        "xtick.color": COLORS["muted"],
        "ytick.color": COLORS["muted"],
        "xtick.labelcolor": COLORS["ink"],
        "ytick.labelcolor": COLORS["ink"],
        "grid.color": COLORS["grid"],
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        draw(axes)
        low, high = axes.get_ylim()
        if high - low < 1e-9:  # equal but for rounding, which is nothing to look at
            axes.set_ylim(low - 0.05, high + 0.05)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return Panel(title, _inline(out.getvalue(), f"{title}. {alt}"), alt)


def rank_color(place: int, number: int) -> str:
    """CSS variable of the place-th of `number` ranks, spread over the whole ramp."""
    return f"rank{round(place * (NUM_RANK_COLORS - 1) / max(number - 1, 1))}"


def _inline(svg: str, label: str) -> str:
    """SVG without prologue, metadata, fixed size, namespaces and unused ids; colours as CSS."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', svg)[1]
    head = f'<svg viewBox="{view}" role="img" aria-label="{html.escape(label, quote=True)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()
