"""What attention and fusion cost: the parameters, FLOPs and time that each block adds to a network, as a table.

Parameters and FLOPs are those of `seg_attn.summary`. Time is measured inside the network's forward, on the modules that
the block adds or changes: the difference of two whole forwards would drown a cheap block in noise.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from seg_attn.attention import ATTENTION
from seg_attn.attention.arguments import positive_int, unknown_message
from seg_attn.fusion import FUSION
from seg_attn.models.backbone import NOMINAL_STRIDES
from seg_attn.models.deeplabv3 import ATTENTION_POSITIONS, DeepLabV3
from seg_attn.prediction.device import resolve_device
from seg_attn.summary import Cost, summarize


@dataclass(frozen=True)
class Item:
    """Something that can be built into a network that has the skip joined by addition and no attention.

    Attributes:
        name: Its name in the registry, such as "se".
        place: Where it stands: a position of `attention`, or the argument that names it.
    """

    name: str
    place: str

    @property
    def label(self) -> str:
        """What `Summary.additions` calls it."""
        attention = "attention: " if self.place in ATTENTION_POSITIONS else ""
        return f"{attention}{self.place}: {self.name}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `DeepLabV3` that build it in."""
        return {"attention": {self.place: self.name}} if self.place in ATTENTION_POSITIONS else {self.place: self.name}

    def parts(self, model: DeepLabV3) -> list[str]:
        """Return the names of the modules that it adds or changes."""
        if self.place in ATTENTION_POSITIONS:
            return attention_modules(model, self.place)
        if self.place == "residual_fusion":
            return _block_modules(model, "fusion")
        return {"fusion": ["decoder"], "image_pooling": [f"aspp.branches.{len(model.aspp.branches) - 1}"]}[self.place]


