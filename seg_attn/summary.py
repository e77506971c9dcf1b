"""What a network is made of and what it costs: dilation plan, parameters and FLOPs per part, the price of attention.

FLOPs are those of PyTorch's counter (`torch.utils.flop_counter`): two per multiply-add of convolutions and matrix
products, nothing for additions, normalisation, activation and resizing. Half of it are the MACs other tools print.
They are counted on shapes alone, so that a summary takes neither memory nor time of a forward pass.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seg_attn.attention.arguments import positive_int
from seg_attn.models.atrous import DilationPlan
from seg_attn.models.backbone import NOMINAL_STRIDES
from seg_attn.models.deeplabv3 import ATTENTION_POSITIONS, DeepLabV3

AUX_HEAD = "aux head (training only)"
PLAIN: Mapping[str, Any] = {
    "attention": None,
    "residual_fusion": "add",
    "fusion": "add",
    "skip_channels": None,
    "image_pooling": "average",
}


@dataclass(frozen=True)
class Cost:
    """Parameters and FLOPs (of one image) of a part, or of what a part adds.

    Attributes:
        name: The part.
        parameters: Their number.
        flops: Two per multiply-add.
        latency_ms: Median milliseconds, or None where they were not measured.
    """

    name: str
    parameters: int
    flops: int
    latency_ms: float | None = None


@dataclass(frozen=True)
class Summary:
    """The figures of a network at an image size; prints as tables, and `as_dict` is for JSON.

    Attributes:
        backbone: Name of the backbone.
        num_classes: Classes of the logits.
        output_stride: 8, 16 or 32.
        image_size: Height and width of the image.
        map_size: Height and width of the backbone's last map.
        dilation_plan: Stride, dilation and effective rate per residual block.
        atrous_rates: ASPP's rates at this output stride.
        oversized_rates: Those that see nothing but their centre on this map.
        parts: Cost per part. Every parameter is in one of them.
        total: Cost of the whole; its FLOPs are those of inference, without the auxiliary head.
        plain: Cost of the same network without attention, with additions in the place of attentional fusion.
        additions: What each attention position and each fusion adds to `plain`, one at a time, and all of it together.
    """

    backbone: str
    num_classes: int
    output_stride: int
    image_size: tuple[int, int]
    map_size: tuple[int, int]
    dilation_plan: DilationPlan
    atrous_rates: tuple[int, ...]
    oversized_rates: tuple[int, ...]
    parts: tuple[Cost, ...]
    total: Cost
    plain: Cost
    additions: tuple[Cost, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return scalars, lists and dicts, for JSON."""
        plan = [
            {"name": b.name, "stride": b.stride, "dilation": list(b.dilations), "effective_rate": b.effective_rate}
            for b in self.dilation_plan
        ]
        return {
            "backbone": self.backbone,
            "num_classes": self.num_classes,
            "output_stride": self.output_stride,
            "image_size": list(self.image_size),
            "map_size": list(self.map_size),
            "dilation_plan": plan,
            "atrous_rates": list(self.atrous_rates),
            "oversized_rates": list(self.oversized_rates),
            "parts": [asdict(part) for part in self.parts],
            "total": asdict(self.total),
            "plain": asdict(self.plain),
            "additions": [asdict(addition) for addition in self.additions],
        }

    def __str__(self) -> str:
        sections = [self._head(), str(self.dilation_plan), self._aspp(), self._parts()]
        if self.additions:
            sections.append(self._additions())
        return "\n\n".join(sections)

    def _head(self) -> str:
        height, width = self.image_size
        rows, columns = self.map_size
        return (
            f"DeepLabV3 on {self.backbone}, {self.num_classes} classes, output stride {self.output_stride}: "
            f"image {height} x {width}, last map {rows} x {columns}"
        )

    def _aspp(self) -> str:
        said = f"ASPP rates at output stride {self.output_stride}: {', '.join(map(str, self.atrous_rates))}"
        if self.oversized_rates:
            rows, columns = self.map_size
            rates = ", ".join(map(str, self.oversized_rates))
            subject = f"rate {rates} is" if len(self.oversized_rates) == 1 else f"rates {rates} are"
            said += (
                f"\nwarning: {subject} as large as both sides of the "
                f"{rows} x {columns} map: a 3x3 kernel there\nsees nothing but its centre. "
                "Choose smaller atrous_rates, a larger image or a smaller output stride."
            )
        return said

    def _parts(self) -> str:
        rows = [
            (part.name, f"{part.parameters:,}", _share(part.parameters, self.total.parameters), *self._flops(part))
            for part in (*self.parts, self.total)
        ]
        table = _table(("part", "parameters", "%", "GFLOPs", "%"), rows, ruled_off=1)
        return f"{table}\nFLOPs of one image, two per multiply-add (GMACs are half: {self.total.flops / 2e9:,.2f})"

    def _flops(self, part: Cost) -> tuple[str, str]:
        share = "" if part.name == AUX_HEAD else _share(part.flops, self.total.flops)
        return _giga(part.flops), share

    def _additions(self) -> str:
        plain, timed = self.plain, self.plain.latency_ms is not None
        header = ["attention and fusion add", "parameters", "%", "GFLOPs", "%", *(("ms", "%") if timed else ())]
        rows = []
        for cost in (*self.additions, plain):
            sign = "" if cost is plain else "+"
            row = [cost.name, f"{cost.parameters:{sign},}", _share(cost.parameters, plain.parameters)]
            row += [_giga(cost.flops, sign), _share(cost.flops, plain.flops)]
            if cost.latency_ms is not None and plain.latency_ms is not None:
                row += [f"{cost.latency_ms:{sign},.1f}", _share(cost.latency_ms, plain.latency_ms)]
            rows.append(tuple(row))
        return _table(header, rows, ruled_off=1)


