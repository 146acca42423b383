"""The settings of input normalisation, for `OnlineInputNormMixin` and `OnlineStandardizer`."""

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
"""Standard deviation of ReLU(N(0, 1)), sqrt(1/2 - 1/(2 pi)) = 0.58382, as the paper rounds it.

A layer inside a network reads values of this standard deviation, times the scale of the batch norm layer before it. So
that the first layer reads such values too, the standardised input is multiplied by it.
"""

Mode: TypeAlias = Literal["batch", "running", "ema", "fixed"]
_NanPolicy: TypeAlias = Literal["error", "ignore"]

MODES: tuple[str, ...] = get_args(Mode)
"""All modes."""

_Number = TypeVar("_Number", int, float)

_MISSING = object()

_HALF = torch.finfo(torch.float16).max
"""Largest `fill`, since results may be float16."""


@dataclass(frozen=True)
class InputNorm:
    """Settings of input normalisation, for `OnlineInputNormMixin` and `OnlineStandardizer`.

    The result is `(x / input_range - mean) / sqrt(var + eps) * scale` per channel.

    Args:
        num_features: Number of channels C.
        scale: The standardised input is multiplied by this number. "auto" takes 0.58 times the scale of the
            `RevisitedBatchNorm` in the Trainer, as the paper does, and 0.58 without such a callback.
        mode: The mean and variance to train with: `"batch"`, of the global batch (the paper); `"running"`, of all
            training data so far, this batch included; `"ema"`, an exponential moving average over batches; `"fixed"`,
            the constants `mean` and `std`. Evaluation uses the statistics of all training data so far in modes
            `"batch"` and `"running"`, the average in mode `"ema"`, and the constants in mode `"fixed"`.
        momentum: Weight of the newest batch in mode `"ema"`, above 0 and at most 1; the other modes ignore it.
        eps: Added to the variance, in units of `input_range` squared.
        input_range: Raw values are divided by this number. "auto" is 255 for uint8 and 1 for every other dtype.
        key: The place of the input in a batch: an index, a key of a mapping, or the name of an attribute; a tuple of
            these is a path into a nested batch. A list of places, such as `[0, 1]` for two views, is an input at
            several places, which share a mean and a variance. With None the input is the batch itself if it is a
            tensor, the first element of a tuple or list, or the only tensor of a mapping; a warning names further
            tensors of the same dtype and shape.
        channel_dim: The dimension of the channels; a negative number counts from the end. None takes all values as one
            channel, and needs `num_features=1`.
        mask_key: The place of a boolean mask, True where values count; the mask must broadcast to the input. Values
            where it is False become 0, or `fill`. A list names a mask for each place of `key`; a single mask applies
            to all places.
        eval_key: The place of the input in batches of validation, test and prediction; None is `key`. Of a list of
            places, each batch of evaluation needs only one, so loaders may return batches of different structure.
        eval_mask_key: The place of the mask in these batches; None is `mask_key`.
        nan_policy: `"error"` stops training on all ranks and leaves the statistics unchanged. `"ignore"` leaves NaN
            out of the statistics; the NaN stays in the input, unless `fill` replaces it. Infinity is always an error
            in training, unless a mask leaves it out.
        freeze_after: Number of samples, of all ranks together, after which the statistics stop changing. From then on
            mode `"batch"` also trains with the statistics of all these samples, and ranks communicate no more.
        mean: Means for mode `"fixed"`, a number per channel, in units of `input_range`.
        std: Standard deviations for mode `"fixed"`, a number per channel, in units of `input_range`.
        prefix: First part of the metric keys.
        compile: Whether to use kernels of `torch.compile`. On CPUs the results are equal to the bit. They are faster
            for uint8 on most processors, but the first step takes some seconds longer, and CPUs need a C++ compiler.
        channels: Indices of the channels to measure and normalise; negative indices count from the end. The other
            channels, such as one-hot columns, stay as they are: they are not divided by `input_range`, masked, clipped
            or filled. None is all channels.
        clip: Bound of the results, in standard deviations: standardised values are cut to `-clip ... clip` before they
            are multiplied by `scale`. It bounds outliers in the result; the statistics count outliers in full.
        fill: The result for masked values, `nodata` and NaN. `scale` and `clip` do not change it; 0 is the mean. With
            None, masked values and `nodata` become 0, and NaN stays NaN.
        nodata: A number, or several, that stands for a missing value in raw data, as in rasters. Such values count as
            masked. Integers must equal the number exactly, floating-point values as their dtype rounds it.

    Raises:
        ValueError: If a value is out of range, or settings contradict each other.

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
        """Return the places of the input and of its mask in a batch.

        Args:
            is_training: Whether the batch is a training batch.

        Returns:
            The key of the input, and the key of the mask.
        """
        key = self.key if is_training or self.eval_key is None else self.eval_key
        return key, self.mask_key if is_training or self.eval_mask_key is None else self.eval_mask_key

    @property
    def nodata_values(self) -> list[float]:
        """The numbers that stand for a missing value, as a list."""
        if self.nodata is None:
            return []
        return [self.nodata] if isinstance(self.nodata, (int, float)) else [*self.nodata]

    def unit(self, kind: Kind) -> float:
        """Return the number that raw values of a kind are divided by.

        Args:
            kind: The kind.

        Returns:
            `input_range`; for "auto" 255 for uint8, else 1.
        """
        if self.input_range == "auto":
            return 255.0 if kind is Kind.UINT8 else 1.0
        return self.input_range

    def _take(
        self, name: str, read: Callable[[object], _Number | None], is_good: Callable[[_Number], bool], must: str
    ) -> None:
        """Check a setting, and store it as a plain number: it may be a NumPy scalar, a 0-d array or a text."""
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
        """Return the indices of channels, not negative and sorted."""
        if self.channel_dim is None:
            raise ValueError(f"channels={given!r} needs a channel_dim: channel_dim=None takes all values together")
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
                raise ValueError(f'mode="fixed" needs {name}: a number per channel, in units of input_range')
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
    """Return a single number as a float, several as a tuple of floats."""
    several = as_number(given) is None and not isinstance(given, str) and isinstance(given, Iterable)
    items: list[object] = [*cast("Iterable[object]", given)] if several else [given]
    numbers = [as_number(item) for item in items]
    found = [number for number in numbers if number is not None and not math.isnan(number)]
    if any(number is not None and math.isnan(number) for number in numbers):
        raise ValueError(
            f'nodata={given!r} matches no value: nan_policy="ignore" leaves NaN out of the statistics, and fill=0.0 '
            "replaces it"
        )
    if not numbers or len(found) != len(numbers):
        raise ValueError(f"nodata={given!r} must be a number such as -9999, several as [-9999, 0], or None")
    inexact = [item for item in items if (whole := as_integer(item)) is not None and int(float(whole)) != whole]
    if inexact:
        raise ValueError(f"nodata={inexact[0]} is rounded in float64: give an integer that float64 holds exactly")
    return tuple(found) if several else found[0]


def _set(settings: InputNorm, name: str, value: object) -> None:
    """Refuse to change a field, but let other code write the value again that the field has."""
    present = vars(settings).get(name, _MISSING)
    if type(present) is not type(value) or present != value:
        raise FrozenInstanceError(f"cannot assign to field {name!r}: make a changed copy with dataclasses.replace")


# An InputNorm may be among the hyperparameters. Where omegaconf is installed, Lightning's loggers copy a dataclass by
# writing every field again, which a frozen dataclass refuses, and omegaconf refuses Literal in the class annotations.
# LightningCLI reads the annotations of __init__, so these keep the types.
InputNorm.__setattr__ = _set
InputNorm.__init__.__annotations__ = get_type_hints(InputNorm)
InputNorm.__annotations__ = dict.fromkeys(InputNorm.__annotations__, Any)

# Checkpoints hold the hyperparameters, and torch.load with weights_only=True refuses classes that it does not know.
torch.serialization.add_safe_globals([InputNorm])  # pyright: ignore[reportUnknownMemberType] # torch does not type it
