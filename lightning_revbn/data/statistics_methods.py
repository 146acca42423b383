"""What a DataModule with input normalisation offers of its statistics: read, collected, frozen, loaded, exported."""

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
        """The settings; of several inputs those of each by name, with the name for the key if they had none."""
        return self._inputs.given

    @property
    def input_scale(self) -> float | dict[str, float]:
        """What the standardised input is multiplied by at present; of several inputs, the number of each by name."""
        scales = {one.name: one.online.scale for one in self._inputs.inputs}
        return scales.get("", scales)

    def input_statistics(self, name: str | None = None) -> InputStatistics:
        """Return mean and standard deviation of all training data seen so far.

        Args:
            name: The input, where there are several.

        Returns:
            float64 tensors of shape `(C,)` in units of the input range: for uint8 in [0, 1], as the `Normalize` of
            torchvision wants them.

        Raises:
            MissingStatisticsError: If there are none yet.
            ValueError: If no input has this name.
        """
        return self._inputs[name].online.statistics()

    def collect_input_statistics(self, limit_batches: int | None = None) -> None:
        """Read the training loader once, and learn the statistics of all inputs from it, before training.

        What was learned before is forgotten, but only when the pass is over. Then validation, test and prediction work
        before a fit, and the sanity check is that of trained statistics. A fit adds its batches to those of the pass;
        call `freeze_input_statistics` to train by what was collected alone.

        Batches pass the hooks `on_before_batch_transfer` and `on_after_batch_transfer`, as in training. Random numbers
        are taken from a stream of their own, so that a seeded fit is the same with and without the pass.

        Without a Trainer, call `prepare_data()` and `setup("fit")` before it, as for any use of loaders by hand. Called
        in `setup`, where a strategy has its ranks, all ranks share the pass: each reads its part of a loader with
        torch's own samplers, no sample twice, and other loaders as they are.

        Args:
            limit_batches: How many batches of the loader are read at most, by all ranks together; None reads all.

        Raises:
            MisconfigurationException: If there is nothing to learn: constants, frozen statistics, or no batch.
            ValueError: If `limit_batches` is no number above 0.
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
        """Forget what was learned, for another fold of a cross-validation or a fit on other data.

        Frozen statistics are forgotten too, and learn again. With several ranks, call it on all.
        """
        inputs = self._inputs
        inputs.replace_standardizers([one.fresh() for one in inputs.inputs])

    def freeze_input_statistics(self) -> None:
        """Keep the statistics as they are from here on: training normalises by them too, and ranks communicate no more.

        A checkpoint keeps them frozen. With several ranks, call it on all.

        Raises:
            MissingStatisticsError: If there are none yet.
        """
        for one in self._inputs.inputs:
            one.require_statistics()
        for one in self._inputs.inputs:
            one.online.learner.hold(is_held=True)

    def unfreeze_input_statistics(self) -> None:
        """Let training batches add to the statistics again after `freeze_input_statistics`.

        Raises:
            RuntimeError: If `InputNorm(freeze_after=...)` has frozen those of an input; all other inputs learn again.
        """
        reasons = [one.release() for one in self._inputs.inputs]
        held = [reason for reason in reasons if reason is not None]
        if held:
            raise RuntimeError("; ".join(held))

    def load_input_statistics(self, path: str | Path, *, weights_only: bool = True) -> None:
        """Load the statistics from a checkpoint, whatever the name of the class that saved them.

        Args:
            path: A checkpoint of a Trainer; of a distributed one, the directory.
            weights_only: Whether to refuse anything but tensors and plain values. Checkpoints with hyperparameters of
                other types need False, which runs code from the file: only for files that you trust.

        Raises:
            ValueError: If the checkpoint has no input statistics or those of several DataModules, if they are of other
                inputs, or if they cannot be used in this mode: those of mode `"fixed"` in another.
        """
        state = read_input_statistics(Path(path), weights_only=weights_only)
        lack = self._inputs.lack_of(state)
        if lack is not None:
            raise ValueError(f"the input statistics of {path} cannot be used: {lack}")
        self._load(state)

    def export_normalizer(self, name: str | None = None) -> FixedNormalizer:
        """Return the normalisation with the present statistics as a module that needs no Lightning.

        Args:
            name: The input, where there are several.

        Returns:
            A module with buffers only, for TorchScript, `torch.export` and ONNX. It takes raw batches, and gives what
            the network was validated with.

        Raises:
            MissingStatisticsError: If there are no statistics yet.
            ValueError: If no input has this name.
        """
        return self._inputs[name].online.normalizer()

    def denormalize(self, values: Tensor, name: str | None = None) -> Tensor:
        """Undo the normalisation, for pictures of what the network was given.

        While training, in `training_step` and its hooks, that is the normalisation of the present training batch: in
        mode `"batch"` by its own mean and standard deviation. Anywhere else it is that of evaluation.

        Args:
            values: Standardised values: a batch, or one sample without the dimension of the batch.
            name: The input, where there are several.

        Returns:
            Values in units of the input range: what came as uint8 lies in [0, 1].

        Raises:
            MissingStatisticsError: If there are no statistics yet.
            ValueError: If no input has this name.
        """
        trainer = self.trainer
        is_training = trainer is not None and trainer.training
        return self._inputs[name].online.denormalize(values, is_training=is_training)

    @property
    def _inputs(self) -> InputSet:
        """The inputs, with what a process that was spawned has learned meanwhile."""
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
