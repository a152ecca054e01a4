"""The report's plots: small matplotlib figures as inline SVG, one look for all."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")
INK, MUTED, GRID = "#1c2430", "#6b7686", "#e4e8ee"
ACCENT, SECOND, WARN = "#2f6fde", "#0f9d8a", "#d9822b"
PALETTE = (ACCENT, SECOND, WARN, "#8a5cd6", "#c2447a", "#5b8c2a", "#6b7686", "#b8860b")
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.titlecolor": INK,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": MUTED, "ytick.color": MUTED,
    "text.color": INK, "legend.frameon": False, "legend.fontsize": 8, "svg.fonttype": "path", "svg.hashsalt": "gr2",
}  # fmt: skip
plt.rcParams.update(STYLE)


def svg(figure: Figure) -> str:
    """The figure as an SVG element, equal for equal figures."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def panel(title: str, width: float = 5.2, height: float = 2.6) -> tuple[Figure, Axes]:
    """An empty plot in the report's style."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_title(title, pad=10)
    return figure, axes


def intervals(
    title: str, names: Sequence[str], values: Sequence[float], lows: Sequence[float], highs: Sequence[float], mark: float | None, axis: str
) -> str:
    """One dot with its interval per model, best on top; `mark` is a line to compare with (the incoming order)."""
    figure, axes = panel(title, 5.2, 0.9 + 0.26 * len(names))
    places = range(len(names) - 1, -1, -1)
    for place, value, low, high in zip(places, values, lows, highs, strict=True):
        axes.plot([low, high], [place, place], color=ACCENT, linewidth=2.4, alpha=0.35, solid_capstyle="round")
        axes.plot([value], [place], "o", color=ACCENT, markersize=5)
    if mark is not None:
        axes.axvline(mark, color=WARN, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yticks(list(places), labels=list(names))
    axes.tick_params(axis="y", colors=INK, length=0)
    axes.set_xlabel(axis)
    axes.grid(axis="y", visible=False)
    return svg(figure)


def bars(title: str, names: Sequence[str], values: Sequence[float], axis: str = "") -> str:
    """Horizontal bars with their values, in the order given."""
    figure, axes = panel(title, 5.2, 0.8 + 0.24 * max(len(names), 1))
    places = range(len(names) - 1, -1, -1)
    axes.barh(list(places), values, color=ACCENT, height=0.62)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f" {value:,.3g}" if value < 1000 else f" {value:,.0f}", (max(value, 0), place), va="center", fontsize=8, color=MUTED)
    axes.set_yticks(list(places), labels=list(names))
    axes.tick_params(axis="y", colors=INK, length=0)
    axes.margins(x=0.15)
    axes.set_xlabel(axis)
    axes.grid(axis="y", visible=False)
    return svg(figure)


def columns(title: str, groups: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> str:
    """Vertical bars side by side: {name: (places, heights)}."""
    figure, axes = panel(title)
    width = 0.8 / max(len(groups), 1)
    for number, (name, (places, heights)) in enumerate(groups.items()):
        shifted = [p + (number - (len(groups) - 1) / 2) * width for p in places]
        axes.bar(shifted, heights, width=width * 0.92, color=PALETTE[number % len(PALETTE)], label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="x", visible=False)
    if len(groups) > 1:
        axes.legend()
    return svg(figure)


def lines(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, smooth: bool = True) -> str:
    """Curves {name: (x, y)}: the raw line faint, its running mean in front."""
    figure, axes = panel(title)
    for number, (name, (xs, ys)) in enumerate(series.items()):
        color = PALETTE[number % len(PALETTE)]
        if smooth and len(ys) > 12:
            axes.plot(xs, ys, color=color, linewidth=0.8, alpha=0.25)
            mean, kept = ys[0], []
            for value in ys:
                mean = 0.9 * mean + 0.1 * value
                kept.append(mean)
            axes.plot(xs, kept, color=color, linewidth=1.6, label=name)
        else:
            axes.plot(xs, ys, color=color, linewidth=1.6, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    return svg(figure)
