"""Names that blocks of pages use without making them, since every reader has such things.

`model` and `data` go into `Trainer.fit`, `network` is a module that takes the same batches, `raw` is a loader of uint8
images, and `quick` has arguments of a Trainer for an epoch. The file runs before the first block of each page.
"""

from __future__ import annotations

from typing import Any


def _names() -> dict[str, Any]:
    """Return the names; imports stay in here, for a page that forgets an import must fail."""
    import lightning as L
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader, TensorDataset

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.fc = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return self.fc((x + y).relu().mean((2, 3)))

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Network()
            self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 5))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(0)
    targets = torch.randint(5, (48,))
    pictures = torch.randint(0, 256, (48, 3, 6, 6), dtype=torch.uint8)
    quick = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    return {
        "model": Model(),
        "network": Network(),
        "data": DataLoader(TensorDataset(torch.randn(48, 3, 6, 6), targets), batch_size=8),
        "raw": DataLoader(TensorDataset(pictures, targets), batch_size=8),
        "quick": {**quick, "enable_progress_bar": False, "enable_model_summary": False},
    }


globals().update(_names())
