"""The methods of a DataModule for its input statistics: read, collect, reset, freeze, load and export them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_revbn.core.arguments import as_integer
from lightning_revbn.core.fixed_normalizer import FixedNormalizer
from lightning_revbn.core.input_advice import on_other_constants
from lightning_revbn.core.input_norm import InputNorm, InputStatistics
from lightning_revbn.data.input_set import InputSet
from lightning_revbn.data.saved_statistics import read_input_statistics
from lightning_revbn.data.spawned_statistics import SharedStatistics
from lightning_revbn.data.statistics_pass import StatisticsPass
from lightning_revbn.lightning_compat import MisconfigurationException, rank_zero_warn

__all__ = ["InputStatisticsMethods"]

if TYPE_CHECKING:
    _Base = LightningDataModule
else:
    _Base = object

_NOT_INITIALIZED = (
    "{name}.__init__ must call super().__init__(input_norm=InputNorm(...)) before input statistics are used"
)


class InputStatisticsMethods(_Base):
    """The methods of `OnlineInputNormMixin` that users call."""

    _input_set: InputSet
    _home: SharedStatistics
    _pass: StatisticsPass | None

    @property
    def input_norm(self) -> InputNorm | dict[str, InputNorm]:
        """The settings; with several inputs, a dict of each name's settings, whose key is the name if they had none."""
        return self._inputs.given

    @property
    def input_scale(self) -> float | dict[str, float]:
        """The factor of the standardised input; with several inputs, a dict of each name's factor."""
        scales = {one.name: one.online.scale for one in self._inputs.inputs}
        return scales.get("", scales)

    def input_statistics(self, name: str | None = None) -> InputStatistics:
        """Return mean and standard deviation of all training data so far.

        Args:
            name: The name of the input; None for a single input without a name.

        Returns:
            Mean, std and count, float64 tensors of shape `(C,)`, in units of the input range: for uint8 in [0, 1], as
            torchvision's `Normalize` takes them.

        Raises:
            MissingStatisticsError: Before the first statistics.
            ValueError: If no input has this name.
        """
        return self._inputs[name].online.statistics()

    def collect_input_statistics(self, limit_batches: int | None = None) -> None:
        """Read the training loader once, before training, and learn the statistics of all inputs from it.

        At the end of the pass the new statistics replace the earlier statistics. Validation, test and prediction then
        work before a fit, and the sanity check uses these statistics too. A fit adds its batches to them; call
        `freeze_input_statistics` to train with the statistics of the pass alone.

        Batches pass the hooks `on_before_batch_transfer` and `on_after_batch_transfer`, as in training. The pass leaves
        the global random generators as they are, so a seeded fit is the same with and without the pass.

        Without a Trainer, call `prepare_data()` and `setup("fit")` first. In `setup` of a fit with several ranks, all
        ranks share the pass: of a loader with torch's own sampler each rank reads a part, so that no sample is read
        twice; other loaders are read as they are.

        Args:
            limit_batches: Most batches to read, by all ranks together; None reads all.

        Raises:
            MisconfigurationException: If all inputs have constants, an input is frozen by `freeze_input_statistics`,
                the loader has no batch, or its batches have no value of an input.
            ValueError: If `limit_batches` is not a whole number above 0.
            InputError: If a batch cannot be measured; the earlier statistics stay.
        """
        limit = None if limit_batches is None else as_integer(limit_batches)
        if limit_batches is not None and (limit is None or limit < 1):
            raise ValueError(f"limit_batches={limit_batches!r} must be a number of batches above 0, or None")
        inputs = self._inputs
        self._pass = StatisticsPass(self, inputs, limit)
        try:
            learned = self._pass.run()
        finally:
            self._pass = None
        inputs.replace_standardizers(learned)

    def reset_input_statistics(self) -> None:
        """Forget the statistics, for another fold of a cross-validation or a fit on other data.

        Frozen statistics are forgotten too, and training adds to them again. With several ranks, call it on all.
        """
        inputs = self._inputs
        inputs.replace_standardizers([one.fresh() for one in inputs.inputs])

    def freeze_input_statistics(self) -> None:
        """Stop adding training batches to the statistics; training then normalises by them, without a collective.

        They stay frozen in checkpoints. With several ranks, call it on all.

        Raises:
            MissingStatisticsError: Before the first statistics.
        """
        for one in self._inputs.inputs:
            one.require_statistics()
        for one in self._inputs.inputs:
            one.online.learner.hold(is_held=True)

    def unfreeze_input_statistics(self) -> None:
        """Let training batches add to the statistics again after `freeze_input_statistics`.

        Raises:
            RuntimeError: If `InputNorm(freeze_after=...)` keeps an input frozen; all other inputs learn again.
        """
        reasons = [one.release() for one in self._inputs.inputs]
        held = [reason for reason in reasons if reason is not None]
        if held:
            raise RuntimeError("; ".join(held))

    def load_input_statistics(self, path: str | Path, *, weights_only: bool = True) -> None:
        """Load the statistics from a checkpoint, whatever the class of the DataModule that saved them.

        Args:
            path: A checkpoint of a Trainer; a distributed checkpoint is a directory.
            weights_only: Whether to refuse objects other than tensors and plain values. Checkpoints with
                hyperparameters of other types need False, which runs code from the file: use it for files that you
                trust.

        Raises:
            ValueError: If the checkpoint does not have the input statistics of exactly one DataModule; if they are
                damaged or of other inputs; or if they cannot serve this mode, as constants of mode `"fixed"` cannot
                serve the other modes.
        """
        state = read_input_statistics(Path(path), weights_only=weights_only)
        lack = self._inputs.lack_of(state)
        if lack is not None:
            raise ValueError(f"the input statistics of {path} cannot be used: {lack}")
        self._load(state)

    def export_normalizer(self, name: str | None = None) -> FixedNormalizer:
        """Return the normalisation of evaluation, with the present statistics, as a module without Lightning.

        Args:
            name: The name of the input; None for a single input without a name.

        Returns:
            A module with buffers only, for TorchScript, `torch.export` and ONNX. It takes raw batches, and returns the
            input that the network gets in validation.

        Raises:
            MissingStatisticsError: Before the first statistics.
            ValueError: If no input has this name.
        """
        return self._inputs[name].online.normalizer()

    def denormalize(self, values: Tensor, name: str | None = None) -> Tensor:
        """Undo the normalisation, to draw the input of the network.

        In training, in `training_step` and its hooks, this undoes the normalisation of the present training batch,
        which in mode `"batch"` uses the mean and standard deviation of that batch. Elsewhere it undoes the
        normalisation of evaluation.

        Args:
            values: Standardised values: a batch, or a sample without the batch dimension.
            name: The name of the input; None for a single input without a name.

        Returns:
            Values of the same shape in units of the input range: images that came as uint8 lie in [0, 1].

        Raises:
            MissingStatisticsError: Before the first statistics.
            ValueError: If no input has this name.
            InputError: If the values have other channels than the settings.
        """
        trainer = self.trainer
        is_training = trainer is not None and trainer.training
        return self._inputs[name].online.denormalize(values, is_training=is_training)

    @property
    def _inputs(self) -> InputSet:
        """The inputs; statistics that a spawned process has sent are loaded first."""
        if "_input_set" not in vars(self):
            raise MisconfigurationException(_NOT_INITIALIZED.format(name=type(self).__name__))
        learned = self._home.take()
        if learned is not None:
            self._input_set.load_state_dict(learned)
        return self._input_set

    def _load(self, state: Any) -> None:
        inputs = self._inputs
        inputs.load_state_dict(state)
        for one in inputs.inputs:
            saved = one.online.learner.saved
            text = None if saved is None else on_other_constants(saved, one.settings)
            if text is not None:
                rank_zero_warn(f"{type(self).__name__}{f', {one.label}' if one.name else ''}: {text}")
