"""The colours and the look of all figures."""

from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.system.atomic_files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can distinguish: https://jfly.uni-koeln.de/color/
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#8a3f74"
SERIES_COLOURS = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, SOFT, BAND = "#1b1f24", "#59636e", "#f2f4f7"
DPI = 120  # 10 inches wide: 1200 pixels


def empty_figure(height: float) -> "Figure":
    """10 inches wide, ``height`` inches high, on a canvas that draws to files, whatever ``MPLBACKEND`` is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def tidy_axes(axes: "Axes") -> None:
    """Draw a light grid behind the data, and no frame at the top and on the right."""
    axes.grid(color="#e2e6eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
