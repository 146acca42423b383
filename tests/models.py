"""Small seeded models and data that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualNet(nn.Module):
    """Stem, one residual block, head: three batch norm layers; 3x6x6 inputs, 5 classes."""

    def __init__(self, width: int = 6, zero_init_residual: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)
        if zero_init_residual:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


BATCH_NORMS = ["stem.1", "bn1", "bn2"]


def residual_net(seed: int = 0, **kwargs: object) -> ResidualNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResidualNet(**kwargs)  # type: ignore[arg-type]


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def scales(model: nn.Module) -> list[nn.Parameter]:
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def assert_same_parameters(first: nn.Module, second: nn.Module) -> None:
    """Assert that two models hold the same values to the bit, buffers too."""
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different
