"""Standardises raw batches while they come in, with statistics that are learned on the way.

The state is plain tensors, never buffers of a module: nothing rebroadcasts, casts or shards it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from lightning_revbn.core.arguments import as_integer, as_number, check_choice
from lightning_revbn.core.fixed_normalizer import Constants, FixedNormalizer, arithmetic_dtype, denormalize, standardize
from lightning_revbn.core.input_checks import InputError, check_input, refuse_faults
from lightning_revbn.core.input_statistics import InputStatistics, LearnedStatistics, MissingStatisticsError
from lightning_revbn.core.moments import Kind, Moments, global_moments

__all__ = [
    "RELU_STD",
    "InputError",
    "InputNorm",
    "InputStatistics",
    "MissingStatisticsError",
    "OnlineStandardizer",
]

RELU_STD = 0.58
"""Standard deviation of ReLU(N(0, 1)), sqrt(1/2 - 1/(2 pi)) = 0.58382, as the paper rounds it: that of the input of a
layer inside a network, in units of the scale of the batch norm before it."""

_Mode: TypeAlias = Literal["batch", "running", "ema", "fixed"]
_NanPolicy: TypeAlias = Literal["error", "ignore"]

_Number = TypeVar("_Number", int, float)

_LOOKS_NORMALIZED_AFTER = 256  # samples
_MISSING = object()


@dataclass(frozen=True)
class InputNorm:
    """How the input is normalised: settings of `OnlineInputNormMixin` and `OnlineStandardizer`.

    The result is `(x / input_range - mean) / sqrt(var + eps) * scale` per channel.

    Args:
        num_features: Number of channels C.
        scale: What the standardised input is multiplied by. "auto" takes 0.58 times the scale of the
            `RevisitedBatchNorm` in the Trainer, as the paper does, and 0.58 where there is none.
        mode: Whose mean and variance are used while training: `"batch"`, those of the global batch (the paper);
            `"running"`, those of everything seen so far, this batch included; `"ema"`, an exponential moving average;
            `"fixed"`, the constants `mean` and `std`. Evaluation uses the statistics of everything seen in training; in
            mode `"ema"` the average.
        momentum: Weight of the newest batch in mode `"ema"`; the other modes forget nothing.
        eps: Added to the variance, in units of `input_range` squared.
        input_range: What raw values are divided by. "auto" is 255 for uint8 and 1 for everything else.
        key: Where a batch holds the input: an index, a key of a mapping, or the name of an attribute. None is the
            tensor itself, the first of a tuple or list, or the only tensor of a mapping.
        channel_dim: Which dimension holds the channels; negative counts from the end. None takes all values together,
            with `num_features=1`.
        mask_key: Where a batch holds a boolean mask, True where values count; it must broadcast to the input. What it
            leaves out becomes 0.
        nan_policy: `"error"` stops training on all ranks, statistics untouched. `"ignore"` leaves NaN out of the
            statistics and in the input. Infinity is always an error.
        freeze_after: After how many samples of all ranks the statistics are kept as they are. From then on the
            statistics of everything seen are used in mode `"batch"` too, and ranks communicate no more.
        mean: Constants of mode `"fixed"`, one a channel, in units of `input_range`.
        std: The same for the standard deviation.
        prefix: First part of the keys that are logged.
        compile: Whether `torch.compile` makes kernels of it, with the same results: faster for uint8, after some
            seconds in the first step. On CPUs that takes a C++ compiler.

    Raises:
        ValueError: If a value is out of range or settings contradict each other.

    Example:
        >>> InputNorm(num_features=3).mode
        'batch'
    """

    num_features: int
    scale: float | Literal["auto"] = "auto"
    mode: _Mode = "batch"
    momentum: float = 0.1
    eps: float = 1e-5
    input_range: float | Literal["auto"] = "auto"
    key: int | str | None = None
    channel_dim: int | None = 1
    mask_key: int | str | None = None
    nan_policy: _NanPolicy = "error"
    freeze_after: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    prefix: str = "revbn"
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(_Mode))
        check_choice("nan_policy", self.nan_policy, get_args(_NanPolicy))
        self._take("num_features", as_integer, lambda count: count >= 1, "be the number of channels, 1 or more")
        if self.channel_dim is None and self.num_features != 1:
            raise ValueError(
                f"channel_dim=None takes all values together, so num_features must be 1, not {self.num_features}"
            )
        if self.channel_dim is not None:
            self._take("channel_dim", as_integer, lambda dim: True, "be an integer or None")
        for name in ("scale", "input_range"):
            if not isinstance(getattr(self, name), str) or getattr(self, name) != "auto":
                self._take(name, as_number, lambda number: number > 0, 'be "auto" or a finite number above 0')
        self._take("eps", as_number, lambda eps: eps >= 0, "be a finite number, 0 or more")
        self._take("momentum", as_number, lambda momentum: 0 < momentum <= 1, "be above 0 and at most 1")
        if self.freeze_after is not None:
            self._take("freeze_after", as_integer, lambda count: count > 0, "be a number of samples above 0, or None")
        if self.mode == "fixed" and self.freeze_after is not None:
            raise ValueError('mode="fixed" collects no statistics, so there is nothing for freeze_after to freeze')
        for name in ("mean", "std"):
            self._check_constants(name)

    def _take(
        self, name: str, read: Callable[[object], _Number | None], is_good: Callable[[_Number], bool], must: str
    ) -> None:
        """Put a plain number in the place of what was given: a NumPy scalar, an array without dimensions or a text."""
        value: object = getattr(self, name)
        number = read(value)
        if number is None or not math.isfinite(number) or not is_good(number):
            raise ValueError(f"{name}={value!r} must {must}")
        object.__setattr__(self, name, number)

    def _check_constants(self, name: str) -> None:
        values: Sequence[float] | None = getattr(self, name)
        if values is None:
            if self.mode == "fixed":
                raise ValueError(f'mode="fixed" needs {name}: one number a channel, in units of input_range')
            return
        if self.mode != "fixed":
            raise ValueError(f'{name} is for mode="fixed"; mode={self.mode!r} learns it from the data')
        numbers = tuple(float(value) for value in values)
        if len(numbers) != self.num_features:
            raise ValueError(f"{name} has {len(numbers)} numbers, num_features is {self.num_features}")
        if not all(math.isfinite(number) and (name == "mean" or number >= 0) for number in numbers):
            raise ValueError(f"{name}={numbers} must be finite" + (" and not negative" if name == "std" else ""))
        object.__setattr__(self, name, numbers)


def _set(settings: InputNorm, name: str, value: object) -> None:
    """Take a value that is there already, and no other."""
    present = vars(settings).get(name, _MISSING)
    if type(present) is not type(value) or present != value:
        raise FrozenInstanceError(f"cannot assign to field {name!r}: make another by dataclasses.replace")


# Hyperparameters may hold it. Where omegaconf is installed, Lightning's loggers copy a dataclass by writing every field
# again, and omegaconf reads the types of the class, where it refuses Literal; LightningCLI reads those of __init__.
InputNorm.__setattr__ = _set
InputNorm.__init__.__annotations__ = get_type_hints(InputNorm)
InputNorm.__annotations__ = dict.fromkeys(InputNorm.__annotations__, Any)

# Checkpoints hold hyperparameters, and are loaded with weights_only=True.
torch.serialization.add_safe_globals([InputNorm])  # pyright: ignore[reportUnknownMemberType] # torch does not type it


class OnlineStandardizer:
    """Standardise batches by statistics that every training batch adds to, on one process or many.

    For plain loops and Fabric; with a Trainer use `OnlineInputNormMixin`. No gradient flows through it, and no batch is
    changed in place.

    Args:
        settings: What is done; `key` and `mask_key` are the caller's business.
        scale: What takes the place of `settings.scale` while that is "auto".

    Example:
        >>> standardizer = OnlineStandardizer(InputNorm(num_features=1, scale=1.0, eps=0.0))
        >>> standardizer.train(torch.tensor([[0], [255]], dtype=torch.uint8)).flatten().tolist()
        [-1.0, 1.0]
        >>> standardizer.statistics().mean.tolist()
        [0.5]
    """

    def __init__(self, settings: InputNorm, scale: float = RELU_STD) -> None:
        self.settings = settings
        self.scale = scale if settings.scale == "auto" else settings.scale
        self._learned = LearnedStatistics.of_nothing(settings.num_features)
        self._faults: Tensor = torch.zeros(3, dtype=torch.float64)
        self._is_frozen = False
        self._constants: dict[Any, Constants] = {}

    @property
    def has_statistics(self) -> bool:
        """Whether a batch was measured, or constants are given."""
        return self.settings.mode == "fixed" or self._learned.kind is not Kind.UNKNOWN

    @property
    def is_frozen(self) -> bool:
        """Whether training batches change nothing any more."""
        return self.settings.mode == "fixed" or self._is_frozen

    @property
    def samples(self) -> int:
        """How many samples of all ranks were measured; on an accelerator this waits for it."""
        return int(self._learned.samples)

    @property
    def is_float(self) -> bool:
        """Whether what was measured are floating-point numbers."""
        return self._learned.kind is Kind.FLOAT

    def set_scale(self, scale: float) -> None:
        """Multiply by another number from here on.

        Args:
            scale: The number.
        """
        self.scale = scale
        self._constants.clear()

    def train(
        self,
        values: Tensor,
        mask: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        group: Any = None,
        ranks: int = 1,
    ) -> Tensor:
        """Add a training batch to the statistics, and standardise it as the mode says.

        Args:
            values: This rank's part of the batch, raw; it may be empty.
            mask: True where values count.
            dtype: That of the result.
            group: The process group of the ranks that share the batch; None is the default group.
            ranks: How many these are. Where there are several, each must call this once a step, and there is one
                collective, unless the statistics are frozen or given.

        Returns:
            The standardised values, of the shape and memory format of `values`.

        Raises:
            InputError: If any rank's values cannot be measured. On accelerators it is `check` that says so.
        """
        check_input(values, mask, self.settings.channel_dim, self.settings.num_features)
        if self.is_frozen:
            return self.evaluate(values, mask, dtype=dtype)
        values = values.detach()
        batch = global_moments(
            values,
            self.settings.channel_dim,
            kind=self._learned.kind,
            shift=self._learned.shift if self.is_float else None,
            mask=mask,
            ignore_nan=self.settings.nan_policy == "ignore",
            group=group,
            ranks=ranks,
            compile=self.settings.compile,
        )
        self._learned = self._learned.to(batch.shift.device)
        self._faults = self._faults.to(batch.shift.device) + batch.faults  # an accelerator is asked for them later
        if batch.shift.device.type == "cpu":
            self.check(values)
        if batch.kind is Kind.UNKNOWN:  # no rank has any values
            return torch.empty_like(values, dtype=dtype)
        momentum = self.settings.momentum if self.settings.mode == "ema" else None
        self._take(self._learned.add(batch, self._faults.sum() == 0, momentum))
        return self._apply(values, mask, self._transform.constants_for(values, batch.moments), dtype)

    def evaluate(self, values: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardise a batch by what was learned in training; change nothing, communicate nothing.

        Args:
            values: The batch, raw.
            mask: True where values count.
            dtype: That of the result.

        Returns:
            The standardised values, of the shape and memory format of `values`.

        Raises:
            MissingStatisticsError: If nothing was learned yet.
        """
        check_input(values, mask, self.settings.channel_dim, self.settings.num_features)
        key = values.dtype, values.device
        if key not in self._constants:
            if values.device.type != "mps":  # has no float64, in which the statistics are
                self._learned, self._faults = self._learned.to(values.device), self._faults.to(values.device)
            self._constants[key] = self._transform.constants_for(values)
        return self._apply(values.detach(), mask, self._constants[key], dtype)

    def preview(self, values: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardise a batch before there are statistics, by its own alone; remember nothing, communicate nothing.

        Args:
            values: The batch, raw.
            mask: True where values count.
            dtype: That of the result.

        Returns:
            The standardised values.
        """
        if self.has_statistics:
            return self.evaluate(values, mask, dtype=dtype)
        other = OnlineStandardizer(replace(self.settings, nan_policy="ignore"), self.scale)
        return other.train(values, mask, dtype=dtype)

    def check(self, values: Tensor | None = None) -> None:
        """Raise if a training batch could not be measured; on accelerators this waits for the batch.

        Args:
            values: This rank's part of the batch, to say more about it.

        Raises:
            InputError: If so.
        """
        faults = [int(count) for count in self._faults]
        self._faults = torch.zeros_like(self._faults)
        refuse_faults(faults, self._learned.kind, values, ignore_nan=self.settings.nan_policy == "ignore")

    def statistics(self) -> InputStatistics:
        """Return mean and standard deviation of all training data seen so far, in units of the input range.

        Returns:
            Tensors on the CPU. In mode `"fixed"` the given constants.

        Raises:
            MissingStatisticsError: If nothing was learned yet.
        """
        return self._transform.statistics()

    def normalizer(self) -> FixedNormalizer:
        """Return what `evaluate` does now as a module without Lightning.

        Returns:
            A module with buffers only, on the CPU.
        """
        shift, mean, gain = self._transform.constants_in_units()
        given = self.settings.input_range
        return FixedNormalizer(shift + mean, gain, self.settings.channel_dim, None if given == "auto" else given)

    def denormalize(self, values: Tensor) -> Tensor:
        """Undo what `evaluate` does: for pictures of what a network was given.

        Args:
            values: Standardised values.

        Returns:
            Values in units of the input range: pictures that came as uint8 lie in [0, 1].
        """
        check_input(values, None, self.settings.channel_dim, self.settings.num_features)
        return denormalize(values, *self._transform.constants_in_units(), self.settings.channel_dim)

    def looks_normalized(self) -> bool | None:
        """Tell whether the data have mean 0 and standard deviation 1 already; None while too few were seen."""
        if self.settings.mode == "fixed" or not self.is_float:
            return False
        if self.samples < _LOOKS_NORMALIZED_AFTER:
            return None
        return self.statistics().look_normalized()

    def lost_channels(self, dtype: torch.dtype) -> list[int]:
        """List the channels whose spread numbers of a dtype cannot hold, since their mean is so large.

        Args:
            dtype: That of the raw values.

        Returns:
            Indices of channels.
        """
        if self.settings.mode == "fixed" or not dtype.is_floating_point or dtype.itemsize > 2:
            return []
        return self.statistics().lost_channels(dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was learned, on the CPU."""
        return {"scale": self.scale, "input_range": _unit(self.settings, self._learned.kind), **self._learned.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learned.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it is of another number of channels.
        """
        factor = _unit(self.settings, Kind[state["kind"]]) / state["input_range"]  # the range may be another now
        learned = LearnedStatistics.from_state(state, self.settings.num_features, factor)
        if self.settings.scale == "auto":
            self.scale = float(state["scale"])
        self._faults = torch.zeros(3, dtype=torch.float64)
        self._take(learned)

    @property
    def _transform(self) -> _Transform:
        """The transform that is in force."""
        if not self.has_statistics:
            raise MissingStatisticsError("there are no input statistics yet: train first, or load them")
        return _Transform(self.settings, self.scale, self._learned)

    def _take(self, learned: LearnedStatistics) -> None:
        """Replace the statistics, and freeze them if it is time."""
        self._learned = learned
        self._constants.clear()
        limit = self.settings.freeze_after
        # Without a limit the number is not asked for, since on an accelerator the host would wait for it.
        self._is_frozen = limit is not None and self.samples >= limit

    def _apply(self, values: Tensor, mask: Tensor | None, constants: Constants, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return standardize(values, constants, self.settings.channel_dim, dtype, mask, self.settings.compile)


@dataclass(frozen=True)
class _Transform:
    """The transform `(x - mean) * gain` that settings and statistics ask for, in raw units and in units of the range.

    All arithmetic is float64; the constants are rounded once, at the end.
    """

    settings: InputNorm
    scale: float
    learned: LearnedStatistics

    def statistics(self) -> InputStatistics:
        """Return given or learned statistics in units of the input range, on the CPU."""
        if self.settings.mode == "fixed":
            mean, std = (torch.tensor(given, dtype=torch.float64) for given in (self.settings.mean, self.settings.std))
            return InputStatistics(mean, std, torch.zeros_like(mean))
        total = self.learned.total.moved(self.learned.shift).scaled(_unit(self.settings, self.learned.kind))
        return InputStatistics(total.mean.cpu(), total.std.cpu(), total.count.cpu())

    def constants_in_units(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return shift, mean from there and gain in units of the input range, on the CPU."""
        mean, variance = self._estimate()
        unit = _unit(self.settings, self.learned.kind)
        scaled = (self.learned.shift / unit, mean / unit, variance / unit**2)
        shift, mean, variance = (tensor.cpu() for tensor in scaled)
        return shift, mean, self._gain(shift + mean, variance)

    def constants_for(self, values: Tensor, batch: Moments | None = None) -> Constants:
        """Return constants for a batch of training or evaluation, in the dtype of its arithmetic and on its device."""
        mean, variance = self._estimate(batch)
        learned = _unit(self.settings, self.learned.kind)
        gain = self._gain((self.learned.shift + mean) / learned, variance / learned**2)
        # What was learned from bytes also standardises floats from 0 to 1, and the other way round.
        unit = _unit(self.settings, Kind.UINT8 if values.dtype == torch.uint8 else Kind.FLOAT)
        shift = self.learned.shift
        if unit != learned:
            shift, mean = shift / learned * unit, mean / learned * unit
        constants = Constants.of(shift, mean, gain / unit, arithmetic_dtype(values.dtype), self.scale)
        if constants.mean.device == values.device:
            return constants
        rest = None if constants.rest is None else constants.rest.to(values.device)
        return Constants(constants.mean.to(values.device), rest, constants.gain.to(values.device))

    def _estimate(self, batch: Moments | None = None) -> tuple[Tensor, Tensor]:
        """Return mean, from the shift, and variance in raw units: for a training batch, or for evaluation."""
        if self.settings.mode == "fixed":
            given = self.statistics()
            return given.mean.to(self.learned.shift.device), given.std.square().to(self.learned.shift.device)
        if self.settings.mode == "ema":
            return self.learned.average.mean, self.learned.average.variance
        total = self.learned.total
        if batch is None or self.settings.mode == "running":
            return total.mean, total.variance
        # One value has no spread: its channel is standardised by everything seen so far.
        lonely = batch.count <= 1
        return torch.where(lonely, total.mean, batch.mean), torch.where(lonely, total.variance, batch.variance)

    def _gain(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Return what deviations are multiplied by; all in units of the input range."""
        # A channel that never changed has no spread to divide by, and the rounding of its mean is no spread either.
        constant = variance <= (8 * torch.finfo(torch.float64).eps * mean).square()
        return self.scale / torch.where(constant, 1.0, (variance + self.settings.eps).sqrt())


def _unit(settings: InputNorm, kind: Kind) -> float:
    """Return what raw values of a kind are divided by."""
    if settings.mode == "fixed" and kind is Kind.UNKNOWN:
        return 1.0
    given = settings.input_range
    return (255.0 if kind is Kind.UINT8 else 1.0) if given == "auto" else given
