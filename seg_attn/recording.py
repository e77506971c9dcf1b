"""What a model attends to: every gate, the self-attention of one pixel and the stages' feature maps, of one forward.

The blocks end the computation of their weights in a `Gate`, which a forward hook sees; self-attention never holds its
weights, so the row of the chosen pixel is computed beside the forward. Nothing of the model changes: with the recording
the outputs are the same to the bit, and the hooks are gone when the `with` block ends, however it ends.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seg_attn.attention.arguments import unknown_message
from seg_attn.attention.cbam import ChannelAttention, SpatialAttention
from seg_attn.attention.gate import Gate, GateKind
from seg_attn.attention.join import Blend
from seg_attn.attention.pooling import PositionSoftmax
from seg_attn.attention.self_attention import SelfAttention
from seg_attn.models.backbone import NOMINAL_STRIDES
from seg_attn.models.deeplabv3 import DeepLabV3

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class GateRecord:
    """The weights of one gate.

    Attributes:
        name: The gate's module name in the model, such as ``decoder.skips.0.fusion.gate``.
        kind: What the weights weigh; their shape follows from it (see `Gate`).
        block: The class of the block that it belongs to, such as "CBAM".
        weights: In [0, 1], detached, on the model's device.
        strength: α of a block with `identity_init`: the block computes x + α · (f(x) − x), so that at 0 its gate is
            without effect. None where f(x) takes the place of x.
        over_positions: Whether the weights are shares that sum to 1 over the positions (attention pooling); elsewhere
            each weight stands for itself.
    """

    name: str
    kind: GateKind
    block: str
    weights: Tensor
    strength: float | None = None
    over_positions: bool = False

    def position_map(self) -> Tensor:
        """Return the weights as one map, their mean over channels: float (N, H, W).

        Raises:
            ValueError: If the gate's weights do not differ between positions ("channel" and "branch").
        """
        if self.kind in ("channel", "branch"):
            raise ValueError(f"{self.name} is a {self.kind} gate: its weights have no positions")
        return self.weights.mean(1)


@dataclass(frozen=True)
class AttentionRow:
    """Where one position of a self-attention block looks.

    Attributes:
        name: The block's module name in the model.
        weights: (N, heads, H, W), in [0, 1], summing to 1 over the positions.
        row: The position that looks, 0 to H − 1.
        column: Likewise, 0 to W − 1.
        gamma: γ of the block, x + γ · attended: at 0 the attention is without effect.
        strength: α of a block with `identity_init`, as in `GateRecord`.
    """

    name: str
    weights: Tensor
    row: int
    column: int
    gamma: float
    strength: float | None = None


@dataclass
class Recording:
    """What one forward of a model showed. It is filled when the model is called, and anew at the next call.

    Attributes:
        gates: By module name, in the order in which they were computed. A gate that is computed several times in one
            forward (a shared module) has further entries ``name#2``, ``name#3``, ...
        rows: The self-attention blocks, by module name, likewise.
        features: The feature maps, float (N, C, H, W), by the names they were asked for.
    """

    gates: dict[str, GateRecord] = field(default_factory=dict)
    rows: dict[str, AttentionRow] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)

    def of_kind(self, *kinds: GateKind) -> list[GateRecord]:
        """Return the gates of these kinds, in the order in which they were computed."""
        return [gate for gate in self.gates.values() if gate.kind in kinds]

    def clear(self) -> None:
        """Forget everything."""
        self.gates.clear()
        self.rows.clear()
        self.features.clear()


@contextmanager
def record_gates(
    model: nn.Module, point: tuple[float, float] = CENTRE, features: Mapping[str, str] | Iterable[str] | None = None
) -> Iterator[Recording]:
    """Record what a model attends to while the `with` block lasts.

    Works on `DeepLabV3` and on any module that holds our blocks. Outputs and gradients of the model stay what they are.

    Args:
        model: The module that is called inside the block.
        point: The position whose self-attention is recorded, (x, y) as shares of width and height in [0, 1]; the centre
            unless given.
        features: Modules whose outputs are recorded: their names, or a mapping from names of your own to module names.
            None takes `stage_modules(model)`: the stages of a `DeepLabV3`, nothing of other models.

    Yields:
        The recording, empty until the model is called.

    Raises:
        ValueError: If `point` lies outside [0, 1], or `features` names a module that the model does not have.

    Examples:
        >>> from seg_attn.attention import build_attention
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), build_attention("cbam", 8))
        >>> with record_gates(model) as recording:
        ...     _ = model(torch.zeros(1, 3, 5, 7))
        >>> {name: tuple(gate.weights.shape) for name, gate in recording.gates.items()}
        {'1.channel.gate': (1, 8, 1, 1), '1.spatial.gate': (1, 1, 5, 7)}
    """
    if not all(0 <= share <= 1 for share in point):
        raise ValueError(f"point must be (x, y) as shares of width and height in [0, 1], got {point}")
    modules = dict(model.named_modules())
    wanted = stage_modules(model) if features is None else features
    wanted = dict(wanted) if isinstance(wanted, Mapping) else {name: name for name in wanted}
    for name in wanted.values():
        if name not in modules:
            raise ValueError(unknown_message("module", name, modules))
    recording = Recording()
    handles: list[RemovableHandle] = []
    try:
        handles.append(model.register_forward_pre_hook(lambda *_: recording.clear()))
        for name, module in modules.items():
            if isinstance(module, Gate):
                handles.append(module.register_forward_hook(_gate_hook(recording, name, _block_of(modules, name))))
            if isinstance(module, SelfAttention):
                handles.append(module.register_forward_hook(_row_hook(recording, name, point), with_kwargs=True))
        for label, name in wanted.items():
            handles.append(modules[name].register_forward_hook(_feature_hook(recording, label)))
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def stage_modules(model: nn.Module) -> dict[str, str]:
    """Return the modules whose outputs are the stages of the (first) `DeepLabV3` in a model, by the stages' names.

    They are ``layer1`` to ``layer4``, ``aspp`` and ``decoder``, each with the attention at that position; the names are
    those of the positions in `DeepLabV3`'s `attention`.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, DeepLabV3):
            dot = f"{prefix}." if prefix else ""
            stages = {stage: f"{dot}backbone.attention.{stage}" for stage in NOMINAL_STRIDES}
            return {**stages, "aspp": f"{dot}aspp_attention", "decoder": f"{dot}decoder_attention"}
    return {}


