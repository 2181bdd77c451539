"""Heat maps: numbers in a grid as colours, the numbers beside them where there is room."""

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

_CELL = 0.42  # inches
_MAX_WRITTEN = 256  # cells with their number; more are colours only
_MIN_SIDE, _MAX_SIDE = 3.0, 16.0  # inches
_DPI = 100


def heat_map(
    values: Tensor, *, title: str, rows: Sequence[str], x_label: str, limits: tuple[float, float]
) -> Image.Image:
    """Draw a matrix, one row of cells per label.

    Args:
        values: `(m, n)` float; NaN stays white.
        title: What the colours mean.
        rows: A label per row.
        x_label: What the columns are.
        limits: Values of the darkest and the brightest colour.

    Raises:
        ValueError: If there is not a label for each row of a matrix.
    """
    if values.ndim != 2 or len(values) != len(rows):
        raise ValueError(
            f"a heat map needs a matrix and a label per row, got {tuple(values.shape)} and "
            f"{len(rows)} labels."
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    width = min(max(_CELL * values.shape[1] + 1.6, _MIN_SIDE), _MAX_SIDE)
    figure = Figure(figsize=(width, _CELL * len(rows) + 1.1), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = limits
    picture = axes.imshow(values.cpu().numpy(), cmap="viridis", vmin=low, vmax=high, aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=x_label)
    axes.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axes)
    if values.numel() <= _MAX_WRITTEN:
        for row, cells in enumerate(values.tolist()):
            for column, value in enumerate(cells):
                ink = "white" if value < (low + high) / 2 else "black"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink
                )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
