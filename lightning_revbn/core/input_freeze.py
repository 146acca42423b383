"""Decides whether training batches change the statistics of an input."""

from __future__ import annotations

from torch import Tensor

__all__ = ["InputFreeze"]


class InputFreeze:
    """Freezes the statistics at the limit of `freeze_after`, or while the user holds them.

    Args:
        learns: Whether the mode learns statistics at all.
        limit: `InputNorm.freeze_after`.

    Attributes:
        is_held: Whether the user keeps the statistics as they are.
    """

    def __init__(self, *, learns: bool, limit: int | None) -> None:
        self._learns = learns
        self._limit = limit
        self._samples: int | None = None
        self.is_held = False

    def __bool__(self) -> bool:
        """Whether training batches no longer change the statistics."""
        is_full = self._limit is not None and self._samples is not None and self._samples >= self._limit
        return not self._learns or self.is_held or is_full

    def count(self, samples: Tensor, added: int | None = None) -> None:
        """Take note of the samples that the statistics have.

        Args:
            samples: Their number, a scalar.
            added: How many of them came since the last call; None if the host does not know. Then it reads `samples`
                if there is a limit, and waits for an accelerator.
        """
        if self._limit is not None:
            known = self._samples
            self._samples = int(samples) if added is None or known is None else known + added

    def hold(self, *, is_held: bool) -> None:
        """Keep the statistics as they are, or let training batches add to them again.

        Args:
            is_held: Whether to keep them.

        Raises:
            RuntimeError: If batches are to add to them again, but the limit keeps them frozen.
        """
        self.is_held = is_held and self._learns
        if not is_held and self._learns and self:
            raise RuntimeError(
                f"freeze_after={self._limit} keeps the statistics as they are, since {self._samples} samples were "
                "measured. Make it larger, or reset the statistics"
            )
