"""Reports on an input: its metrics for the loggers, and warnings about its data, each once per Trainer."""

from __future__ import annotations

import torch

from lightning_revbn.core.input_advice import on_half_precision, on_normalized_data, on_small_features
from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.joint_training import naming
from lightning_revbn.core.metric_keys import input_key
from lightning_revbn.core.moments import Kind
from lightning_revbn.data.input_set import NamedInput
from lightning_revbn.lightning_compat import rank_zero_warn

__all__ = ["InputReport"]

_SINGLE_CHANNELS = 16
"""Most channels for which each channel is logged too."""
_ENOUGH = 256
"""Number of samples from which the statistics are precise enough to judge the data; an epoch is enough too."""
_OTHER_SCALE = (
    "{name}: the checkpoint was made with an input scale of {loaded:g}, this run has {scale:g}. From here on this "
    "run's applies."
)


class InputReport:
    """Makes the metrics of an input, and warns about its data, each subject once.

    Args:
        owner: The name of the DataModule's class, for the warnings.
        source: The input.
    """

    def __init__(self, owner: str, source: NamedInput) -> None:
        self.source = source
        self._name = f"{owner}, {source.label}" if source.name else owner
        self._told: set[object] = set()

    @property
    def online(self) -> OnlineStandardizer:
        """The present standardiser of the input."""
        return self.source.online

    def metrics(self) -> dict[str, float]:
        """Return mean and standard deviation averaged over the normalised channels; of 2 to 16, each too.

        Raises:
            InputError: If a training batch since the last check had a fault.
        """
        settings = self.source.settings
        with naming(self.source.name):
            statistics, prefix = self.online.learner.statistics(checked=True).of(settings.channels), settings.prefix
        channels = range(settings.num_features) if settings.channels is None else settings.channels
        metrics: dict[str, float] = {}
        for quantity, values in (("mean", statistics.mean), ("std", statistics.std)):
            metrics[input_key(prefix, quantity, self.source.name)] = values.mean().item()
            if 1 < len(values) <= _SINGLE_CHANNELS:
                for channel, value in zip(channels, values, strict=True):
                    metrics[input_key(prefix, f"{quantity}_{channel}", self.source.name)] = value.item()
        return metrics

    def on_scale(self) -> None:
        """Warn if loaded statistics were saved with another scale."""
        saved, scale = self.online.learner.saved, self.online.scale
        loaded = None if saved is None else saved.scale
        if loaded not in (None, scale):
            told = _OTHER_SCALE.format(name=self._name, loaded=loaded, scale=scale)
            self.tell(("scale", loaded, scale), told)

    def on_dtype(self, dtype: torch.dtype) -> None:
        """Warn if the dtype of the first training batch cannot hold the data."""
        if "half" not in self._told and self.online.learns:
            self.tell("half", on_half_precision(self.online.statistics(), dtype))

    def advise(self, *, is_end: bool = False) -> None:
        """Warn about small features and normalised data, once enough samples were measured.

        Args:
            is_end: Whether an epoch ends, after which any number of samples is enough for a warning of small features.
        """
        online = self.online
        if {"eps", "normalized"} <= self._told:  # both are judged, and this is called in every step
            return
        enough = not online.learns or online.samples >= _ENOUGH
        if (enough or is_end) and "eps" not in self._told:
            self.tell("eps", on_small_features(online.statistics(), self.source.settings.eps))
        if enough and "normalized" not in self._told:
            is_float = online.learner.learned.kind is Kind.FLOAT
            self.tell("normalized", on_normalized_data(online.statistics()) if is_float else None)

    def tell(self, subject: object, text: str | None) -> None:
        """Warn of a subject once per Trainer.

        Args:
            subject: The subject.
            text: The warning; None marks the subject as told without a warning.
        """
        if text is not None and subject not in self._told:
            rank_zero_warn(text if text.startswith(self._name) else f"{self._name}: {text}")
        self._told.add(subject)
