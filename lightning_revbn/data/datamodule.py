"""The DataModule mixin: raw batches in, batches standardised with the statistics of the global batch out."""

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
    "there are no input statistics to evaluate with: {name} learns them from training batches. Fit first, call "
    "collect_input_statistics() on the datamodule, pass a checkpoint of such a run as ckpt_path, call "
    "load_input_statistics(path) on the datamodule (for a checkpoint that "
    'was made with another class or is loaded into the model alone), or give constants with InputNorm(mode="fixed")'
)


class OnlineInputNormMixin(InputStatisticsMethods, _Base):
    """Standardise the inputs of every batch on the device, with statistics learned while training.

    Put it before `LightningDataModule` among the bases, and hand raw batches over: uint8 images as they are on disk,
    spectrograms, rows of a table. In training the input is normalised by the mean and standard deviation of the global
    batch (mode `"batch"`; see `InputNorm` for others) and multiplied by a fixed scale. All ranks of a data parallel
    strategy take part in one collective a step, however many inputs there are. Validation, test and prediction use the
    statistics of all training data seen so far, which are in the checkpoint, and communicate nothing.

    No gradient flows through it. Batches keep their containers, and the input keeps its memory format; its dtype is
    the one that the precision of the Trainer asks for. A hook `on_after_batch_transfer` of the LightningModule, which
    Lightning would not call beside one of a DataModule, is called before. Override `select_input` and `replace_input`
    where the input of a batch cannot be named by `InputNorm(key=...)`.

    Logged, in units of the input range: `revbn/input/mean` and `revbn/input/std` of all training data so far, averaged
    over the channels, and of up to 16 channels one by one as `revbn/input/mean_0` and so on. Of several inputs the keys
    are `revbn/input/<name>/mean` and so on.

    Args:
        *args: For the next class.
        input_norm: The settings, or those of several inputs by name. The name is where a batch holds the input, if the
            settings have no key.
        **kwargs: For the next class.

    Raises:
        TypeError: If `input_norm` is no `InputNorm` and no mapping of them; when a class is made, if the mixin comes
            after `LightningDataModule` or an overridden method does not call the mixin's.
        ValueError: If two inputs have one place in a batch.

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
        self._home = SharedStatistics(self._input_set.state_dict())
        self._fit: InputFit | None = None
        self._pass = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Standardise the input of a batch; Lightning's hook.

        Args:
            batch: The batch on its device.
            dataloader_idx: Which data loader it is from.

        Returns:
            A shallow copy of the batch with the input replaced.

        Raises:
            MisconfigurationException: If there are no statistics to evaluate with, or ranks cannot communicate.
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
        if trainer is None or module is None:  # called by hand
            return self._replaced(batch, torch.float32)
        if is_example(module, batch):
            example = _normalized_example(batch, inputs)
            if example is batch and trainer.state.stage is None:  # no loop runs: an export, or a call by hand
                rank_zero_info(_LEFT_ALONE.format(name=type(self).__name__))
            return example
        if self._fit is None or not self._fit.is_of(trainer):
            self._fit = InputFit(trainer, self, inputs, self._home)
        self._fit.before_batch(trainer)
        if type(self).select_input is OnlineInputNormMixin.select_input:
            self._fit.look_at(trainer, batch)
        dtype = trainer.precision_plugin.convert_input(torch.zeros((), dtype=torch.float32)).dtype
        return self._replaced(batch, dtype)

    def select_input(self, batch: Any) -> Selected:
        """Return the tensor of a batch that is to be standardised; override it for batches of other structure.

        Args:
            batch: A batch as the data loader makes it.

        Returns:
            The raw input. Where its key lists places, a list of tensors, with None for a place that the batch lacks; of
            several inputs, a dict of these by name.

        Raises:
            TypeError: If `InputNorm(key=...)` does not lead to a tensor.
        """
        return self._inputs.select(batch, is_training=self._is_training)

    def replace_input(self, batch: Any, value: Any) -> Any:
        """Return a batch with another input; override it together with `select_input`.

        Args:
            batch: The batch, which must not be changed.
            value: What takes the place of the input, in the structure that `select_input` has returned.

        Returns:
            The new batch.
        """
        return self._inputs.replace(batch, value, is_training=self._is_training)

    def select_mask(self, batch: Any) -> Selected:
        """Return which values of a batch count, True where they do; override it where the mask must be computed.

        Args:
            batch: The batch.

        Returns:
            A boolean tensor that broadcasts to the input, or None if all values count; a list where each place of the
            input has its own; of several inputs, a dict of these by name.
        """
        return self._inputs.select_mask(batch, is_training=self._is_training)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the DataModule with the input statistics, for a checkpoint."""
        return {**super().state_dict(), STATE_NAME: self._inputs.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the input statistics from a checkpoint.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If the statistics in it cannot be those of such an input; nothing is taken over then.
        """
        if STATE_NAME in state_dict:
            self._inputs.read(state_dict[STATE_NAME])  # before anything is taken over
        super().load_state_dict({name: value for name, value in state_dict.items() if name != STATE_NAME})
        if STATE_NAME in state_dict:
            self._load(state_dict[STATE_NAME])

    @property
    def _is_training(self) -> bool:
        """Whether batches are those of training, as they are in a pass before it."""
        return self._pass is not None or (self.trainer is not None and self.trainer.training)

    def _replaced(self, batch: Any, dtype: torch.dtype) -> Any:
        """Return a batch with its inputs standardised as the present stage does it."""
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
        """Return the standardised parts of an input in evaluation."""
        try:
            return one.evaluate(found.parts, dtype)
        except MissingStatisticsError as error:
            saved = one.online.learner.saved
            lack = None if saved is None else saved.lacks(one.settings.mode)
            loaded = f". Statistics were loaded, but {lack}" if lack else ""
            raise MisconfigurationException(_NO_STATISTICS.format(name=type(self).__name__) + loaded) from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {**vars(self), "_fit": None, "_pass": None}


def _normalized_example(batch: Any, inputs: InputSet) -> Any:
    """Return an example input, which Lightning sends through this hook for summaries, graphs and exports.

    It is meant for the network and passed on as it is, unless it is an image or another raw integer signal, which no
    network takes. Which of several inputs a tensor would be is not known, and a key may lead to something else, as to
    the targets, of other channels or numbers.
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
    """Tell whether the first tensor of an example may be an input."""
    firsts = [0 if place is None else next(iter(path_of(place)), 0) for place in places_in(one.settings.key)]
    if not any(first == 0 or isinstance(first, str) for first in firsts):
        return False
    is_auto, of_floats = one.settings.input_range == "auto", one.online.learner.learned.kind is Kind.FLOAT
    # Bytes are divided by 255: they cannot be what floating-point numbers far outside of 0 to 1 were learned from.
    is_of_bytes = is_auto and values.dtype == torch.uint8
    return not (is_of_bytes and of_floats) or one.online.statistics().of(one.settings.channels).fit_range()
