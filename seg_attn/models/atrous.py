"""The atrous plan: which stride and which dilation every convolution of a ResNet gets at an output stride.

Papers: DeepLabv3 (Chen 2017, arXiv 1706.05587) for output stride and multi-grid; the exact form is the à trous
algorithm (Holschneider 1990; Chen 2015, arXiv 1412.7062): after a stride is removed, everything that used to work on
the coarser grid is dilated by that stride, and nothing before it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

OUTPUT_STRIDES = (8, 16, 32)
STAGE_STRIDES = (1, 2, 2, 2)
STEM_STRIDE = 4


@dataclass(frozen=True)
class BlockLayout:
    """Where a residual block has its kernels and its stride.

    Attributes:
        kernels: Kernel size of each convolution of the branch, in order: (1, 3, 1) for a bottleneck.
        strided: Index of the convolution that carries the stride of a stage's first block. 1 for torchvision's
            bottleneck, 0 for a basic block and for the Caffe-style SE-ResNets (whose 1x1 strides).
        shortcut_kernel: Kernel size of the first block's projection shortcut: 1, or 3 in SENet-154.
    """

    kernels: tuple[int, ...]
    strided: int
    shortcut_kernel: int = 1


@dataclass(frozen=True)
class ConvRate:
    """Stride and dilation of one convolution, and the stride of the grid it reads, in pixels of the image."""

    stride: int
    dilation: int
    grid: int

    @property
    def effective_rate(self) -> int:
        """Distance between neighbouring taps in pixels of the image: dilation x grid."""
        return self.dilation * self.grid


@dataclass(frozen=True)
class BlockRates:
    """The plan of one residual block.

    Attributes:
        name: The block's name in the backbone, for example `layer4.0`.
        convs: One entry per convolution of the branch, 1x1 ones included (always dilation 1).
        kernels: Their kernel sizes.
        shortcut: What the block's projection shortcut gets, where it has one.
    """

    name: str
    convs: tuple[ConvRate, ...]
    kernels: tuple[int, ...]
    shortcut: ConvRate

    @property
    def spatial(self) -> tuple[ConvRate, ...]:
        """The convolutions that have a neighbourhood: one in a bottleneck, two in a basic block."""
        return tuple(conv for conv, kernel in zip(self.convs, self.kernels, strict=True) if kernel > 1)

    @property
    def stride(self) -> int:
        """Stride of the block as a whole."""
        return max(conv.stride for conv in self.convs)

    @property
    def dilation(self) -> int:
        """Dilation of the block's last 3x3 convolution: the rate of everything after a removed stride."""
        return self.spatial[-1].dilation

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each 3x3 convolution."""
        return tuple(conv.dilation for conv in self.spatial)

    @property
    def effective_rate(self) -> int:
        """Distance in pixels of the image between neighbouring taps of the last 3x3 convolution.

        In the exact form without multi-grid it is the same at every output stride, and with multi-grid at 8 and 16:
        the convolution sees the same places, only its output is denser.
        """
        return self.spatial[-1].effective_rate


class DilationPlan(tuple[BlockRates, ...]):
    """A sequence of `BlockRates`, one per residual block, that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("block", "stride", "dilation", "effective rate (px)")]
        rows += [
            (block.name, str(block.stride), ", ".join(map(str, block.dilations)), str(block.effective_rate))
            for block in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def check_output_stride(output_stride: int) -> int:
    """Return `output_stride` if it is 8, 16 or 32.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(output_stride, int) or output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
    return output_stride


def resolve_multi_grid(multi_grid: str | Sequence[int] | None, last_stage_blocks: int) -> tuple[int, ...] | None:
    """Turn the `multi_grid` argument into one unit rate per block of the last stage, or None for no multi-grid.

    "auto" doubles from block to block: (1, 2, 4) for three blocks as in DeepLabv3, (1, 2) for two.

    Raises:
        ValueError: If the number of rates is not the number of blocks, or a rate is not a positive integer.

    Examples:
        >>> resolve_multi_grid("auto", 3)
        (1, 2, 4)
        >>> resolve_multi_grid(None, 3) is None
        True
    """
    if multi_grid is None:
        return None
    if multi_grid == "auto":
        return tuple(1 << block for block in range(last_stage_blocks))
    if isinstance(multi_grid, str | int):
        raise ValueError(f"multi_grid must be 'auto', None or a list of unit rates, got {multi_grid!r}")
    rates = tuple(multi_grid)
    if any(isinstance(rate, bool) or not isinstance(rate, int) or rate < 1 for rate in rates):
        raise ValueError(f"multi_grid must hold positive integers, got {list(rates)}")
    if len(rates) != last_stage_blocks:
        raise ValueError(
            f"multi_grid needs one rate for each of the {last_stage_blocks} blocks of the last stage, "
            f"got {len(rates)}: {list(rates)}"
        )
    return rates


def atrous_plan(
    blocks: Sequence[int],
    layout: BlockLayout,
    output_stride: int,
    multi_grid: str | Sequence[int] | None = None,
    contract_dilation: bool = True,
) -> DilationPlan:
    """Derive stride and dilation of every convolution of a four-stage residual network.

    A stage whose stride would take the grid past `output_stride` keeps the grid instead, and what follows is dilated
    by the stride removed so far (the base rate). With `contract_dilation`, the convolution that carried the removed
    stride, and what comes before it in that block, still reads the grid it always read and so keeps the previous rate:
    then features at stride 8, subsampled, equal those at 16. Multi-grid multiplies the base rate of the last stage,
    block by block, on its 3x3 convolutions (DeepLabv3, section 3.2.1).

    Args:
        blocks: Number of residual blocks of each of the four stages, for example (3, 4, 6, 3).
        layout: Kernels and stride position of a block.
        output_stride: 8, 16 or 32.
        multi_grid: One unit rate per block of the last stage, "auto" (see `resolve_multi_grid`), or None.
        contract_dilation: False dilates the whole of a de-strided stage, as SMP does.

    Returns:
        One entry per block, in order.

    Raises:
        ValueError: If `output_stride` is not 8, 16 or 32, or `multi_grid` does not fit the last stage.

    Examples:
        >>> bottleneck = BlockLayout(kernels=(1, 3, 1), strided=1)
        >>> plan = atrous_plan((3, 4, 6, 3), bottleneck, output_stride=8, multi_grid=(1, 2, 4))
        >>> [block.dilation for block in plan[-4:]]
        [2, 4, 8, 16]
        >>> [block.dilation for block in atrous_plan((3, 4, 6, 3), bottleneck, output_stride=8)[-4:]]
        [2, 2, 4, 4]
    """
    check_output_stride(output_stride)
    last_rates = resolve_multi_grid(multi_grid, blocks[-1])
    plan = []
    grid, rate = STEM_STRIDE, 1  # of what a stage reads: its stride in the image, and the stride removed so far
    for stage, (count, nominal) in enumerate(zip(blocks, STAGE_STRIDES, strict=True), start=1):
        stride = nominal if grid * nominal <= output_stride else 1
        rate_before, rate = rate, rate * nominal // stride
        # The one place where the exact form and the dilation of a whole stage differ.
        entry_rate = rate_before if contract_dilation else rate
        unit_rates = last_rates if stage == len(blocks) else None
        for block in range(count):
            first = block == 0
            own_rate = rate * unit_rates[block] if unit_rates else rate
            plan.append(
                _block_rates(
                    name=f"layer{stage}.{block}",
                    layout=layout,
                    stride=stride if first else 1,
                    grid=grid if first else grid * stride,
                    entry_rate=entry_rate if first and not unit_rates else own_rate,
                    rate=own_rate,
                    shortcut_rate=entry_rate,
                )
            )
        grid *= stride
    return DilationPlan(plan)


def _block_rates(
    name: str, layout: BlockLayout, stride: int, grid: int, entry_rate: int, rate: int, shortcut_rate: int
) -> BlockRates:
    """Plan a block that reads `grid`: `entry_rate` up to and with the convolution that strides, `rate` after it."""
    convs = []
    for index, kernel in enumerate(layout.kernels):
        entry = index <= layout.strided
        dilation = entry_rate if entry else rate
        convs.append(
            ConvRate(
                stride=stride if index == layout.strided else 1,
                dilation=dilation if kernel > 1 else 1,
                grid=grid if entry else grid * stride,
            )
        )
    shortcut = ConvRate(stride=stride, dilation=shortcut_rate if layout.shortcut_kernel > 1 else 1, grid=grid)
    return BlockRates(name=name, convs=tuple(convs), kernels=layout.kernels, shortcut=shortcut)


def scale_atrous_rates(atrous_rates: Sequence[float], output_stride: int) -> tuple[int, ...]:
    """ASPP's rates at an output stride, from those at output stride 16: doubled at 8, halved at 32 (DeepLabv3, 4.1).

    A rate that does not come out whole is rounded half up: see `unscalable_rates`.

    Args:
        atrous_rates: Rates at output stride 16. Halves are allowed, for networks that ran odd rates at 8.
        output_stride: 8, 16 or 32.

    Raises:
        ValueError: If a rate is not positive or not a multiple of one half.

    Examples:
        >>> scale_atrous_rates((6, 12, 18), 8)
        (12, 24, 36)
        >>> scale_atrous_rates((6, 12, 18), 32)
        (3, 6, 9)
    """
    check_output_stride(output_stride)
    if not atrous_rates or not all(map(_is_rate, atrous_rates)):
        raise ValueError(f"atrous_rates must be positive integers (rates at output stride 16), got {atrous_rates!r}")
    return tuple(max(1, math.floor(rate * 16 / output_stride + 0.5)) for rate in atrous_rates)


def unscalable_rates(atrous_rates: Sequence[float], output_stride: int) -> tuple[float, ...]:
    """Those of the rates at output stride 16 that are not whole at `output_stride`: odd ones at 32, halves at 16.

    Their branch looks at slightly other places there (a rate of 7 becomes 4 instead of 3.5 at 32), so logits at that
    stride are not those of the same function on a coarser grid.

    Examples:
        >>> unscalable_rates((6, 7, 18), 32)
        (7,)
        >>> unscalable_rates((6, 7, 18), 8)
        ()
    """
    return tuple(rate for rate in atrous_rates if not float(rate * 16 / output_stride).is_integer())


def _is_rate(rate: object) -> bool:
    return isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0 and float(rate * 2).is_integer()
