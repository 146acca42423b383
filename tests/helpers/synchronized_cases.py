"""Layers and networks whose synchronised batch norm on two ranks is compared with the joined batch."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from torch import Tensor, nn

from lightning_revbn.core.batch_norm_sync import synchronize_batch_norms

IMAGES = (8, 3, 5, 6)


class Operator(nn.BatchNorm2d):
    """Calls torch's operator directly, instead of the function around it."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        running = self.running_mean, self.running_var
        return torch.batch_norm(
            input,
            self.weight,
            self.bias,
            *running,
            self.training,
            self.momentum,
            self.eps,
            torch.backends.cudnn.enabled,
        )


def network() -> nn.Module:
    return timm.create_model("resnetv2_50", layers=(1, 1), channels=(16, 32), stem_chs=8, num_classes=3)


# The layer's constructor, the shape of the joined input, and the number of samples of each rank.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (8, 3), (4, 4)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(3), (8, 3, 5), (4, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), IMAGES, (4, 4)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (8, 3, 2, 3, 2), (4, 4)),
    "BatchNormAct2d": (lambda: BatchNormAct2d(3), IMAGES, (4, 4)),
    "SplitBatchNorm2d": (lambda: SplitBatchNorm2d(3), IMAGES, (4, 4)),
    "operator": (lambda: Operator(3), IMAGES, (4, 4)),
    "lazy": (lambda: synchronize_batch_norms(nn.LazyBatchNorm2d()), IMAGES, (4, 4)),
    "uneven": (lambda: nn.BatchNorm2d(3), IMAGES, (5, 3)),
    "one sample": (lambda: nn.BatchNorm1d(3), (8, 3), (1, 7)),
    "no samples": (lambda: nn.BatchNorm2d(3), IMAGES, (8, 0)),
    "cumulative average": (lambda: nn.BatchNorm2d(3, momentum=None), IMAGES, (4, 4)),
    "no affine": (lambda: nn.BatchNorm2d(3, affine=False), IMAGES, (4, 4)),
    "no running statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), IMAGES, (4, 4)),
    "channels last": (lambda: nn.BatchNorm2d(3), IMAGES, (4, 4)),
    "compiled": (lambda: nn.Sequential(BatchNormAct2d(3), nn.Conv2d(3, 3, 3)), IMAGES, (4, 4)),
    "network": (network, (8, 3, 32, 32), (4, 4)),
}