@dataclass(frozen=True)
class Price:
    """What an item adds to a network.

    Attributes:
        item: What was built in.
        parameters: How many more.
        flops: How many more for one image.
        seconds: How much more time for one image, a difference of medians; None if it was not measured.
    """

    item: Item
    parameters: int
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class PriceList:
    """Prices for one network and one size of image.

    Attributes:
        backbone: The network's backbone.
        output_stride: The network's output stride.
        size: Height and width of the image.
        plain: What the network costs without any of the items.
        seconds: Time of one forward of it, median; None if time was not measured.
        where: The device and threads that time was measured on.
        prices: One per item.
    """

    backbone: str
    output_stride: int
    size: tuple[int, int]
    plain: Cost
    seconds: float | None
    where: str
    prices: list[Price]

    def markdown(self) -> str:
        """Lay the list out as a Markdown table, with what it stands for above it."""
        height, width = self.size
        plain = f"{self.plain.parameters / 1e6:.2f} M parameters, {self.plain.flops / 1e9:.1f} GFLOPs"
        if self.seconds is not None:
            plain += f", {1e3 * self.seconds:.0f} ms"
        lines = [
            f"DeepLabV3 {self.backbone}, output stride {self.output_stride}, one image of {height} × {width}"
            f"{'' if self.seconds is None else f', {self.where}'}. Without any of these, with the skip joined by "
            f"addition: {plain}. FLOPs are two per multiply-add.",
            "",
            "| block | where | parameters | MFLOPs |" + ("" if self.seconds is None else " ms | % of the time |"),
            "| --- | --- | ---: | ---: |" + ("" if self.seconds is None else " ---: | ---: |"),
        ]
        for price in self.prices:
            cells = [
                f"`{price.item.name}`",
                f"`{price.item.place}`",
                f"{price.parameters:+,}",
                _signed(price.flops / 1e6, digits=3),
            ]
            if price.seconds is not None and self.seconds is not None:
                cells += [_signed(1e3 * price.seconds, digits=2), _signed(100 * price.seconds / self.seconds, digits=2)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def price_list(
    backbone: str = "resnet50",
    size: tuple[int, int] = (513, 513),
    positions: Sequence[str] = ("aspp",),
    output_stride: int = 16,
    num_classes: int = 21,
    repeats: int = 5,
    device: str | torch.device = "cpu",
) -> PriceList:
    """Price every attention block at some positions, every fusion, and attention pooling.

    Args:
        backbone: See `DeepLabV3`.
        size: Height and width of the image.
        positions: Positions of `attention`.
        output_stride: See `DeepLabV3`.
        num_classes: See `DeepLabV3`.
        repeats: Forwards that time is the median of; 0 leaves time out.
        device: Where time is measured.

    Raises:
        InputError: If this machine has no such device.
        ValueError: For a position or backbone that does not exist, or numbers out of their range.
    """
    if repeats < 0:
        raise ValueError(f"repeats must not be negative, got {repeats}")
    items = price_items(positions)
    network = {"backbone": backbone, "output_stride": output_stride, "num_classes": num_classes, "fusion": "add"}
    plain, added = _count(network, items, size)
    place = resolve_device(device)
    timings = _time(network, items, torch.zeros(1, 3, *size, device=place), repeats) if repeats else None
    return PriceList(
        backbone=backbone,
        output_stride=output_stride,
        size=size,
        plain=plain,
        seconds=None if timings is None else timings[0],
        where=describe_device(place),
        prices=[
            Price(item, cost.parameters, cost.flops, None if timings is None else timings[1][index])
            for index, (item, cost) in enumerate(zip(items, added, strict=True))
        ],
    )


def price_items(positions: Sequence[str]) -> list[Item]:
    """List what there is to price: `ATTENTION` at each position, `FUSION` for skips and blocks, attention pooling.

    Raises:
        ValueError: For a position that does not exist.
    """
    for position in positions:
        if position not in ATTENTION_POSITIONS:
            raise ValueError(unknown_message("attention position", position, ATTENTION_POSITIONS))
    blocks = [Item(name, position) for position in positions for name in ATTENTION]
    fusions = [Item(name, "fusion") for name in FUSION if name != "add"]
    # A residual block keeps its channels, so nothing is concatenated there.
    residual = [Item(name, "residual_fusion") for name in FUSION if name not in ("add", "concat")]
    return [*blocks, *fusions, *residual, Item("attention", "image_pooling")]


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward, medians.

    Attributes:
        whole: Of the whole model.
        parts: Of the modules that were asked for, together.
    """

    whole: float
    parts: float


def forward_seconds(
    models: Sequence[nn.Module], image: Tensor, parts: Sequence[Sequence[str]], repeats: int
) -> list[Timing]:
    """Time forwards of several models in turn, so that a machine that slows down slows all of them.

    Args:
        models: In the mode and on the device in which they are to be timed.
        image: What each of them is called with.
        parts: For each model, the names of the modules that are timed within it; none inside another.
        repeats: Forwards of each, at least 1, after one that is not counted.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(1 + positive_int("repeats", repeats)):
        for model, names, taken in zip(models, parts, seconds, strict=True):
            with torch.inference_mode(), _part_clock(model, names) as clock:
                start = _now(image.device)
                model(image)
                taken.append((_now(image.device) - start, sum(clock)))
    counted = [taken[1:] for taken in seconds]
    return [
        Timing(statistics.median(whole for whole, _ in taken), statistics.median(part for _, part in taken))
        for taken in counted
    ]


def attention_modules(model: DeepLabV3, position: str) -> list[str]:
    """Return the names of the modules at a position of `attention`, whether something stands there or not."""
    if position == "blocks":
        return _block_modules(model, "attention")
    if position in NOMINAL_STRIDES:
        return [f"backbone.attention.{position}"]
    if position == "skip":
        return [f"decoder.skips.{index}.attention" for index in range(len(model.decoder.skips))]
    return [f"{position}_attention"]


def describe_device(device: torch.device) -> str:
    """Say what time is measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()} with {threads} thread{'s' * (threads > 1)}"


def _count(network: Mapping[str, Any], items: Sequence[Item], size: tuple[int, int]) -> tuple[Cost, list[Cost]]:
    """What the plain network costs, and what each item adds; on shapes alone."""
    by_place: dict[str, list[Item]] = {}
    for item in items:
        by_place.setdefault(item.place, []).append(item)
    costs: dict[str, Cost] = {}
    # Each network holds one item at every place: a summary tells them apart.
    for together in zip_longest(*by_place.values()):
        arguments: dict[str, Any] = {**network, "attention": {}}
        for item in filter(None, together):
            if item.place in ATTENTION_POSITIONS:
                arguments["attention"][item.place] = item.name
            else:
                arguments[item.place] = item.name
        with torch.device("meta"):
            summary = summarize(DeepLabV3(**arguments), *size)
        costs |= {cost.name: cost for cost in summary.additions}
    return summary.plain, [costs[item.label] for item in items]


def _time(network: Mapping[str, Any], items: Sequence[Item], image: Tensor, repeats: int) -> tuple[float, list[float]]:
    """Seconds of the plain network, and those that each item adds: of its parts, with it and without it, in turns."""

    def build(arguments: Mapping[str, Any]) -> DeepLabV3:
        return DeepLabV3(**{**network, **arguments}).eval().to(image.device)

    plain = build({})
    wholes, added = [], []
    for item in items:
        models = [build(item.arguments), plain]
        with_it, without = forward_seconds(models, image, [item.parts(model) for model in models], repeats)
        wholes.append(without.whole)
        added.append(with_it.parts - without.parts)
    return statistics.median(wholes), added


def _block_modules(model: DeepLabV3, child: str) -> list[str]:
    return [
        f"backbone.{stage}.{index}.{child}"
        for stage in NOMINAL_STRIDES
        for index in range(len(model.backbone.get_submodule(stage)))  # type: ignore[arg-type]
    ]


@contextmanager
def _part_clock(model: nn.Module, names: Sequence[str]) -> Iterator[list[float]]:
    """Collect the seconds spent in each call of the named modules."""
    taken: list[float] = []
    starts: list[float] = []

    def begin(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        starts.append(_now(args[0].device))

    def end(_: nn.Module, args: Any, output: Tensor) -> None:
        taken.append(_now(output.device) - starts.pop())

    modules = [model.get_submodule(name) for name in names]
    handles = [module.register_forward_pre_hook(begin) for module in modules]
    handles += [module.register_forward_hook(end) for module in modules]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _signed(value: float, digits: int) -> str:
    """A number with its sign and so many significant digits: a price is what is added."""
    if value == 0:
        return "0"
    whole = abs(value) >= 10 ** (digits - 1)
    magnitude = f"{abs(value):,.0f}" if whole else f"{abs(value):#.{digits}g}".rstrip(".")
    return f"{'+' if value > 0 else '−'}{magnitude}"
