"""Pictures of what a model attends to: gates, self-attention and feature maps, drawn over the photograph.

Each picture is a matplotlib figure with a caption that says what bright means, made without pyplot: nothing global is
touched, so that a notebook, a server or a test may call these functions as it likes.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import NDArray
from torch import Tensor

from seg_attn.data.images import ImageSource, UInt8Array, normalize, read_image, write_bytes
from seg_attn.draw import overlay
from seg_attn.errors import InputError
from seg_attn.models.classes import best_classes
from seg_attn.predict import Predictor
from seg_attn.recording import AttentionRow, GateRecord, Recording, record_gates

FloatArray = NDArray[np.float32]

BRIGHT = "inferno"  # dark to bright, even steps for the eye, also in grey print
OPACITY = 0.7  # of a map over the photograph
PANEL = 2.6  # inches, the width of one panel
LONGEST_SIDE = 640  # pixels; a larger photograph is drawn smaller
DPI = 160
STRONGEST, WEAKEST = 12, 4  # bars of a channel gate
DECIDED = 16  # bars of a branch gate
GRID_ROWS, GRID_COLUMNS = 4, 8  # of a stage's channels
NAMED_CLASSES = 6  # below the prediction


@dataclass(frozen=True)
class Scene:
    """A photograph and what the model makes of it.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        mask: Predicted class indices, uint8 (H, W).
        class_names: One name per class.
        palette: One colour (red, green, blue) per class.
    """

    image: UInt8Array
    mask: UInt8Array
    class_names: Sequence[str]
    palette: Sequence[Sequence[int]]

    @property
    def thumbnail(self) -> UInt8Array:
        """The photograph at the size at which it is drawn."""
        height, width = self.image.shape[:2]
        factor = LONGEST_SIDE / max(height, width)
        if factor >= 1:
            return self.image
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        return np.asarray(cv2.resize(self.image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)

    @property
    def aspect(self) -> float:
        """Height over width."""
        return float(self.image.shape[0] / self.image.shape[1])


class Explainer:
    """Draws what a trained model attends to.

    Args:
        predictor: The model, and what its data were.

    Examples:
        >>> from seg_attn import DeepLabV3
        >>> from seg_attn.checkpoint import DataInfo
        >>> model = DeepLabV3("resnet18", num_classes=3, attention={"aspp": "cbam"})
        >>> explainer = Explainer(Predictor(model, DataInfo.default(3), device="cpu"))
        >>> list(explainer.figures(np.zeros((48, 64, 3), dtype=np.uint8)))[:4]
        ['stages', 'fusion', 'spatial', 'channels']
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def record(self, image: ImageSource, point: tuple[int, int] | None = None) -> tuple[Scene, Recording]:
        """Predict one image and record what the model attends to.

        Args:
            image: A path, a PIL image, or a uint8 array (H, W, 3), RGB.
            point: The pixel (x, y) whose self-attention is recorded; None is the image's centre.

        Raises:
            InputError: If the image cannot be read or does not have that pixel.
        """
        photograph = read_image(image)
        height, width = photograph.shape[:2]
        x, y = point or (width // 2, height // 2)
        if not (0 <= x < width and 0 <= y < height):
            name = image if isinstance(image, str | Path) else "the image"
            raise InputError(f"--point {x} {y} lies outside {name}: x must be 0 to {width - 1} and y 0 to {height - 1}")
        data = self.predictor.data
        tensor = normalize(photograph, data.mean, data.std)[None].to(self.predictor.device)
        model = self.predictor.model
        share = ((x + 0.5) / width, (y + 0.5) / height)
        with torch.inference_mode(), record_gates(model, share) as recording:
            logits: Tensor = model(tensor)
        mask = best_classes(logits)[0][0].cpu().numpy()
        return Scene(photograph, mask, data.class_names, data.palette), recording

    def figures(self, image: ImageSource, point: tuple[int, int] | None = None) -> dict[str, Figure]:
        """Draw all there is to see for one image, by the pictures' names; see `draw`."""
        return draw(*self.record(image, point))

    def write(self, source: Path, folder: Path, point: tuple[int, int] | None = None) -> list[Path]:
        """Draw one file's pictures into a folder as `<stem>_<picture>.png`, each whole or not at all.

        Returns:
            The files written.

        Raises:
            InputError: As `record`.
        """
        written = []
        for name, figure in self.figures(source, point).items():
            written.append(folder / f"{source.stem}_{name}.png")
            write_bytes(written[-1], figure_png(figure))
        return written


def draw(scene: Scene, recording: Recording) -> dict[str, Figure]:
    """Draw what a recording of one image holds; only the first image of a batch is drawn.

    Returns:
        By name, those that the model has something for: ``stages`` (channel means), ``fusion``, ``residual_fusion``,
        ``spatial``, ``self_attention``, ``channels``, ``branches``, and ``features_<stage>`` for every stage.
    """
    fusions = recording.of_kind("fusion")
    figures = {}
    if recording.features:
        figures["stages"] = draw_stages(scene, recording.features)
    if gates := [gate for gate in fusions if not _is_residual(gate)]:
        figures["fusion"] = draw_fusion(scene, gates)
    if gates := [gate for gate in fusions if _is_residual(gate)]:
        figures["residual_fusion"] = draw_residual_fusion(scene, gates)
    if gates := recording.of_kind("spatial", "element"):
        figures["spatial"] = draw_spatial(scene, gates)
    if rows := list(recording.rows.values()):
        figures["self_attention"] = draw_rows(scene, rows)
    if gates := recording.of_kind("channel"):
        figures["channels"] = draw_channels(gates)
    if gates := recording.of_kind("branch"):
        figures["branches"] = draw_branches(gates)
    return figures | {f"features_{stage}": draw_features(stage, maps) for stage, maps in recording.features.items()}


def figure_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


# --- the pictures ----------------------------------------------------------------------------------------------------


def draw_fusion(scene: Scene, gates: Sequence[GateRecord]) -> Figure:
    """Draw how every fusion weighs its two inputs: for a skip, the low-level against the high-level map.

    Args:
        scene: The photograph.
        gates: Gates of kind "fusion".
    """
    figure, axes = _small_multiples(len(gates) * 4, scene.aspect, columns=4)
    for index, gate in enumerate(gates):
        row = axes[index * 4 :]
        weights = gate.weights[0].float().cpu().numpy()
        low = weights.mean(0)
        first, second = _inputs(gate)
        _show(row[0], scene.thumbnail, _title(gate))
        _show_map(row[1], scene, low, f"weight of {first}")
        _show_map(row[2], scene, 1 - low, f"weight of {second}")
        _show_map(row[3], scene, (weights > 0.5).mean(0), f"channels in favour of {first}")
    return _captioned(
        figure,
        "Weights are means over the channels and add up to 1 at each place. Bright: this input weighs more here than "
        "at the dark places; where the scale reads ½, both weigh the same. Last column: the share of the channels in "
        "which it weighs more than ½. Each panel has its own scale." + _strengths(gates),
    )


def draw_residual_fusion(scene: Scene, gates: Sequence[GateRecord]) -> Figure:
    """Draw the weight of the identity path in every residual block that fuses by AFF or iAFF."""
    figure, axes = _small_multiples(len(gates), scene.aspect)
    for gate, ax in zip(gates, axes, strict=True):
        _show_map(ax, scene, gate.position_map()[0], _title(gate))
    return _captioned(
        figure,
        "Bright: the block's identity path weighs more here than at the dark places, and its residual branch less; "
        "where the scale reads ½, both weigh the same. Means over the channels; each panel has its own scale.",
    )


def draw_spatial(scene: Scene, gates: Sequence[GateRecord]) -> Figure:
    """Draw every gate that differs between places: CBAM's and attention pooling's map, the channel mean of MS-CAM's.

    Args:
        scene: The photograph.
        gates: Gates of kind "spatial" or "element".
    """
    figure, axes = _small_multiples(len(gates) + 1, scene.aspect)
    _show(axes[0], scene.thumbnail, "photograph")
    for gate, ax in zip(gates, axes[1:], strict=True):
        values = gate.position_map()[0]
        _show_map(ax, scene, values * values.numel() if gate.over_positions else values, _title(gate))
    words = ""
    if any(not gate.over_positions for gate in gates):
        words += "Bright: features at this place are kept (gate towards 1); dark: they are held back (towards 0). "
    if any(gate.kind == "element" for gate in gates):
        words += "A block with a gate per channel and place (MS-CAM) is shown by its mean over the channels. "
    if any(gate.over_positions for gate in gates):
        words += "Attention pooling: bright places make up more of the pooled vector; in an average each has 1. "
    return _captioned(figure, f"{words}Each panel has its own scale.{_strengths(gates)}")


def draw_rows(scene: Scene, rows: Sequence[AttentionRow]) -> Figure:
    """Draw where the chosen position of every self-attention block looks, head by head."""
    panels = [(row, head) for row in rows for head in range(row.weights.shape[1])]
    figure, axes = _small_multiples(len(panels) + 1, scene.aspect)
    _show(axes[0], scene.thumbnail, "photograph")
    _mark(axes[0], rows[0], scene)
    for (row, head), ax in zip(panels, axes[1:], strict=True):
        values = row.weights[0, head]
        heads = f", head {head + 1}" if row.weights.shape[1] > 1 else ""
        _show_map(ax, scene, values * values.numel(), f"SelfAttention at {_place(row.name)}{heads}")
        _mark(ax, row, scene)
    gammas = ", ".join(f"{row.gamma:.3g} at {_place(row.name)}" for row in rows)
    idle = " Where γ is 0 the attention has no effect on the result." if any(row.gamma == 0 for row in rows) else ""
    return _captioned(
        figure,
        "Bright: the marked position gathers more from this place; 1 is the share that every place has where all are "
        f"alike. Each panel has its own scale. What is gathered is added to the features γ times: γ is {gammas}.{idle}"
        f"{_strengths(rows)}",
    )


def draw_channels(gates: Sequence[GateRecord]) -> Figure:
    """Draw the strongest and the weakest channels of every channel gate as bars, up and down from the mean gate."""
    figure, axes = _small_multiples(len(gates), 0.75, min(3, len(gates)), width=3.4)
    for gate, ax in zip(gates, axes, strict=True):
        values = gate.weights[0, :, 0, 0].float().cpu().numpy()
        order = np.argsort(-values, kind="stable")
        shown = order if len(order) <= STRONGEST + WEAKEST else np.concatenate([order[:STRONGEST], order[-WEAKEST:]])
        mean = float(values.mean())
        places = np.arange(len(shown)) + (np.arange(len(shown)) >= STRONGEST) * 0.8  # a gap before the weakest
        colours = [_colormap()(0.62 if value >= mean else 0.25) for value in values[shown]]
        ax.bar(places, values[shown] - mean, bottom=mean, color=colours, width=0.8)
        ax.axhline(mean, color="0.3", linewidth=0.8)
        ax.set_xticks(places, [str(channel) for channel in shown], rotation=90, fontsize=6)
        ax.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        _bar_axes(ax, "gate", f"{_title(gate)}\n{len(values)} channels, {_range(values)}")
    return _captioned(
        figure,
        f"A bar is a channel's gate, drawn from the mean of all gates (line): the {STRONGEST} strongest and, behind "
        f"the gap, the {WEAKEST} weakest channels, by number. Up: the channel is kept more than the average one; a "
        "gate of 1 lets it pass unchanged, a gate of 0 switches it off." + _strengths(gates),
    )


def draw_branches(gates: Sequence[GateRecord]) -> Figure:
    """Draw how every branch gate (SK) shares out its weight: on average, and in the channels that decide most."""
    figure, axes = _small_multiples(len(gates), 0.75, min(3, len(gates)), width=4.2)
    for gate, ax in zip(gates, axes, strict=True):
        weights = gate.weights[0, :, :, 0, 0].float().cpu().numpy()  # (M, C)
        branches, channels = weights.shape
        order = np.argsort(-weights.max(0), kind="stable")[:DECIDED]
        columns = np.concatenate([weights.mean(1, keepdims=True), weights[:, order]], axis=1)
        places = np.array([-1.5, *range(len(order))])
        bottom = np.zeros(columns.shape[1])
        for branch, heights in enumerate(columns):
            shade = _colormap()(0.25 + 0.55 * branch / max(1, branches - 1))
            ax.bar(places, heights, bottom=bottom, color=shade, width=0.8, label=f"branch {branch + 1}")
            bottom = bottom + heights
        ax.axhline(1 / branches, color="white", linewidth=0.8, linestyle="--")
        ax.set_xticks(places, ["mean", *map(str, order)], rotation=90, fontsize=6)
        ax.set_ylim(0, 1)
        _bar_axes(ax, "share", f"{_title(gate)}\n{channels} channels")
        ax.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, reverse=True)
    return _captioned(
        figure,
        f"Each bar shares out a channel's weight between the branches: the mean of all channels, then the {DECIDED} "
        "that decide most, by number. A long part: the channel reads this branch; a later branch has a larger "
        "dilation, so a larger receptive field. Dashed: equal shares." + _strengths(gates),
    )


