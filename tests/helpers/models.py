"""Small seeded models and data that the tests share."""

from __future__ import annotations

import torch
import torch.distributed.nn
from torch import Tensor, nn


class ResidualNet(nn.Module):
    """A stem, a residual block and a head, with three batch norm layers; for 3x6x6 inputs and 5 classes."""

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
    with torch.random.fork_rng():  # leaves the test's own random state alone
        torch.manual_seed(seed)
        return ResidualNet(**kwargs)  # type: ignore[arg-type]


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """Batch norm that users synchronise by hand, by differentiable all-reduces in its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        size = input.new_tensor([input.numel() / input.shape[1]])
        moments = torch.cat([size, input.sum((0, 2, 3)), input.square().sum((0, 2, 3))])
        if torch.distributed.is_initialized():
            moments = torch.distributed.nn.all_reduce(moments)
        count, total, squares = moments.split([1, input.shape[1], input.shape[1]])
        mean = total / count
        variance = squares / count - mean.square()
        shape = (1, -1, 1, 1)
        x_hat = (input - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        return x_hat * self.weight.view(shape) + self.bias.view(shape)


class AmidArithmetic(nn.BatchNorm2d):
    """Batch norm between other arithmetic, so that the layer's input and output do not show the normalised values."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.1 * super().forward(3 * input.sin()) + 1


class Softplus(nn.Module):
    """A parametrization that keeps a scale positive."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)

    def right_inverse(self, y: Tensor) -> Tensor:
        return y.expm1().log()


def residual_net_of(kind: type[nn.Module]) -> nn.Module:
    """Return the same net as `residual_net()` with batch norm layers of another class."""
    model = residual_net()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            model.set_submodule(name, kind(layer.num_features))
    return model


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def scales(model: nn.Module) -> list[nn.Parameter]:
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def shifts(model: nn.Module) -> list[nn.Parameter]:
    return [layer.bias for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def assert_same_parameters(first: nn.Module, second: nn.Module) -> None:
    """Assert that two models hold the same parameters and buffers to the bit."""
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different
