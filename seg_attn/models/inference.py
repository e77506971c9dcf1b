"""The same network, faster on a processor: for prediction alone.

Three exact identities, each equal to the network up to rounding:

- batch normalisation in eval mode is an affine map per channel, and is folded into the convolution before it;
- in bfloat16, a 3x3 convolution at a large rate is nine products of matrices, one per tap, each over the positions at
  which the tap lies inside the map (at rate 36 on a map of 45 x 60, seven tenths of the taps lie on the padding): there
  the library's own convolution finds no fast kernel, and takes ten to thirty times as long;
- in float32, a 3x3 convolution at a small rate is computed by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray
  2016, arXiv 1509.09308): 36 multiplications per 16 outputs instead of 144. A rate d makes d x d interleaved maps of
  rate 1.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from seg_attn.fusion import Add
from seg_attn.models.backbone import AtrousBackbone
from seg_attn.models.deeplabv3 import DeepLabV3

# From this rate on, convolutions in bfloat16 are products of matrices.
_LARGE_RATE = 6
# With fewer channels, Winograd's transforms cost more than they save.
_WINOGRAD_CHANNELS = 128
# Elements of the transformed map above which the plain convolution is taken: 256 MB of float32.
_WINOGRAD_ELEMENTS = 1 << 26
# From this many weights on, a 1x1 convolution in bfloat16 is faster as a product of matrices.
_PRODUCT_WEIGHTS = 1 << 20

# The matrices of F(4x4, 3x3), Lavin & Gray section 4.2: input, filter and output transform.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def optimized(model: DeepLabV3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a network with the logits of `model` up to rounding, as float32; `model` stays as it is.

    Args:
        model: The network, in eval mode. What is changed in it later does not reach the copy.
        dtype: float32 or bfloat16, which weights and features then have. Logits are resized in float32.

    Returns:
        Maps `dtype` (N, in_channels, H, W) to logits, float32 (N, num_classes, H, W).
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(network.modules()):
        _fold(module)
        if hasattr(module, "set_rates") and type(module._modules.get("fusion")) is Add:
            module.fusion = _AddInto()
    on_processor = next(network.parameters()).device.type == "cpu"
    if on_processor:
        _replace_convolutions(network, dtype)
    network = network.to(dtype=dtype)
    network = network.to(memory_format=torch.channels_last)
    network.classifier = _Float32(network.classifier)  # type: ignore[assignment]  # a Conv2d, but for its dtype
    return network


class _Float32(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x)
        return output.float().contiguous()  # class by class, as the arg max reads what is resized from it


class _AddInto(nn.Module):
    """A residual sum in the memory of the branch, which nothing else reads."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y.add_(x)


