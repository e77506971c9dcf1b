"""Where an atrous network looks: the sampling positions of ASPP and of the last stage, as numbers and as drawings.

Rates are given in pixels of the image, so that networks of different output strides can be laid over each other: a rate
that follows the output stride keeps its taps in place while the map that carries them becomes denser.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from seg_attn.models.atrous import check_output_stride
from seg_attn.models.deeplabv3 import DeepLabV3

TAP_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito's, told apart by all eyes
PANEL = 3.4  # inches


def tap_offsets(rate: int) -> NDArray[np.int64]:
    """Return where the nine taps of a 3x3 convolution lie.

    Args:
        rate: Distance between neighbouring taps, in pixels.

    Returns:
        int64 (9, 2): y and x, relative to the centre.

    Examples:
        >>> tap_offsets(6)[:3].tolist()
        [[-6, -6], [-6, 0], [-6, 6]]
    """
    if rate < 1:
        raise ValueError(f"rate must be at least 1, got {rate}")
    steps = rate * np.arange(-1, 2)
    return np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(9, 2)


def path_counts(rates: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """Count the paths by which a pixel reaches one output through successive 3x3 convolutions.

    A pixel without a path is not looked at: where all rates share a divisor, only every so-many-th pixel is (gridding;
    Wang 2018, "Understanding Convolution for Semantic Segmentation", arXiv 1702.08502).

    Args:
        rates: The rates of the convolutions, in pixels, in any order.

    Returns:
        int64 (K, K) of counts, the output's place in the middle, and the distance in pixels between neighbouring
        entries: the rates' greatest common divisor. K = 2 · sum(rates) / distance + 1.

    Raises:
        ValueError: There are no rates, or one is below 1.

    Examples:
        >>> counts, step = path_counts([2, 4])
        >>> counts[3].tolist(), step
        ([1, 1, 2, 1, 2, 1, 1], 2)
    """
    if not rates or min(rates) < 1:
        raise ValueError(f"rates must be at least one number, each at least 1, got {list(rates)}")
    step = math.gcd(*rates)
    line = np.ones(1, dtype=np.int64)
    for rate in rates:
        taps = np.zeros(2 * rate // step + 1, dtype=np.int64)
        taps[:: rate // step] = 1
        line = np.convolve(line, taps)
    return np.outer(line, line), step


def aspp_rates(model: DeepLabV3, output_stride: int) -> list[int]:
    """Return the rates of ASPP's branches at an output stride in pixels of the image; the model is left as it is."""
    return [rate * output_stride for rate in _at(model, output_stride)[0]]


def last_stage_rates(model: DeepLabV3, output_stride: int) -> list[int]:
    """Return the rates of the last stage's 3x3 convolutions in pixels of the image; the model is left as it is."""
    return _at(model, output_stride)[1]


def draw_taps(model: DeepLabV3, output_strides: Sequence[int] = (32, 16, 8)) -> Figure:
    """Draw the taps of ASPP's branches over the map that they read, one panel per output stride.

    Args:
        model: The network.
        output_strides: One panel each.
    """
    rates = {stride: aspp_rates(model, stride) for stride in output_strides}
    reach = 1.15 * max(max(values) for values in rates.values())
    figure, panels = _figure(len(output_strides))
    for axes, (stride, values) in zip(panels, rates.items(), strict=True):
        grid = stride * np.arange(-int(reach // stride), int(reach // stride) + 1)
        x, y = np.meshgrid(grid, grid)
        axes.plot(x.ravel(), y.ravel(), ".", color="0.8", markersize=max(0.6, stride / 10), zorder=1)
        for rate, color in zip(values, TAP_COLORS * len(values), strict=False):
            taps = tap_offsets(rate)
            axes.plot(taps[:, 1], taps[:, 0], "o", color=color, markersize=5, label=f"{rate // stride}: {rate} px")
        axes.plot(0, 0, "o", color="black", markersize=6, zorder=3)
        axes.legend(
            fontsize=7,
            title="rate",
            title_fontsize=7,
            ncols=len(values),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            frameon=False,
            handletextpad=0.2,
        )
        axes.set_anchor("N")  # what is left of the height is the legend's
        _frame(axes, f"output stride {stride}: a value every {stride} px", reach)
    figure.suptitle(
        "Taps of ASPP's 3×3 branches for one output value (black), over the values of the map (grey)", fontsize=9
    )
    return figure


def draw_paths(networks: Mapping[str, DeepLabV3], output_stride: int = 16) -> Figure:
    """Draw from where, and by how many paths, the last stage's 3x3 convolutions reach one output value.

    Args:
        networks: One panel each, by the name that stands above it.
        output_stride: Of all of them.
    """
    found = {name: last_stage_rates(model, output_stride) for name, model in networks.items()}
    reach = 1.05 * max(sum(rates) for rates in found.values())
    figure, panels = _figure(len(found))
    for axes, (name, rates) in zip(panels, found.items(), strict=True):
        counts, step = path_counts(rates)
        rows, columns = np.nonzero(counts)
        middle = counts.shape[0] // 2
        picture = axes.scatter(
            step * (columns - middle),
            step * (rows - middle),
            c=counts[rows, columns],
            s=9,
            cmap="viridis",
            norm=Normalize(1, counts.max()),
        )
        bar = figure.colorbar(picture, ax=axes, shrink=0.8, ticks=MaxNLocator(6, integer=True))
        bar.set_label("paths", fontsize=7)
        bar.ax.tick_params(labelsize=7)
        _frame(axes, f"{name}\nrates {', '.join(map(str, rates))} px", reach)
    figure.suptitle(
        f"Places that the last stage's 3×3 convolutions join in one value at output stride {output_stride}", fontsize=9
    )
    return figure


def _at(model: DeepLabV3, output_stride: int) -> tuple[list[int], list[int]]:
    check_output_stride(output_stride)
    before = model.output_stride
    try:
        model.output_stride = output_stride
        last = [block for block in model.dilation_plan() if block.name.startswith("layer4.")]
        convs = [conv.effective_rate for block in last for conv in block.spatial]
        return list(model.aspp.rates), convs
    finally:
        model.output_stride = before


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(PANEL * panels, PANEL + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _frame(axes: Axes, title: str, reach: float) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(reach, -reach)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=7)
    axes.set_xlabel("px", fontsize=7)
