"""The DataModule mixin: it standardises raw batches with the statistics of the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_revbn.core.batch_places import path_of, places_in
from lightning_revbn.core.input_norm import InputError, InputNorm, MissingStatisticsError
from lightning_revbn.core.joint_training import InputParts, train_together
from lightning_revbn.core.moments import Kind
from lightning_revbn.data.batches import is_sequence, replace_tensor
from lightning_revbn.data.data_parallel import data_parallel_group
from lightning_revbn.data.input_fit import InputFit
from lightning_revbn.data.input_set import InputSet, NamedInput, Selected
from lightning_revbn.data.saved_statistics import STATE_NAME
from lightning_revbn.data.spawned_statistics import SharedStatistics
from lightning_revbn.data.statistics_methods import InputStatisticsMethods
from lightning_revbn.data.subclass_checks import check_subclass
from lightning_revbn.lightning_compat import MisconfigurationException, is_example, overrides, rank_zero_info

__all__ = ["OnlineInputNormMixin"]

if TYPE_CHECKING:
    _Base = LightningDataModule
else:
    _Base = object

_HOOKS = ("on_after_batch_transfer", "state_dict", "load_state_dict")
_LEFT_ALONE = (
    "{name}: a batch that comes from no running loop is left as it is, as an example input of the network. "
    "Normalise raw input by export_normalizer()"
)
_NO_STATISTICS = (
    "input statistics are missing, so a batch cannot be evaluated: {name} learns them from training batches. Fit "
    "first, call collect_input_statistics() on the datamodule, pass a checkpoint of such a run as ckpt_path, call "
    "load_input_statistics(path) on the datamodule (for a checkpoint that "
    'was made with another class or is loaded into the model alone), or give constants with InputNorm(mode="fixed")'
)


class OnlineInputNormMixin(InputStatisticsMethods, _Base):
    """Standardise the inputs of every batch on the device, with statistics learned while training.

    Put it before `LightningDataModule` among the bases, and let the data loaders return raw batches: uint8 images as
    they are on disk, spectrograms, rows of a table. Training normalises the input by the mean and standard deviation of
    the global batch (mode `"batch"`; see `InputNorm` for other modes) and multiplies it by a fixed scale. All ranks of
    a data parallel strategy share a single collective a step, also with several inputs. Validation, test and prediction
    use the statistics of all training data so far, which checkpoints hold, and need no collective.

    No gradient flows through the normalisation. Batches keep their containers, and the input keeps its memory format;
    its dtype follows the precision of the Trainer. Lightning calls the hook `on_after_batch_transfer` of either the
    DataModule or the LightningModule; so that no hook is lost, the mixin calls the LightningModule's first. Override
    `select_input` and `replace_input` if `InputNorm(key=...)` cannot name the input of a batch.

    Logged in units of the input range: `revbn/input/mean` and `revbn/input/std` of all training data so far, averaged
    over the channels; and for 2 to 16 channels each channel too, as `revbn/input/mean_0` and so on. With several
    inputs the keys are `revbn/input/<name>/mean` and so on.

    Args:
        *args: Arguments of the next class.
        input_norm: The settings, or a mapping of names to the settings of several inputs. Settings without a key take
            the name for the key.
        **kwargs: Keyword arguments of the next class.

    Raises:
        TypeError: If `input_norm` is neither an `InputNorm` nor a mapping of names to these. When a class is defined,
            if the mixin comes after `LightningDataModule`, or an overridden method does not call the mixin's.
        ValueError: If two inputs have the same place in a batch.

    Example::

        class Data(OnlineInputNormMixin, L.LightningDataModule):
            def __init__(self):
                super().__init__(input_norm=InputNorm(num_features=3))
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_subclass(cls, OnlineInputNormMixin, _HOOKS)

    def __init__(self, *args: Any, input_norm: InputNorm | Mapping[str, InputNorm], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._input_set = InputSet(input_norm)
        # The shared memory must exist before a strategy starts child processes.
        self._home = SharedStatistics(self._input_set.state_dict())
        self._fit: InputFit | None = None
        self._pass = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Standardise the input of a batch; Lightning calls this hook.

        Args:
            batch: The batch on its device.
            dataloader_idx: The index of its data loader.

        Returns:
            A shallow copy of the batch with the standardised input.

        Raises:
            MisconfigurationException: If evaluation has no statistics, ranks have different settings, or ranks cannot
                communicate.
            InputError: If the input cannot be measured or normalised.
            TypeError: If `InputNorm(key=...)` does not lead to a tensor.
        """
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if batch is None:
            return batch
        trainer, inputs = self.trainer, self._inputs
        module = None if trainer is None else trainer.lightning_module
        if module is not None and overrides("on_after_batch_transfer", module):
            batch = module.on_after_batch_transfer(batch, dataloader_idx)
        if self._pass is not None:
            self._pass.take(inputs.parts(self.select_input(batch), self.select_mask(batch)))
            return batch
        if trainer is None or module is None:  # the user's own call
            return self._replaced(batch, torch.float32)
        if is_example(module, batch):
            example = _normalized_example(batch, inputs)
            if example is batch and trainer.state.stage is None:  # no loop runs: an export, or the user's own call
                rank_zero_info(_LEFT_ALONE.format(name=type(self).__name__))
            return example
        if self._fit is None or not self._fit.is_of(trainer):
            self._fit = InputFit(trainer, self, inputs, self._home)
        self._fit.before_batch(trainer)
        if type(self).select_input is OnlineInputNormMixin.select_input:
            self._fit.look_at(trainer, batch)
        # The precision plugin has no public name for its dtype, but shows it when it converts a number.
        dtype = trainer.precision_plugin.convert_input(torch.zeros((), dtype=torch.float32)).dtype
        return self._replaced(batch, dtype)

    def select_input(self, batch: Any) -> Selected:
        """Return the tensor of a batch to standardise; override it for batches that a key cannot describe.

        Args:
            batch: A batch from the data loader.

        Returns:
            The raw input. If its key lists places, a list of tensors, with None for a place that the batch lacks; with
            several inputs, a dict with the input of each name.

        Raises:
            TypeError: If `InputNorm(key=...)` does not lead to a tensor.
        """
        return self._inputs.select(batch, is_training=self._is_training)

    def replace_input(self, batch: Any, value: Any) -> Any:
        """Return a batch with another input; override it together with `select_input`.

        Args:
            batch: The batch, which must not be changed.
            value: The standardised input, in the structure of the result of `select_input`.

        Returns:
            The new batch.
        """
        return self._inputs.replace(batch, value, is_training=self._is_training)

    def select_mask(self, batch: Any) -> Selected:
        """Return the mask of a batch, True where values count; override it to compute a mask.

        Args:
            batch: The batch.

        Returns:
            A boolean tensor that broadcasts to the input, or None if all values count. If each place of the input has
            its own mask, a list; with several inputs, a dict with the mask of each name.

        Raises:
            TypeError: If `InputNorm(mask_key=...)` does not lead to a tensor.
        """
        return self._inputs.select_mask(batch, is_training=self._is_training)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the DataModule with the input statistics, for a checkpoint."""
        return {**super().state_dict(), STATE_NAME: self._inputs.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the input statistics from a checkpoint.

        Args:
            state_dict: The result of `state_dict`.

        Raises:
            ValueError: If the statistics in it are damaged or of other inputs; then nothing is restored.
        """
        if STATE_NAME in state_dict:
            self._inputs.read(state_dict[STATE_NAME])  # raises before anything is restored
        super().load_state_dict({name: value for name, value in state_dict.items() if name != STATE_NAME})
        if STATE_NAME in state_dict:
            self._load(state_dict[STATE_NAME])

    @property
    def _is_training(self) -> bool:
        """Whether batches are training batches: in training, and in the pass of `collect_input_statistics`."""
        return self._pass is not None or (self.trainer is not None and self.trainer.training)

    def _replaced(self, batch: Any, dtype: torch.dtype) -> Any:
        """Return a batch with its inputs standardised for the present stage of the Trainer."""
        trainer, inputs = self.trainer, self._inputs
        selected = self.select_input(batch)
        own = inputs.parts(selected, self.select_mask(batch))
        if trainer is not None and trainer.training:
            group, ranks = (None, 1) if inputs.is_frozen else data_parallel_group(trainer)
            results = train_together(own, dtype, group, ranks, trainer.strategy.root_device)
            if self._fit is not None:
                self._fit.after_batch(trainer, own)
        elif trainer is not None and trainer.sanity_checking:
            results = [one.preview(found.parts, dtype) for one, found in zip(inputs.inputs, own, strict=True)]
        else:
            results = [self._evaluate(one, found, dtype) for one, found in zip(inputs.inputs, own, strict=True)]
        return self.replace_input(batch, inputs.filled(selected, results))

    def _evaluate(self, one: NamedInput, found: InputParts, dtype: torch.dtype) -> list[Tensor]:
        """Return the standardised parts of an input in evaluation; without statistics, explain how to get them."""
        try:
            return one.evaluate(found.parts, dtype)
        except MissingStatisticsError as error:
            saved = one.online.learner.saved
            lack = None if saved is None else saved.lacks(one.settings.mode)
            loaded = f". Statistics were loaded, but {lack}" if lack else ""
            raise MisconfigurationException(_NO_STATISTICS.format(name=type(self).__name__) + loaded) from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the objects that work in this process only."""
        return {**vars(self), "_fit": None, "_pass": None}


def _normalized_example(batch: Any, inputs: InputSet) -> Any:
    """Return an example input, which Lightning sends through this hook for summaries, graphs and exports.

    An example is meant for the network, so it is returned as it is. An exception are integers of 8 or 16 bits, such as
    uint8 images: they are raw, since networks take no such integers. They are standardised if there is a single input,
    and the tensor may be it: it may also be the targets, or have other channels.
    """
    values: Any = batch if isinstance(batch, Tensor) else next(iter(batch), None) if is_sequence(batch) else None
    if not isinstance(values, Tensor) or values.dtype not in (torch.uint8, torch.int8, torch.int16):
        return batch
    if len(inputs.inputs) > 1 or not _may_hold(inputs.inputs[0], values):
        return batch
    try:
        result = inputs.inputs[0].online.preview(values)
    except InputError:
        return batch
    return result if batch is values else replace_tensor(batch, 0, result)


def _may_hold(one: NamedInput, values: Tensor) -> bool:
    """Tell whether the first tensor of an example may be the input."""
    firsts = [0 if place is None else next(iter(path_of(place)), 0) for place in places_in(one.settings.key)]
    if not any(first == 0 or isinstance(first, str) for first in firsts):
        return False
    is_auto, of_floats = one.settings.input_range == "auto", one.online.learner.learned.kind is Kind.FLOAT
    # uint8 divided by 255 lies in 0 to 1. So it is another signal if training had floats far outside of 0 to 1.
    is_of_bytes = is_auto and values.dtype == torch.uint8
    return not (is_of_bytes and of_floats) or one.online.statistics().of(one.settings.channels).fit_range()
