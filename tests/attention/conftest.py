"""What the tests of all blocks share."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

Randomise = Callable[[nn.Module, int], nn.Module]


@pytest.fixture(scope="session")
def randomise() -> Randomise:
    """Return a function that draws every parameter and statistic of a module, and moves it to float64 and eval mode.

    At initialisation a zero γ, α or query and batch normalisation's ones and zeros hide what a formula does with them.
    """

    def draw(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        module.double().eval()
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
        return module

    return draw


@pytest.fixture(scope="session")
def features() -> Callable[..., torch.Tensor]:
    """Return a function that draws a float64 map (N, C, H, W)."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw
