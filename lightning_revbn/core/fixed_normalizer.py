"""Normalises tensors with given constants, `(x - mean) * gain`, in few passes over memory; and the inverse."""

# No `from __future__ import annotations` here: TorchScript cannot read postponed annotations.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_revbn.core.channel_view import ChannelView, Scratch, channel_view, dense, pieces
from lightning_revbn.core.compiled import compile_once
from lightning_revbn.core.input_masks import kept_values, valid_values
from lightning_revbn.core.keep_rules import KeepRules, blank_

__all__ = [
    "Constants",
    "FixedNormalizer",
    "arithmetic_dtype",
    "denormalize",
    "standardize",
    "standardize_in_one_kernel",
]


@dataclass(frozen=True)
class Constants:
    """The constants of `(x - mean) * gain` per channel, in the precision of the arithmetic.

    A mean that needs more digits than this precision has is two numbers, `mean` and `rest`, subtracted in turn.

    Attributes:
        mean: The mean, rounded, shape `(C,)`.
        rest: The part of the mean that rounding took, shape `(C,)`; None if the result cannot show it.
        gain: The factor of the difference, shape `(C,)`.
        bound: The largest absolute value of results, shape `(C,)`; None does not bound them.
    """

    mean: Tensor
    rest: Tensor | None
    gain: Tensor
    bound: Tensor | None = None

    @classmethod
    def of(
        cls,
        mean: Tensor,
        rest: Tensor,
        gain: Tensor,
        dtype: torch.dtype,
        size: float = 1.0,
        bound: Tensor | None = None,
        is_traced: bool = False,
    ) -> "Constants":
        """Round constants to the precision of the arithmetic.

        Args:
            mean: The mean, float64, shape `(C,)`.
            rest: The part of the mean that rounding to float64 has lost, float64, shape `(C,)`.
            gain: The factor of the difference, float64, shape `(C,)`.
            dtype: The precision, float32 or float64.
            size: The standard deviation of the results, to judge whether they can show the rest.
            bound: The largest absolute value of results, float64, shape `(C,)`; None does not bound them.
            is_traced: Whether a compiled graph computes the constants, which cannot read a number.

        Returns:
            The constants in that precision.
        """
        rounded = (mean + rest).to(dtype)
        rest = (mean - rounded.double()) + rest
        bound = None if bound is None else bound.to(dtype)
        left: Tensor | None = rest.to(dtype)
        # On CPUs a rest that changes results by less than 2^-21 of their standard deviation is left out, which saves a
        # pass over memory. On an accelerator the comparison would make the host wait, so the rest is always subtracted.
        if rest.device.type == "cpu":
            is_small = (rest * gain).abs().le(size * 2.0**-21).all()
            if is_traced:
                left = torch.where(is_small, 0.0, left)
            elif is_small:
                left = None
        return cls(rounded, left, gain.to(dtype), bound)

    def to(self, device: torch.device) -> "Constants":
        """Return the constants on a device."""
        if self.mean.device == device:
            return self
        return self._map(lambda column: column.to(device))

    def spread(self, view: ChannelView, part: Tensor) -> "Constants":
        """Return the constants in shapes that broadcast against a part of a view."""
        return self._map(lambda column: view.spread(column, part))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Constants":
        """Return changed constants."""
        rest, bound = (None if column is None else change(column) for column in (self.rest, self.bound))
        return Constants(change(self.mean), rest, change(self.gain), bound)


def arithmetic_dtype(values: torch.dtype) -> torch.dtype:
    """Return the precision in which values are normalised.

    Args:
        values: The dtype of the values.

    Returns:
        float64 for dtypes whose values float32 cannot hold, else float32.
    """
    wide = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
    return torch.float64 if values in wide else torch.float32


def standardize(
    values: Tensor,
    constants: Constants,
    channel_dim: int | None,
    dtype: torch.dtype,
    rules: KeepRules | None = None,
    compile: bool = False,
    fill: float = 0.0,
) -> Tensor:
    """Return `(values - mean) * gain`, cut to the bound, as a new tensor in the memory format of `values`.

    Args:
        values: A tensor of any rank and real dtype.
        constants: The constants, in the dtype `arithmetic_dtype(values.dtype)`, on the device of `values`.
        channel_dim: The dimension of the channels; None takes all values as a single channel.
        dtype: The dtype of the result.
        rules: The rules for the values to keep; None keeps all.
        compile: Whether to use a compiled kernel; its result is equal to the bit.
        fill: The result in place of values that are not kept.

    Returns:
        A tensor of the same shape.
    """
    values = dense(values)
    if compile:
        columns = constants.mean, constants.rest, constants.gain, constants.bound
        result = compile_once(standardize_in_one_kernel)(values, *columns, channel_dim, dtype)
        kept = None if rules is None else _kept(values, rules, channel_dim)
        return result if kept is None else result.masked_fill_(~kept, fill)
    # The result gets the strides of `values`, so both tensors divide into the same pieces, and the pieces of the result
    # are views: writing into them writes the result.
    result = torch.empty_strided(values.shape, values.stride(), dtype=dtype, device=values.device)
    source = channel_view(values, channel_dim)
    target = channel_view(result, channel_dim)
    masks = None if rules is None else rules.on(values, source, channel_dim)
    scratch = Scratch()
    for index, (from_part, to_part) in enumerate(zip(source.parts, target.parts, strict=True)):
        spread = constants.spread(source, from_part)
        for at in pieces(from_part, None if values.device.type == "cpu" else values.numel()):
            bits = None if masks is None else masks.kept_bits(index, at, constants.mean.dtype)
            _standardize_piece(from_part[at], to_part[at], spread, bits, fill, scratch)
    return result


def _standardize_piece(
    source: Tensor, target: Tensor, constants: Constants, bits: Tensor | None, fill: float, scratch: Scratch
) -> None:
    """Write a standardised piece, with `fill` where no bits are set; the constants broadcast to the piece."""
    dtype = constants.mean.dtype
    exact = dtype == target.dtype
    # The values are copied into the precision of the arithmetic once, and all operations work in place: each temporary
    # tensor would cost a pass over memory.
    work = (target if exact else scratch.like(source, dtype)).copy_(source)
    work.sub_(constants.mean)
    if constants.rest is not None:
        work.sub_(constants.rest)
    work.mul_(constants.gain)
    if constants.bound is not None:
        work.clamp_(-constants.bound, constants.bound)
    if bits is not None:
        blank_(work, bits, fill if exact else 0.0)
    if not exact:
        target.copy_(work)
        if bits is not None and fill:
            target.masked_fill_(bits == 0, fill)  # after the copy, so that `fill` is rounded only once


def _kept(values: Tensor, rules: KeepRules, channel_dim: int | None) -> Tensor | None:
    """Return True where rules keep a value, in a shape that broadcasts to the values; None if they keep all."""
    chosen = None
    if rules.spared is not None and channel_dim is not None:
        shape = [1] * values.dim()
        shape[channel_dim] = -1
        chosen = ~rules.spared.view(shape)
    return kept_values(values, valid_values(values, rules.mask, [*rules.nodata]), rules.drops_nan, chosen)


def standardize_in_one_kernel(
    values: Tensor,
    mean: Tensor,
    rest: Tensor | None,
    gain: Tensor,
    bound: Tensor | None,
    channel_dim: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the result of `standardize` without rules; compiled, a single kernel reads every value once.

    Args:
        values: A dense tensor.
        mean: The columns of `Constants`.
        rest: The part of the mean that rounding took.
        gain: The factor.
        bound: The largest absolute value of results.
        channel_dim: The dimension of the channels.
        dtype: The dtype of the result.

    Returns:
        A tensor of the same shape.
    """
    shape = [1] * values.dim()
    if channel_dim is not None:
        shape[channel_dim] = -1
    work = values.to(mean.dtype) - mean.view(shape)
    if rest is not None:
        work = work - rest.view(shape)
    work = work * gain.view(shape)
    if bound is not None:
        work = work.clamp(-bound.view(shape), bound.view(shape))
    return work.to(dtype)


class FixedNormalizer(nn.Module):
    """The normalisation of `OnlineInputNormMixin` with fixed statistics, as a module without Lightning.

    The module has buffers and no parameters. It can be scripted, exported by `torch.export` and to ONNX, and put in
    front of a trained network. `half`, `bfloat16`, `double` and `to` change the dtype of its results; its constants
    keep their precision.

    Args:
        mean: The mean in units of the input range, float64, shape `(C,)`.
        gain: The factor of deviations from the mean, per input range, float64, shape `(C,)`.
        channel_dim: The dimension of the channels; None takes all values as a single channel.
        input_range: Raw values are divided by this number; None divides uint8 by 255 and other dtypes by 1.
        kind: The kind of the training batches, if `input_range` is None: "uint8" refuses other integers, "integer"
            refuses uint8, other texts refuse nothing.
        bound: The largest absolute value of results; None does not bound them.
        fill: The result for masked values, `nodata` and NaN. With None, masked values and `nodata` become 0, and NaN
            stays NaN.
        nodata: Numbers that stand for a missing value.
        channels: Indices of the channels to normalise; other channels stay as they are. None is all channels.

    Example:
        >>> normalizer = FixedNormalizer(torch.tensor([0.5]).double(), torch.tensor([2.0]).double(), input_range=None)
        >>> normalizer(torch.tensor([[0], [255]], dtype=torch.uint8)).tolist(), normalizer(torch.ones(1, 1)).item()
        ([[-1.0], [1.0]], 1.0)
    """

    byte_mean: Tensor
    byte_gain: Tensor
    other_mean: Tensor
    other_gain: Tensor
    result: Tensor
    chosen: Tensor | None
    bound: float | None
    nodata: list[float]

    def __init__(
        self,
        mean: Tensor,
        gain: Tensor,
        channel_dim: int | None = 1,
        input_range: float | None = None,
        kind: str = "unknown",
        *,
        bound: float | None = None,
        fill: float | None = None,
        nodata: Sequence[float] = (),
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.channel_dim = 0 if channel_dim is None else channel_dim
        self.one_channel = channel_dim is None
        self.byte_range = 255.0 if input_range is None else input_range
        self.other_range = 1.0 if input_range is None else input_range
        self.kind = kind
        self.bound = bound
        self.fill = 0.0 if fill is None else fill
        self.replaces_nan = fill is not None
        self.nodata = [*nodata]
        chosen = None
        if channels is not None:
            chosen = torch.tensor([channel in channels for channel in range(len(mean))], device=mean.device)
        self.register_buffer("chosen", chosen, persistent=False)
        # Each constant is the sum of three float32 numbers: these hold all digits of float64, also on devices without
        # float64.
        for name, unit in (("byte", self.byte_range), ("other", self.other_range)):
            raw_mean, raw_gain = mean * unit, gain / unit
            if chosen is not None:
                raw_mean, raw_gain = torch.where(chosen, raw_mean, 0.0), torch.where(chosen, raw_gain, 1.0)
            self.register_buffer(f"{name}_mean", _in_three(raw_mean))
            self.register_buffer(f"{name}_gain", _in_three(raw_gain))
        # Conversions of the module change the dtype of this empty buffer, which is the dtype of results.
        self.register_buffer("result", torch.empty(0), persistent=False)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise a batch.

        Args:
            values: Raw values with the channels at `channel_dim`.
            mask: True where values count; broadcasts to `values`. None counts all values.

        Returns:
            The normalised values, in the shape of `values`: float32, or the dtype that the module was converted to.

        Raises:
            ValueError: If the training batches were uint8 and `values` are other integers, or the other way round.
        """
        is_bytes = values.dtype == torch.uint8
        is_whole = not values.is_floating_point()
        if (self.kind == "uint8" and is_whole and not is_bytes) or (self.kind == "integer" and is_bytes):
            raise ValueError(
                "the statistics are of integers of another dtype and range: convert the values to the dtype of training"
            )
        mean, gain = (self.byte_mean, self.byte_gain) if is_bytes else (self.other_mean, self.other_gain)
        if not self.one_channel:
            shape = [3] + [1] * values.dim()
            shape[self.channel_dim if self.channel_dim < 0 else self.channel_dim + 1] = -1
            mean, gain = mean.view(shape), gain.view(shape)
        # float32 cannot hold all integers of 32 bits or more, nor float64.
        if values.element_size() > 2 and values.dtype != torch.float32:
            mean, gain = mean.double().sum(0), gain.double().sum(0)
            return self._cut_and_fill((values.double() - mean) * gain, values, mask)
        # In float32 the third part of the mean and the smaller parts of the gain are below the rounding of results.
        return self._cut_and_fill((values.float() - mean[0] - mean[1]) * gain[0], values, mask)

    def _cut_and_fill(self, result: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Cut results to the bound, and write `fill` where values do not count."""
        chosen, bound = self.chosen, self.bound
        if chosen is not None:
            shape = [1] * values.dim()
            shape[self.channel_dim] = -1
            chosen = chosen.view(shape)
        if bound is not None:
            cut = result.clamp(-bound, bound)
            result = cut if chosen is None else torch.where(chosen, cut, result)
        result = result.to(self.result.dtype)
        kept = kept_values(values, valid_values(values, mask, self.nodata), self.replaces_nan, chosen)
        return result if kept is None else result.masked_fill(~kept, self.fill)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the constants in float32 where `result`, the buffer that holds the dtype of results, is converted."""
        # `half`, `to` and all other conversions end in this private method; torch has no public hook for a tensor.
        kept = {name: buffer for name, buffer in self.named_buffers() if name != "result"}
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType] # torch does not type it
        for name, before in kept.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return self


def _in_three(constant: Tensor) -> Tensor:
    """Return three float32 numbers whose sum is the float64 number, shape `(3, C)`."""
    parts: list[Tensor] = []
    for _ in range(3):
        parts.append(constant.float())
        constant = constant - parts[-1].double()
    return torch.stack(parts)


def denormalize(values: Tensor, mean: Tensor, rest: Tensor, gain: Tensor, channel_dim: int | None) -> Tensor:
    """Undo the normalisation: return `values / gain + mean`.

    Args:
        values: Normalised values.
        mean: The mean, float64, shape `(C,)`.
        rest: The part of the mean that rounding has lost, float64, shape `(C,)`.
        gain: The factor of the normalisation, float64, shape `(C,)`.
        channel_dim: The dimension of the channels; None takes all values as a single channel.

    Returns:
        A tensor of the same shape, float32 or float64.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    shape = [1] * values.dim()
    if channel_dim is not None:
        shape[channel_dim] = -1
    inverse, middle = ((column).to(values.device, dtype).view(shape) for column in (1 / gain, mean + rest))
    return values.to(dtype) * inverse + middle