class PointwiseConv(nn.Module):
    """A 1x1 convolution as a product of matrices.

    Args:
        conv: The convolution: 1x1, stride 1, one group.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.flatten(1), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W)."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class TapConv(nn.Module):
    """A 3x3 convolution as nine products of matrices that leave out the padding.

    Args:
        conv: The convolution: 3x3, stride 1, one group, padded by its dilation.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.rate = conv.dilation[0]
        taps = conv.weight.permute(2, 3, 1, 0).contiguous()  # (3, 3, C, K)
        self.taps = nn.Parameter(taps, requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H, W); sums are kept in float32."""
        maps = x.permute(0, 2, 3, 1).contiguous()  # (N, H, W, C)
        height, width = maps.shape[1:3]
        output = torch.matmul(maps, self.taps[1, 1]).float()
        if self.bias is not None:
            output += self.bias
        for column in range(3):
            right = (column - 1) * self.rate
            left, end = max(0, right), min(width, width + right)
            if left >= end:
                continue
            beside = maps[:, :, left:end].contiguous()
            for row in range(3):
                down = (row - 1) * self.rate
                top, bottom = max(0, down), min(height, height + down)
                if top >= bottom or (row, column) == (1, 1):
                    continue
                for index, image in enumerate(beside):  # rows of one image lie in one piece
                    output[index, top - down : bottom - down, left - right : end - right] += torch.matmul(
                        image[top:bottom], self.taps[row, column]
                    )
        return output.to(x.dtype).permute(0, 3, 1, 2)


class WinogradConv(nn.Module):
    """A 3x3 convolution by minimal filtering, F(4x4, 3x3).

    Args:
        conv: The convolution: 3x3, stride 1, one group, padded by its dilation.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.rate = conv.dilation[0]
        filter_transform = torch.tensor(_FILTER, dtype=torch.float64)
        weight = conv.weight.detach().double()
        transformed = torch.einsum("ai,kcij,bj->abck", filter_transform, weight, filter_transform).flatten(0, 1)
        self.register_buffer("weight", transformed.float().contiguous())  # (36, C, K)
        for name, matrix in (("input_transform", _INPUT), ("output_transform", _OUTPUT)):
            one = torch.tensor(matrix, dtype=torch.float32)
            self.register_buffer(name, torch.kron(one, one))

    weight: Tensor
    input_transform: Tensor
    output_transform: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 (N, C, H, W) to (N, K, H, W)."""
        count, channels, height, width = x.shape
        rate, (_, _, outputs) = self.rate, self.weight.shape
        step = 4 * rate
        rows, columns = (-(-side // step) for side in (height, width))  # tiles of each interleaved map
        tiles = count * rate * rate * rows * columns
        if 36 * tiles * max(channels, outputs) > _WINOGRAD_ELEMENTS:
            output: Tensor = self.conv(x)
            return output
        below, right = rate * (4 * rows + 1) - height, rate * (4 * columns + 1) - width
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, rate, right, rate, below)).contiguous()
        per_image, per_row, per_column, _ = padded.stride()
        windows = padded.as_strided(
            (6, 6, count, rate, rate, rows, columns, channels),
            (rate * per_row, rate * per_column, per_image, per_row, per_column, step * per_row, step * per_column, 1),
        )
        seen = self.input_transform @ windows.reshape(36, tiles * channels)
        product = torch.bmm(seen.view(36, tiles, channels), self.weight)
        blocks = (self.output_transform @ product.view(36, -1)).view(4, 4, count, rate, rate, rows, columns, outputs)
        output = x.new_empty((count, rows, 4, rate, columns, 4, rate, outputs))
        output.copy_(blocks.permute(2, 5, 0, 3, 6, 1, 4, 7))
        output = output.view(count, 4 * rate * rows, 4 * rate * columns, outputs)[:, :height, :width]
        output = output.contiguous() if self.conv.bias is None else output + self.conv.bias
        return output.permute(0, 3, 1, 2)


def _fold(module: nn.Module) -> None:
    """Fold the batch normalisations among a module's children into the convolutions that they follow."""
    children = module._modules
    if type(module).forward is nn.Sequential.forward:
        names = list(children)
        pairs = list(pairwise(names))
    elif isinstance(module, AtrousBackbone) or hasattr(module, "set_rates"):  # a residual block, or the stem
        pairs = [(f"conv{index}", f"bn{index}") for index in (1, 2, 3)]
    else:
        return
    for first, second in pairs:
        conv, norm = children.get(first), children.get(second)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            children[first] = fuse_conv_bn_eval(conv, norm)
            children[second] = nn.Identity()


def _replace_convolutions(network: nn.Module, dtype: torch.dtype) -> None:
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.Conv2d):
                module._modules[name] = _faster(child, dtype)


def _faster(conv: nn.Conv2d, dtype: torch.dtype) -> nn.Module:
    """Return what computes a convolution faster; itself where nothing does."""
    facts: tuple[Any, ...] = (conv.stride, conv.groups, conv.padding_mode)
    if facts != ((1, 1), 1, "zeros"):
        return conv
    rate = conv.dilation[0]
    if conv.kernel_size == (1, 1) and dtype is torch.bfloat16 and conv.weight.numel() >= _PRODUCT_WEIGHTS:
        return PointwiseConv(conv)
    if conv.kernel_size != (3, 3) or conv.dilation != (rate, rate) or conv.padding != (rate, rate):
        return conv
    if dtype is torch.bfloat16:
        return TapConv(conv) if rate >= _LARGE_RATE else conv
    is_wide = min(conv.in_channels, conv.out_channels) >= _WINOGRAD_CHANNELS
    return WinogradConv(conv) if is_wide and rate < _LARGE_RATE else conv
