"""The learning curves of a run: losses and accuracies after every epoch, test data included."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from torch import Tensor
from torch.nn import functional as F

CURVES = ("epoch", "step", "train_loss", "val_loss", "val_acc", "test_loss", "test_acc")


@dataclass
class Score:
    """Sums over the samples seen, where the samples are: to read a number of a GPU would end the work ahead of it.

    Attributes:
        loss: Sum of the losses.
        correct: Number of samples classified correctly.
        samples: Number of samples.
    """

    loss: Tensor | float = 0.0
    correct: Tensor | int = 0
    samples: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        self.loss = self.loss + F.cross_entropy(logits.float(), labels, reduction="sum").double()
        self.correct = self.correct + (logits.argmax(1) == labels).sum()
        self.samples += len(labels)

    def mean_loss(self) -> float:
        """Return the mean loss of a sample."""
        return float(self.loss) / self.samples

    def accuracy(self) -> float:
        """Return the share of samples that were classified rightly."""
        return int(self.correct) / self.samples


@dataclass
class Recorder(L.Callback):
    """Keeps a row for every epoch with the columns of `CURVES`; accuracies are between 0 and 1.

    The first validation loader must hold validation data, the second test data, and `validation_step` must return
    logits.

    Attributes:
        rows: A row per epoch; `epoch` and `step` count finished epochs and steps.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    _train: Score = field(default_factory=Score)
    _evaluated: tuple[Score, Score] = field(default_factory=lambda: (Score(), Score()))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the sums at the start of an epoch."""
        self._train, self._evaluated = Score(), (Score(), Score())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the mean loss of a batch."""
        samples = len(batch[1])
        self._train.loss = self._train.loss + outputs["loss"].detach().double() * samples
        self._train.samples += samples

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score a batch of validation or test data."""
        self._evaluated[dataloader_idx].add(outputs, batch[1])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of an epoch; Lightning calls this hook after the epoch's validation."""
        val, test = self._evaluated
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "step": trainer.global_step,
                "train_loss": self._train.mean_loss(),
                "val_loss": val.mean_loss(),
                "val_acc": val.accuracy(),
                "test_loss": test.mean_loss(),
                "test_acc": test.accuracy(),
            }
        )

    def best(self) -> dict[str, float]:
        """Return the first epoch with the best validation accuracy; the paper tests the weights of this epoch."""
        return max(self.rows, key=lambda row: row["val_acc"])

    def as_csv(self) -> str:
        """Return the curves in the form of CSVLogger's `metrics.csv`, which `lightning-revbn compare` reads."""
        text = io.StringIO()
        writer = csv.DictWriter(text, CURVES, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in row.items()} for row in self.rows)
        return text.getvalue()


def _short(value: float) -> str:
    return f"{value:.6g}"