def draw_stages(scene: Scene, features: Mapping[str, Tensor]) -> Figure:
    """Draw the photograph, the prediction, and the channel mean of every stage over the photograph.

    Args:
        scene: The photograph and its prediction.
        features: (N, C, H, W) by stage.
    """
    figure, axes = _small_multiples(len(features) + 2, scene.aspect)
    _show(axes[0], scene.thumbnail, "photograph")
    mask = cv2.resize(scene.mask, scene.thumbnail.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    _show(axes[1], overlay(scene.thumbnail, mask, scene.palette), "prediction")
    areas = np.bincount(scene.mask.ravel(), minlength=len(scene.class_names))[: len(scene.class_names)]
    largest = [int(index) for index in np.argsort(-areas, kind="stable")[:NAMED_CLASSES] if areas[index]]
    patches = [_legend_patch(scene, index) for index in largest]
    axes[1].legend(
        handles=patches,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
        ncols=3,
        frameon=False,
        fontsize=5.5,
        handlelength=1,
        handleheight=1,
        columnspacing=1,
    )
    for (stage, maps), ax in zip(features.items(), axes[2:], strict=True):
        _show_map(ax, scene, maps[0].mean(0), f"{stage} ({' × '.join(map(str, maps.shape[1:]))})")
    return _captioned(
        figure,
        "Bright: the mean over the stage's channels is larger here. Each panel has its own scale; in brackets channels "
        "× height × width of the map. The prediction names its largest classes.",
    )


def draw_features(stage: str, maps: Tensor) -> Figure:
    """Draw the channels of a stage that vary most over the image, as a grid.

    Args:
        stage: The stage's name.
        maps: (N, C, H, W).
    """
    values = maps[0].float().cpu().numpy()
    count, height, width = values.shape
    order = np.argsort(-values.std(axis=(1, 2)), kind="stable")[: GRID_ROWS * GRID_COLUMNS]
    columns = min(GRID_COLUMNS, len(order))
    rows = math.ceil(len(order) / columns)
    # One picture with gaps: an axes for each channel takes a second per figure.
    gap_x, gap_y = max(1, round(0.06 * width)), max(2, round(0.16 * width))
    mosaic = np.full((rows * (height + gap_y), columns * (width + gap_x) - gap_x), np.nan, dtype=np.float32)
    figure = _figure(columns * 1.05, columns * 1.05 * mosaic.shape[0] / mosaic.shape[1])
    ax = figure.subplots()
    for index, channel in enumerate(order):
        top, left = index // columns * (height + gap_y) + gap_y, index % columns * (width + gap_x)
        mosaic[top : top + height, left : left + width] = _scale(values[channel])(values[channel])
        ax.text(left + (width - 1) / 2, top - 0.5 - 0.15 * gap_y, str(channel), fontsize=6, ha="center", va="bottom")
    _show(ax, mosaic, "")
    return _captioned(
        figure,
        f"{stage}: {len(order)} of {count} channels, those that vary most over the image first, by number; maps of "
        f"{height} × {width}. Bright: the channel is active here. Each has its own scale, from its least to its "
        "largest value.",
    )


# --- how they are drawn ----------------------------------------------------------------------------------------------


def _small_multiples(
    count: int, aspect: float, columns: int | None = None, width: float = PANEL
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows; `aspect` is height over width of each."""
    columns = columns or min(4, count)
    rows = math.ceil(count / columns)
    figure = _figure(columns * width, rows * (0.85 * width * aspect + 0.38))
    axes = [ax for row in figure.subplots(rows, columns, squeeze=False) for ax in row]
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _captioned(figure: Figure, caption: str) -> Figure:
    """Add the caption below the panels, and the room that it needs."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(caption, max(30, int(width * 19)))
    room = 0.13 * len(lines) + 0.12
    figure.set_size_inches(width, height + room)
    share = room / (height + room)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    top = 0.05 / (height + room)
    engine.set(rect=(0, share, 1, 1 - share - top), w_pad=0.03, h_pad=0.03)
    figure.text(0.01, 0.06 / (height + room), "\n".join(lines), fontsize=7, va="bottom", color="0.15", linespacing=1.25)
    return figure


def _blend(scene: Scene, values: FloatArray, scale: Normalize) -> UInt8Array:
    """Colour a map and lay it over the grey photograph: uint8 (H, W, 3) at the thumbnail's size."""
    photograph = scene.thumbnail
    height, width = photograph.shape[:2]
    # Pixels as areas, as the model's own resizing has it.
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[None, None], (height, width), mode="bilinear"
    )[0, 0].numpy()
    colours = _colormap()(scale(resized))[..., :3]
    grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)[..., None] / 255
    return np.asarray(np.round(255 * (OPACITY * colours + (1 - OPACITY) * grey)), dtype=np.uint8)