def _share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.1f}" if whole else ""


def _giga(flops: int, sign: str = "") -> str:
    return f"{flops / 1e9:{sign},.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], ruled_off: int) -> str:
    """Align columns, the first to the left and figures to the right; the last `ruled_off` rows stand below a rule."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = [
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in (header, *rows))
    ]
    return "\n".join([lines[0], rule, *lines[1 : len(lines) - ruled_off], rule, *lines[len(lines) - ruled_off :]])


def summarize(model: DeepLabV3, height: int = 513, width: int = 513, latency_runs: int = 0) -> Summary:
    """Count a network's parameters and FLOPs per part, and what its attention and fusion add.

    Args:
        model: The network; it is neither run nor changed.
        height: Height of the image.
        width: Width of the image.
        latency_runs: How often each variant (the plain network, it with one addition each, all together) is timed on
            the model's device, in turn; medians are given, for additions those of the differences within a turn. 0 is
            not at all: everything else is counted on shapes and takes about a second.

    Raises:
        ValueError: If a size is no integer of at least 1, or `latency_runs` is negative.
    """
    size = positive_int("height", height), positive_int("width", width)
    if latency_runs < 0:
        raise ValueError(f"latency_runs must not be negative, got {latency_runs!r}")
    variants = dict(_variants(model.config))
    times = _time(variants, size, latency_runs, next(model.parameters()).device) if latency_runs else {}
    costs = {name: _whole(name, _skeleton(config), size, _median(times.get(name))) for name, config in variants.items()}
    plain = costs["plain"]
    together = costs["together"]
    additions = [
        Cost(
            name,
            cost.parameters - plain.parameters,
            cost.flops - plain.flops,
            _median([one - other for one, other in zip(times[name], times["plain"], strict=True)] if times else None),
        )
        for name, cost in costs.items()
        if cost is not plain and (cost is not together or len(costs) > 3)  # one addition is all together
    ]
    return Summary(
        backbone=model.config["backbone"],
        num_classes=model.num_classes,
        output_stride=model.output_stride,
        image_size=size,
        map_size=(model.backbone.last_map_size(height), model.backbone.last_map_size(width)),
        dilation_plan=model.dilation_plan(),
        atrous_rates=model.aspp.rates,
        oversized_rates=model.oversized_rates(height, width),
        parts=tuple(_parts(model, size)),
        total=_whole("total", _shapes_only(model), size, together.latency_ms),
        plain=plain,
        additions=tuple(additions),
    )


# --- parts -----------------------------------------------------------------------------------------------------------


def part_of(module: str) -> str:
    """Name the part that a module of `DeepLabV3` belongs to.

    Examples:
        >>> part_of("backbone.layer3.5.conv2"), part_of("backbone.layer3.5.attention.fc1")
        ('layer3', 'attention: blocks')
        >>> part_of("decoder.skips.0.fusion.local_att.0"), part_of("decoder_attention")
        ('fusion of skips', 'attention: decoder')
    """
    names = module.split(".")
    match names:
        case ["backbone", "attention", stage, *_]:
            return f"attention: {stage}"
        case ["backbone", _, _, "attention", *_]:
            return "attention: blocks"
        case ["backbone", _, _, "fusion", *_]:
            return "fusion of residuals"
        case ["backbone", stage, *_] if stage in NOMINAL_STRIDES:
            return stage
        case ["backbone", *_]:
            return "stem"
        case ["decoder", "skips", _, "attention", *_]:
            return "attention: skip"
        case ["decoder", "skips", _, "fusion", *_]:
            return "fusion of skips"
        case ["decoder", "skips", *_]:
            return "skips"
        case ["decoder", *_]:
            return "3x3 after ASPP"
        case ["aspp_attention" | "decoder_attention" as name, *_]:
            return f"attention: {name.removesuffix('_attention')}"
        case ["aux_classifier", *_]:
            return AUX_HEAD
        case ["aspp", *_]:
            return "ASPP"
    return names[0]


_ORDER = (
    "stem",
    *NOMINAL_STRIDES,
    "fusion of residuals",
    "ASPP",
    "3x3 after ASPP",
    "skips",
    "fusion of skips",
    *(f"attention: {position}" for position in ATTENTION_POSITIONS),
    "classifier",
    AUX_HEAD,
)


def _parts(model: DeepLabV3, size: tuple[int, int]) -> Iterator[Cost]:
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameters[part_of(name)] += parameter.numel()
    flops: Counter[str] = Counter()
    for name, count in _own_flops(_shapes_only(model), size).items():
        flops[part_of(name)] += count
    for name in _ORDER:
        # A part without either (an addition, an absent head) is no row.
        if parameters[name] or flops[name]:
            yield Cost(name, parameters[name], flops[name])


def _whole(name: str, skeleton: DeepLabV3, size: tuple[int, int], latency_ms: float | None) -> Cost:
    flops = _own_flops(skeleton, size)
    inference = sum(count for module, count in flops.items() if part_of(module) != AUX_HEAD)
    return Cost(name, sum(parameter.numel() for parameter in skeleton.parameters()), inference, latency_ms)


def _own_flops(skeleton: DeepLabV3, size: tuple[int, int]) -> dict[str, int]:
    """FLOPs of each module of a network on the meta device, without those of its children."""
    images = torch.empty(1, skeleton.config["in_channels"], *size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(images)
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    own = Counter(counts)
    for name, count in counts.items():
        # A ModuleList is never called, so the parent is the nearest module that was.
        parents = accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}")
        for parent in [parent for parent in parents if parent in counts][-1:]:
            own[parent] -= count
    flops = {name.partition(".")[2]: count for name, count in own.items() if "." in name}
    if skeleton.aux_classifier is not None:
        # Inference does without it, so it is counted by itself.
        with torch.no_grad():
            features = skeleton.backbone(images)
            with FlopCounterMode(display=False) as counter:
                skeleton.aux_classifier(features[2])
        flops["aux_classifier"] = counter.get_total_flops()
    return flops


def _shapes_only(model: DeepLabV3) -> DeepLabV3:
    """Return the model in eval mode on the meta device, without copying its tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _meta(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo).eval()


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


