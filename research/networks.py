"""The networks of the experiments; all have the paper's recipe."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from digits import DigitsResNet, PaperRecipe
from torch import Tensor, nn

NETWORKS = ("cnn", "resnet18", "resnet34", "resnet50")


class Silent(PaperRecipe):
    """The recipe without Lightning's logging, which takes as long as a step of such a small network."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Do not log: a `Recorder` keeps the curves."""


class SilentDigitsResNet(Silent, DigitsResNet):
    """The demo's network."""


class CifarResNet(Silent):
    """A ResNet of torchvision with a stem for images of about 32x32 pixels: a 3x3 convolution, no pooling.

    Args:
        name: Name of the model, such as "resnet18".
        channels: Channels of the images.
        recipe: Arguments of `PaperRecipe`.
    """

    def __init__(self, name: str, channels: int, **recipe: Any) -> None:
        super().__init__(**recipe)
        self.network = torchvision.models.get_model(name, num_classes=10)
        self.network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        self.initialize()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)


class SignalNet(Silent):
    """Three strided convolutions with batch norm for signals of length 40, `(N, 1, 40)`.

    Args:
        width: Number of channels.
        recipe: Arguments of `PaperRecipe`.
    """

    def __init__(self, width: int = 32, **recipe: Any) -> None:
        super().__init__(**recipe)
        self.layers = nn.Sequential()
        for before, kernel in ((1, 5), (width, 3), (width, 3)):
            self.layers.append(nn.Conv1d(before, width, kernel, stride=2, padding=kernel // 2, bias=False))
            self.layers.extend([nn.BatchNorm1d(width), nn.ReLU()])
        self.layers.extend([nn.Flatten(), nn.Linear(5 * width, 10)])
        self.initialize()

    def forward(self, signals: Tensor) -> Tensor:
        """Return the logits."""
        return self.layers(signals)


def make_network(name: str, data: str, channels: int, **recipe: Any) -> PaperRecipe:
    """Return a new network.

    Args:
        name: One of `NETWORKS`; `"cnn"` is the small network for the data.
        data: The data set.
        channels: Channels of a sample.
        recipe: Arguments of `PaperRecipe`.

    Returns:
        The network.
    """
    if data == "mnist1d":
        return SignalNet(**recipe)
    if name != "cnn":
        network: PaperRecipe = CifarResNet(name, channels, **recipe)
    elif data == "digits":
        network = SilentDigitsResNet(**recipe)
    else:
        # At 28x28 pixels the demo's network takes ten times as long as at 8x8. Strides shrink its stages to 7, 4 and 2.
        network = SilentDigitsResNet(strides=(2, 2, 2, 2), **recipe)
    return network.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
