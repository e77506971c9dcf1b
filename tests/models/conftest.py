"""What the tests of the network share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Randomise = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def randomise() -> Randomise:
    """Return a function that draws every parameter and statistic of a module, and puts it into eval mode.

    Kernels keep the variance of what passes; normalisations get scales, shifts and statistics unlike 1, 0, 0 and 1.
    """

    def draw(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(seed + 7)
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(1 + 0.2 * noise.clamp(-3, 3))
            elif tensor.ndim > 1:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.1 * noise)
        return module.eval()

    return draw


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Return a function that draws images, float64 (N, C, H, W)."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    """Return a function that measures max |actual - expected| / max |expected|."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    return measure