def _colormap() -> Colormap:
    return mpl.colormaps[BRIGHT]


def _scale(values: FloatArray) -> Normalize:
    """From the least to the largest value; a constant map lies in the middle."""
    low, high = float(values.min()), float(values.max())
    margin = max(1e-6, 1e-3 * abs(high)) if high - low < 1e-6 else 0.0
    return Normalize(low - margin, high + margin)


def _show(ax: Axes, image: UInt8Array | FloatArray, title: str) -> None:
    ax.imshow(image, cmap=BRIGHT, interpolation="nearest")
    ax.set_title(title, fontsize=7.5, pad=3)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _show_map(ax: Axes, scene: Scene, values: Tensor | FloatArray, title: str) -> None:
    """Show a map over the photograph, with the scale of its colours beside it."""
    array = np.asarray(values.float().cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
    scale = _scale(array)
    _show(ax, _blend(scene, array, scale), title)
    # Inside the panel's own coordinates, so that it is as high as the picture.
    bar = ax.figure.colorbar(ScalarMappable(scale, _colormap()), cax=ax.inset_axes((1.02, 0, 0.04, 1)))
    bar.locator = MaxNLocator(4)
    bar.formatter = ScalarFormatter(useOffset=False)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=6, length=2, pad=1)
    bar.outline.set_linewidth(0.4)


