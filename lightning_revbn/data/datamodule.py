"""The DataModule mixin: raw batches in, batches standardised with the statistics of the global batch out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lightning_revbn.core.fixed_normalizer import FixedNormalizer
from lightning_revbn.core.input_advice import on_other_constants
from lightning_revbn.core.input_norm import InputNorm, InputStatistics, MissingStatisticsError, OnlineStandardizer
from lightning_revbn.core.input_state import read_state
from lightning_revbn.data.batches import is_sequence, replace_tensor, select_tensor
from lightning_revbn.data.input_fit import InputFit
from lightning_revbn.data.saved_statistics import STATE_NAME, read_input_statistics
from lightning_revbn.data.spawned_statistics import SharedStatistics
from lightning_revbn.data.subclass_checks import check_subclass
from lightning_revbn.lightning_compat import (
    MisconfigurationException,
    is_example,
    overrides,
    rank_zero_info,
    rank_zero_warn,
)

__all__ = ["OnlineInputNormMixin"]

if TYPE_CHECKING:
    _Base = LightningDataModule
else:
    _Base = object

_HOOKS = ("on_after_batch_transfer", "state_dict", "load_state_dict")
_NOT_INITIALIZED = (
    "{name}.__init__ must call super().__init__(input_norm=InputNorm(...)) before input statistics are used"
)
_LEFT_ALONE = (
    "{name}: a batch that comes from no running loop is left as it is, as an example input of the network. "
    "Normalise raw input by export_normalizer()"
)
_NO_STATISTICS = (
    "there are no input statistics to evaluate with: {name} learns them from training batches. Fit first, pass a "
    "checkpoint of such a run as ckpt_path, call load_input_statistics(path) on the datamodule (for a checkpoint that "
    'was made with another class or is loaded into the model alone), or give constants with InputNorm(mode="fixed")'
)


class OnlineInputNormMixin(_Base):
    """Standardise the input of every batch on the device, with statistics learned while training.

    Put it before `LightningDataModule` among the bases, and hand raw batches over: uint8 images as they are on disk,
    spectrograms, rows of a table. In training the input is normalised by the mean and standard deviation of the global
    batch (mode `"batch"`; see `InputNorm` for others) and multiplied by a fixed scale. All ranks of a data parallel
    strategy take part in one all-reduce a step. Validation, test and prediction use the statistics of all training
    data seen so far, which are in the checkpoint, and communicate nothing.

    No gradient flows through it. Batches keep their containers, and the input keeps its memory format; its dtype is
    the one that the precision of the Trainer asks for. A hook `on_after_batch_transfer` of the LightningModule, which
    Lightning would not call beside one of a DataModule, is called before. Override `select_input` and `replace_input`
    where the input of a batch cannot be named by `InputNorm(key=...)`.

    Logged, in units of the input range: `revbn/input/mean` and `revbn/input/std` of all training data so far, averaged
    over the channels, and of up to 16 channels one by one as `revbn/input/mean_0` and so on.

    Args:
        *args: For the next class.
        input_norm: The settings.
        **kwargs: For the next class.

    Raises:
        TypeError: If `input_norm` is no `InputNorm`; when a class is made, if the mixin comes after
            `LightningDataModule` or an overridden method does not call the mixin's.

    Example::

        class Data(OnlineInputNormMixin, L.LightningDataModule):
            def __init__(self):
                super().__init__(input_norm=InputNorm(num_features=3))
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_subclass(cls, OnlineInputNormMixin, _HOOKS)

    def __init__(self, *args: Any, input_norm: InputNorm, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(input_norm, InputNorm):  # pyright: ignore[reportUnnecessaryIsInstance] # callers may be untyped
            raise TypeError(f"input_norm must be an InputNorm, got {input_norm!r}")
        self._standardizer = OnlineStandardizer(input_norm)
        self._home = SharedStatistics(self._standardizer.state_dict())
        self._fit: InputFit | None = None

    @property
    def input_norm(self) -> InputNorm:
        """The settings."""
        return self._online.settings

    @property
    def input_scale(self) -> float:
        """What the standardised input is multiplied by at present."""
        return self._online.scale

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
        trainer, online = self.trainer, self._online
        if trainer is None:  # called by hand
            return self.replace_input(batch, self._evaluate(batch, torch.float32))
        module = trainer.lightning_module
        if overrides("on_after_batch_transfer", module):
            batch = module.on_after_batch_transfer(batch, dataloader_idx)
        if is_example(module, batch):
            example = _normalized_example(batch, online)
            if example is batch and trainer.state.stage is None:  # no loop runs: an export, or a call by hand
                rank_zero_info(_LEFT_ALONE.format(name=type(self).__name__))
            return example
        if self._fit is None or not self._fit.is_of(trainer):
            self._fit = InputFit(trainer, self, online, self._home)
        self._fit.before_batch(trainer)
        dtype = trainer.precision_plugin.convert_input(torch.zeros((), dtype=torch.float32)).dtype
        if not trainer.training and not trainer.sanity_checking:
            return self.replace_input(batch, self._evaluate(batch, dtype))
        values, mask = self.select_input(batch), self.select_mask(batch)
        if trainer.sanity_checking:
            return self.replace_input(batch, online.preview(values, mask, dtype=dtype))
        group, ranks = (None, 1) if online.is_frozen else _data_parallel_group(trainer)
        result = online.train(values, mask, dtype=dtype, group=group, ranks=ranks)
        self._fit.after_batch(trainer, values)
        return self.replace_input(batch, result)

    def select_input(self, batch: Any) -> Tensor:
        """Return the tensor of a batch that is to be standardised; override it for batches of other structure.

        Args:
            batch: A batch as the data loader makes it.

        Returns:
            The raw input.

        Raises:
            TypeError: If `InputNorm(key=...)` does not lead to a tensor.
        """
        return select_tensor(batch, self._online.settings.key, "key")

    def replace_input(self, batch: Any, value: Tensor) -> Any:
        """Return a batch with another input; override it together with `select_input`.

        Args:
            batch: The batch, which must not be changed.
            value: What takes the place of the input.

        Returns:
            The new batch.
        """
        return replace_tensor(batch, self._online.settings.key, value)

    def select_mask(self, batch: Any) -> Tensor | None:
        """Return which values of a batch count, True where they do; override it where the mask must be computed.

        Args:
            batch: The batch.

        Returns:
            A boolean tensor that broadcasts to the input, or None if all values count.
        """
        key = self._online.settings.mask_key
        return None if key is None else select_tensor(batch, key, "mask_key")

    def input_statistics(self) -> InputStatistics:
        """Return mean and standard deviation of all training data seen so far.

        Returns:
            float64 tensors of shape `(C,)` in units of the input range: for uint8 in [0, 1], as the `Normalize` of
            torchvision wants them.

        Raises:
            MissingStatisticsError: If there are none yet.
        """
        return self._online.statistics()

    def load_input_statistics(self, path: str | Path, *, weights_only: bool = True) -> None:
        """Load the statistics from a checkpoint, whatever the name of the class that saved them.

        Args:
            path: A checkpoint of a Trainer; of a distributed one, the directory.
            weights_only: Whether to refuse anything but tensors and plain values. Checkpoints with hyperparameters of
                other types need False, which runs code from the file: only for files that you trust.

        Raises:
            ValueError: If the checkpoint has no input statistics or those of several DataModules, or if they cannot be
                used in this mode: those of mode `"fixed"` in another.
        """
        state = read_input_statistics(Path(path), weights_only=weights_only)
        lack = read_state(state, self._online.settings).lacks(self._online.settings.mode)
        if lack is not None:
            raise ValueError(f"the input statistics of {path} cannot be used: {lack}")
        self._load(state)

    def export_normalizer(self) -> FixedNormalizer:
        """Return the normalisation with the present statistics as a module that needs no Lightning.

        Returns:
            A module with buffers only, for TorchScript, `torch.export` and ONNX. It takes raw batches, and gives what
            the network was validated with.

        Raises:
            MissingStatisticsError: If there are no statistics yet.
        """
        return self._online.normalizer()

    def denormalize(self, values: Tensor) -> Tensor:
        """Undo the normalisation, for pictures of what the network was given.

        While training, in `training_step` and its hooks, that is the normalisation of the present training batch: in
        mode `"batch"` by its own mean and standard deviation. Anywhere else it is that of evaluation.

        Args:
            values: Standardised values: a batch, or one sample without the dimension of the batch.

        Returns:
            Values in units of the input range: what came as uint8 lies in [0, 1].

        Raises:
            MissingStatisticsError: If there are no statistics yet.
        """
        trainer = self.trainer
        return self._online.denormalize(values, is_training=trainer is not None and trainer.training)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the DataModule with the input statistics, for a checkpoint."""
        return {**super().state_dict(), STATE_NAME: self._online.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the input statistics from a checkpoint.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If the statistics in it cannot be those of such an input; nothing is taken over then.
        """
        if STATE_NAME in state_dict:
            read_state(state_dict[STATE_NAME], self._online.settings)  # before anything is taken over
        super().load_state_dict({name: value for name, value in state_dict.items() if name != STATE_NAME})
        if STATE_NAME in state_dict:
            self._load(state_dict[STATE_NAME])

    @property
    def _online(self) -> OnlineStandardizer:
        """The standardiser, with what a process that was spawned has learned meanwhile."""
        if "_standardizer" not in vars(self):
            raise MisconfigurationException(_NOT_INITIALIZED.format(name=type(self).__name__))
        learned = self._home.take()
        if learned is not None:
            self._standardizer.load_state_dict(learned)
        return self._standardizer

    def _load(self, state: dict[str, Any]) -> None:
        online = self._online
        online.load_state_dict(state)
        text = None if online.saved is None else on_other_constants(online.saved, online.settings)
        if text is not None:
            rank_zero_warn(f"{type(self).__name__}: {text}")

    def _evaluate(self, batch: Any, dtype: torch.dtype) -> Tensor:
        """Return the standardised input of a batch of evaluation."""
        try:
            return self._online.evaluate(self.select_input(batch), self.select_mask(batch), dtype=dtype)
        except MissingStatisticsError as error:
            saved, mode = self._online.saved, self._online.settings.mode
            lack = None if saved is None else saved.lacks(mode)
            loaded = f". Statistics were loaded, but {lack}" if lack else ""
            raise MisconfigurationException(_NO_STATISTICS.format(name=type(self).__name__) + loaded) from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {**vars(self), "_fit": None}


def _normalized_example(batch: Any, online: OnlineStandardizer) -> Any:
    """Return an example input, which Lightning sends through this hook for summaries, graphs and exports.

    It is meant for the network and passed on as it is, unless it is an image or another raw integer signal, which no
    network takes.
    """
    values: Any = batch if isinstance(batch, Tensor) else next(iter(batch), None) if is_sequence(batch) else None
    if not isinstance(values, Tensor) or values.dtype not in (torch.uint8, torch.int8, torch.int16):
        return batch
    result = online.preview(values)
    return result if batch is values else replace_tensor(batch, 0, result)


def _data_parallel_group(trainer: Trainer) -> tuple[Any, int]:
    """Return the process group whose ranks hold different parts of a batch, and how many these are.

    Raises:
        MisconfigurationException: If the strategy has several ranks that torch.distributed does not know.
    """
    if trainer.world_size == 1:
        return None, 1
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise MisconfigurationException(
            f"OnlineInputNormMixin needs torch.distributed to add up the statistics of {trainer.world_size} ranks, "
            f"which {type(trainer.strategy).__name__} does not use. Give constants with InputNorm(mode='fixed')"
        )
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    if mesh is not None and "data_parallel" in (mesh.mesh_dim_names or ()):
        group = mesh["data_parallel"].get_group()
        return group, torch.distributed.get_world_size(group)
    return None, trainer.world_size
