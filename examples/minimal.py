"""The smallest complete use: train a network with the callback, and look at the numbers that the callback logs.

    python examples/minimal.py

It needs no data, no logger and no extra of the package, and takes some seconds.
"""

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_revbn import RevisitedBatchNorm


class StripesClassifier(L.LightningModule):
    """Two convolutions with batch norm, and a linear layer; nothing here knows about the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 4)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return cross_entropy(self.head(self.features(images).mean((2, 3))), labels)

    def configure_optimizers(self) -> dict:
        """Return SGD with a cosine schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=25)}


def stripes(number: int = 1024) -> TensorDataset:
    """Return noisy stripes of four directions, images of shape (N, 1, 16, 16), and their directions."""
    labels = torch.randint(4, (number,))
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    waves = torch.stack([rows, columns, rows + columns, rows - columns]).mul(1.5).sin()
    return TensorDataset(waves[labels].unsqueeze(1) + torch.randn(number, 1, 16, 16), labels)


if __name__ == "__main__":
    L.seed_everything(1)
    trainer = L.Trainer(
        max_epochs=25,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
        callbacks=[RevisitedBatchNorm()],  # the line that you add
    )
    trainer.fit(StripesClassifier(), DataLoader(stripes(), batch_size=64, shuffle=True))
    for name, value in trainer.callback_metrics.items():
        print(f"{name:<24} {value:.4g}")
