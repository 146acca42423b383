"""How the input is normalised: the settings of `OnlineInputNormMixin` and `OnlineStandardizer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args, get_type_hints

import torch

from lightning_revbn.core.arguments import as_integer, as_number, check_choice
from lightning_revbn.core.batch_places import Key, check_key
from lightning_revbn.core.moments import Kind

__all__ = ["MODES", "RELU_STD", "InputNorm"]

RELU_STD = 0.58
"""Standard deviation of ReLU(N(0, 1)), sqrt(1/2 - 1/(2 pi)) = 0.58382, as the paper rounds it: that of the input of a
layer inside a network, in units of the scale of the batch norm before it."""

Mode: TypeAlias = Literal["batch", "running", "ema", "fixed"]
_NanPolicy: TypeAlias = Literal["error", "ignore"]

MODES: tuple[str, ...] = get_args(Mode)
"""The modes that there are."""

_Number = TypeVar("_Number", int, float)

_MISSING = object()

_HALF = torch.finfo(torch.float16).max


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
        key: Where a batch holds the input: an index, a key of a mapping, or the name of an attribute; a tuple of these
            is a path into a nested batch. A list of places, as in `[0, 1]` for two views, is one input at several
            places, with one mean and variance from all of them. None is the tensor itself, the first of a tuple or
            list, or the only tensor of a mapping; a warning names tensors of the same dtype and shape beside it.
        channel_dim: Which dimension holds the channels; negative counts from the end. None takes all values together,
            with `num_features=1`.
        mask_key: Where a batch holds a boolean mask, True where values count; it must broadcast to the input. What it
            leaves out becomes 0, or `fill`. A list has one mask for each place of `key`; a single mask is for all.
        eval_key: Where batches of validation, test and prediction hold the input, if elsewhere. Of a list, each batch
            needs one place only, so that loaders may give batches of different structure.
        eval_mask_key: The same for the mask.
        nan_policy: `"error"` stops training on all ranks, statistics untouched. `"ignore"` leaves NaN out of the
            statistics and in the input, unless `fill` replaces it. Infinity is always an error.
        freeze_after: After how many samples of all ranks the statistics are kept as they are. From then on the
            statistics of everything seen are used in mode `"batch"` too, and ranks communicate no more.
        mean: Constants of mode `"fixed"`, one a channel, in units of `input_range`.
        std: The same for the standard deviation.
        prefix: First part of the keys that are logged.
        compile: Whether `torch.compile` makes kernels of it, with the same results: faster for uint8 on most
            processors, after some seconds in the first step. On CPUs that takes a C++ compiler.
        channels: Numbers of the channels that are learned and normalised; negative counts from the end. The others,
            such as one-hot columns, stay as they are: neither divided by `input_range` nor masked, clipped or filled.
            None is all channels.
        clip: How many standard deviations from the mean a result may lie, as an outlier does: the standardised value is
            cut to `-clip ... clip` before it is multiplied by `scale`. Statistics count outliers in full.
        fill: What masked values, `nodata` and NaN become: a number in the result, which neither `scale` nor `clip`
            changes, and 0 is the mean. With None, masked values and `nodata` become 0, and NaN stays NaN.
        nodata: A number, or several, that raw values have where there is no value, as rasters do. Such values count as
            masked. Integers must equal it exactly, floating-point values as their dtype rounds it.

    Raises:
        ValueError: If a value is out of range or settings contradict each other.

    Example:
        >>> InputNorm(num_features=3).mode
        'batch'
    """

    num_features: int
    scale: float | Literal["auto"] = "auto"
    mode: Mode = "batch"
    momentum: float = 0.1
    eps: float = 1e-5
    input_range: float | Literal["auto"] = "auto"
    key: Key = field(default=None, hash=False)
    channel_dim: int | None = 1
    mask_key: Key = field(default=None, hash=False)
    eval_key: Key = field(default=None, hash=False)
    eval_mask_key: Key = field(default=None, hash=False)
    nan_policy: _NanPolicy = "error"
    freeze_after: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    prefix: str = "revbn"
    compile: bool = False
    channels: Sequence[int] | None = None
    clip: float | None = None
    fill: float | None = None
    nodata: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
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
        if self.channels is not None:
            object.__setattr__(self, "channels", self._checked_channels(self.channels))
        if self.clip is not None:
            must = "be a number of standard deviations above 0, such as 10, or None to clip nothing"
            self._take("clip", as_number, lambda clip: clip > 0, must)
        if self.fill is not None:
            must = f"be a number from {-_HALF:g} to {_HALF:g}, which half precision holds too, such as 0 for the mean"
            self._take("fill", as_number, lambda fill: abs(fill) <= _HALF, must)
        if self.nodata is not None:
            object.__setattr__(self, "nodata", _checked_nodata(self.nodata))
        for name in ("mean", "std"):
            self._check_constants(name)
        for name in ("key", "mask_key", "eval_key", "eval_mask_key"):
            object.__setattr__(self, name, check_key(name, getattr(self, name)))
        self._check_masks()

    def places(self, *, is_training: bool) -> tuple[Key, Key]:
        """Return where batches hold the input and its mask.

        Args:
            is_training: Whether these are batches of training.

        Returns:
            The key of the input and that of the mask.
        """
        key = self.key if is_training or self.eval_key is None else self.eval_key
        return key, self.mask_key if is_training or self.eval_mask_key is None else self.eval_mask_key

    @property
    def nodata_values(self) -> list[float]:
        """The numbers that stand for no value."""
        if self.nodata is None:
            return []
        return [self.nodata] if isinstance(self.nodata, (int, float)) else [*self.nodata]

    def unit(self, kind: Kind) -> float:
        """Return what raw values of a kind are divided by.

        Args:
            kind: The kind.

        Returns:
            `input_range`, or what "auto" means for the kind.
        """
        if self.input_range == "auto":
            return 255.0 if kind is Kind.UINT8 else 1.0
        return self.input_range

    def _take(
        self, name: str, read: Callable[[object], _Number | None], is_good: Callable[[_Number], bool], must: str
    ) -> None:
        """Put a plain number in the place of what was given: a NumPy scalar, an array without dimensions or a text."""
        value: object = getattr(self, name)
        number = read(value)
        if number is None or not math.isfinite(number) or not is_good(number):
            raise ValueError(f"{name}={value!r} must {must}")
        object.__setattr__(self, name, number)

    def _check_masks(self) -> None:
        for is_training in (True, False):
            key, masks = self.places(is_training=is_training)
            number = len(key) if isinstance(key, list) else 1
            if isinstance(masks, list) and len(masks) != number:
                name = "mask_key" if is_training or self.eval_mask_key is None else "eval_mask_key"
                where = "training" if is_training else "evaluation"
                other = "" if is_training or name == "eval_mask_key" else ". Give eval_mask_key"
                raise ValueError(
                    f"{name}={masks} must have a mask for each place of the input in {where}, {key!r}{other}"
                )

    def _checked_channels(self, given: object) -> tuple[int, ...]:
        """Return numbers of channels in order, counted from the first."""
        if self.channel_dim is None:
            raise ValueError(f"channels={given!r} cannot be told apart: channel_dim=None takes all values together")
        last = self.num_features - 1
        wrong = f"channels={given!r} must be different numbers from 0 to {last}, as [0, {last}], or None for all"
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(wrong)
        numbers = [as_integer(channel) for channel in cast("Iterable[object]", given)]
        valid = (channel for channel in numbers if channel is not None and -last - 1 <= channel <= last)
        found = {channel % self.num_features for channel in valid}
        if not numbers or len(found) != len(numbers):
            raise ValueError(wrong)
        return tuple(sorted(found))

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
            unused = ". Channels that are left out have numbers too, which are not used" if self.channels else ""
            raise ValueError(f"{name} has {len(numbers)} numbers, num_features is {self.num_features}{unused}")
        if not all(math.isfinite(number) and (name == "mean" or number >= 0) for number in numbers):
            raise ValueError(f"{name}={numbers} must be finite" + (" and not negative" if name == "std" else ""))
        object.__setattr__(self, name, numbers)


def _checked_nodata(given: object) -> float | tuple[float, ...]:
    """Return a number or several as floats."""
    several = as_number(given) is None and not isinstance(given, str) and isinstance(given, Iterable)
    items: list[object] = [*cast("Iterable[object]", given)] if several else [given]
    numbers = [as_number(item) for item in items]
    found = [number for number in numbers if number is not None and not math.isnan(number)]
    if any(number is not None and math.isnan(number) for number in numbers):
        raise ValueError(
            f'nodata={given!r} equals no value: nan_policy="ignore" leaves NaN out of the statistics, and fill=0.0 '
            "replaces it"
        )
    if not numbers or len(found) != len(numbers):
        raise ValueError(f"nodata={given!r} must be a number such as -9999, several as [-9999, 0], or None")
    inexact = [item for item in items if (whole := as_integer(item)) is not None and int(float(whole)) != whole]
    if inexact:
        raise ValueError(f"nodata={inexact[0]} cannot be told from its neighbours: float64 holds no such number")
    return tuple(found) if several else found[0]


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