# --- what attention and fusion add -----------------------------------------------------------------------------------


def _variants(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield constructor arguments: plain, plain with one addition each, and all together."""
    plain = {**config, **PLAIN, "backbone_weights": None}
    yield "plain", plain
    if _named(config["residual_fusion"]) != "add":
        name = f"residual_fusion: {_named(config['residual_fusion'])}"
        yield name, {**plain, "residual_fusion": config["residual_fusion"]}
    if config["image_pooling"] != "average":
        yield f"image_pooling: {config['image_pooling']}", {**plain, "image_pooling": config["image_pooling"]}
    if config["skip_strides"] and _named(config["fusion"]) != "add":
        changed = {"fusion": config["fusion"], "skip_channels": config["skip_channels"]}
        yield f"fusion: {_named(config['fusion'])}", {**plain, **changed}
    for position, spec in (config["attention"] or {}).items():
        if spec is not None:
            yield f"attention: {position}: {_named(spec)}", {**plain, "attention": {position: spec}}
    yield "together", {**config, "backbone_weights": None}


def _named(spec: Any) -> str:
    if isinstance(spec, Mapping):
        return str(spec["name"])
    return spec if isinstance(spec, str) else ", ".join(map(_named, spec))


def _skeleton(config: Mapping[str, Any]) -> DeepLabV3:
    with torch.device("meta"):
        return DeepLabV3(**config).eval()


def _time(
    variants: Mapping[str, Mapping[str, Any]], size: tuple[int, int], runs: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each variant's runs. They take turns, so that a busy machine slows all of them alike."""
    networks = {name: DeepLabV3(**config).eval().to(device) for name, config in variants.items()}
    images = torch.zeros(1, networks["plain"].config["in_channels"], *size, device=device)
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for run in range(runs + 1):
            for name, network in networks.items():
                start = time.perf_counter()
                network(images)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if run:  # the first round warms up
                    times[name].append(1000 * (time.perf_counter() - start))
    return times


def _median(values: Sequence[float] | None) -> float | None:
    return None if values is None else statistics.median(values)