def _bar_axes(ax: Axes, quantity: str, title: str) -> None:
    ax.tick_params(axis="y", labelsize=7)
    ax.set_ylabel(quantity, fontsize=7)
    ax.set_xlabel("channel", fontsize=7)
    ax.set_title(title, fontsize=7.5)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _mark(ax: Axes, row: AttentionRow, scene: Scene) -> None:
    """Outline the position that looks: the cell of the map, at its place in the photograph."""
    height, width = scene.thumbnail.shape[:2]
    rows, columns = row.weights.shape[-2:]
    x, y = (row.column + 0.5) * width / columns - 0.5, (row.row + 0.5) * height / rows - 0.5
    ax.plot(x, y, marker="o", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2.4)
    ax.plot(x, y, marker="o", markersize=9, markerfacecolor="none", markeredgecolor="#40e0ff", markeredgewidth=1.2)


def _is_residual(gate: GateRecord) -> bool:
    return "backbone." in gate.name


def _inputs(gate: GateRecord) -> tuple[str, str]:
    """What the two inputs of a fusion are: the decoder's are known, those of other models are numbered."""
    if "decoder.skips." in gate.name:
        return "the low-level map", "the high-level map"
    return "the first input", "the second input"


def _legend_patch(scene: Scene, index: int) -> Patch:
    if index == 0:  # `overlay` leaves it as photographed
        return Patch(facecolor="white", edgecolor="0.5", linewidth=0.5, label=f"{scene.class_names[0]} (not coloured)")
    return Patch(facecolor=_fraction(scene.palette[index]), label=scene.class_names[index])


def _fraction(colour: Sequence[int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def _title(gate: GateRecord) -> str:
    """The block and its place, such as "CBAM at layer2"."""
    place = _place(gate.name.rpartition(".")[0])
    second = ", second pass" if gate.kind == "fusion" and gate.name.rpartition(".")[2].startswith("gate2") else ""
    return f"{gate.block}{f' at {place}' if place else ''}{second}"


# Parts of the names of all attention modules, and of CBAM's halves, whose pictures say which half they show.
_UNSAID = ("backbone", "attention", "fusion", "channel", "spatial")


def _place(name: str) -> str:
    """A module's name without the parts that every attention block's name has."""
    parts = (part.removesuffix("_attention") for part in name.split("."))
    return ".".join(part for part in parts if part not in _UNSAID)


def _range(values: FloatArray) -> str:
    return f"{values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}"


def _strengths(records: Sequence[GateRecord] | Sequence[AttentionRow]) -> str:
    """What to say of blocks that started as the identity."""
    known = [f"{record.strength:.3g} in {_place(record.name)}" for record in records if record.strength is not None]
    if not known:
        return ""
    return f" These blocks have a part of α in the result: α is {', '.join(known)}; at 0 they have no effect."