def position_of(point: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    """Return (row, column) of the position of a map that covers a point of the image, (x, y) in [0, 1].

    Examples:
        >>> position_of((0.5, 0.0), height=3, width=4), position_of((1.0, 1.0), height=3, width=4)
        ((0, 2), (2, 3))
    """
    x, y = point
    return min(int(y * height), height - 1), min(int(x * width), width - 1)


def _gate_hook(recording: Recording, name: str, block: nn.Module) -> Callable[..., None]:
    join = getattr(block, "join", None)

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(module, Gate)
        key = _free_key(recording.gates, name)
        recording.gates[key] = GateRecord(
            name=key,
            kind=module.kind,
            block=type(block).__name__,
            weights=output.detach(),
            strength=float(join.alpha.detach()) if isinstance(join, Blend) else None,
            over_positions=isinstance(module[0], PositionSoftmax),
        )

    return record


def _row_hook(recording: Recording, name: str, point: tuple[float, float]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        assert isinstance(module, SelfAttention)
        x: Tensor = args[0] if args else kwargs["x"]
        row, column = position_of(point, *x.shape[-2:])
        with torch.no_grad():
            weights = module.attention_row(x, row, column)
        key = _free_key(recording.rows, name)
        alpha = float(module.join.alpha.detach()) if isinstance(module.join, Blend) else None
        gamma = float(module.gamma.detach())
        recording.rows[key] = AttentionRow(key, weights.detach(), row, column, gamma, alpha)

    return record


def _feature_hook(recording: Recording, label: str) -> Callable[..., None]:
    def record(_: nn.Module, args: Any, output: Tensor) -> None:
        # A copy: what follows may work in place.
        recording.features[label] = output.detach().clone()

    return record


def _block_of(modules: Mapping[str, nn.Module], gate: str) -> nn.Module:
    """The block that a gate belongs to: CBAM has its two in halves of their own, all others directly inside."""
    parent = modules[gate.rpartition(".")[0]]
    if isinstance(parent, ChannelAttention | SpatialAttention):
        return modules[gate.rpartition(".")[0].rpartition(".")[0]]
    return parent


def _free_key(taken: Mapping[str, Any], name: str) -> str:
    number = 2
    key = name
    while key in taken:
        key = f"{name}#{number}"
        number += 1
    return key
