"""Batch normalisation that also trains where it meets one value per channel.

`torch.nn.BatchNorm2d` raises in training when N·H·W = 1, since a single value has no variance. A pooled branch at
batch 1 (ASPP's image pooling, the global branches of MS-CAM, AFF, iAFF and SK) is such a place.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that falls back to its running statistics for one value per channel.

    In training with N·H·W = 1 the input is normalised with the running statistics, which are left unchanged, and so is
    `num_batches_tracked`; everywhere else, and in its state dict, it is PyTorch's own.

    Shape:
        - input: (N, C, H, W), any float dtype
        - output: (N, C, H, W)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (N, C, H, W) per channel."""
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


def use_single_value_batch_norm(module: nn.Module) -> nn.Module:
    """Turn every plain `torch.nn.BatchNorm2d` inside `module` into `BatchNorm2d`, in place; its state is untouched."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = BatchNorm2d
    return module
