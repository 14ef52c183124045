"""Pictures: PNG images of what a classifier confuses, and of what it gets most wrong."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NUMBERED = 20  # classes; the numbers of more could not be read
_MOST_PIXELS = 96  # a side, in the grid
_COLUMNS = 5


def confusion(matrix: np.ndarray) -> bytes:
    """A PNG of [classes, classes] counts, coloured by the share of each label (row)."""
    from matplotlib.figure import Figure  # takes half a second to import

    classes = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(8.0, 2.5 + 0.4 * classes)
    figure = Figure(figsize=(side, side))
    # Margins in inches: a layout engine would draw all the numbers twice to find them.
    axes = figure.add_axes((0.55 / side, 0.5 / side, 1.0 - 0.6 / side, 1.0 - 0.55 / side))
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set(xlabel="predicted", ylabel="label")
    if classes <= _MOST_NUMBERED:
        axes.set(xticks=range(classes), yticks=range(classes))
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                shade = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column, row, f"{count:,}", ha="center", va="center", color=shade, fontsize=7
                )
    return _png(figure)


def grid(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """A PNG of at least one picture, each [h, w] or [h, w, c] of any range, below its caption."""
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // _COLUMNS)
    figure = Figure(figsize=(1.7 * _COLUMNS, 1.7 * rows))
    # One pair of axes, in units of cells: 25 pairs take half a second to lay out.
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(number, _COLUMNS)
        height, width = (0.42 * side / max(picture.shape[:2]) for side in picture.shape[:2])
        across, down = column + 0.5, row + 0.56
        axes.imshow(
            _shown(picture),
            cmap="gray",
            extent=(across - width, across + width, down + height, down - height),
        )
        axes.text(across, row + 0.08, caption, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, _COLUMNS), ylim=(rows, 0), aspect="auto")
    axes.set_axis_off()
    return _png(figure)


def _shown(picture: np.ndarray) -> np.ndarray:
    """[h, w] or [h, w, 3 or 4] of uint8, at most 96 pixels a side."""
    every = -(-max(picture.shape[:2]) // _MOST_PIXELS)
    picture = picture[::every, ::every]
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if picture.dtype == np.uint8:
        return picture
    values = np.nan_to_num(picture.astype(np.float32))
    least, most = values.min(), values.max()
    return (255.0 * (values - least) / max(most - least, 1e-12)).astype(np.uint8)


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()
