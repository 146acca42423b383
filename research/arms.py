"""An arm of an experiment by its settings: the callback's arguments, and the normalisation of the input."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import lightning as L

from lightning_revbn import RevisitedBatchNorm

INPUT_NORMS = ("none", "batch", "dataset")
PAPERS_DIVISOR = 100.0


@dataclass(frozen=True)
class Arm:
    """The settings in which an arm differs from its baseline; the baseline has only defaults.

    Attributes:
        scale: Initial value of batch norm scales; None trains without the callback.
        scale_lr_divisor: Divisor of the scales' learning rate.
        shift_lr_multiplier: Multiplier of the shifts' learning rate.
        eps: The eps of every batch norm layer; None leaves torch's default.
        input_norm: `"none"`; `"batch"`, by the online statistics of the mixin; `"dataset"`, by constants of the
            training data.
    """

    scale: float | None = None
    scale_lr_divisor: float = PAPERS_DIVISOR
    shift_lr_multiplier: float = 1.0
    eps: float | None = None
    input_norm: str = "none"

    @property
    def name(self) -> str:
        """The name in tables and directories, made of every setting that is not the default."""
        parts = [] if self.input_norm == "none" else [f"input_{self.input_norm}"]
        if self.scale is None:
            return "_".join([*parts, "baseline"])
        if not (neutral := self.scale == 1 and self.scale_lr_divisor == 1):
            parts.append(f"scale_{self.scale:g}")
        if not neutral and self.scale_lr_divisor != PAPERS_DIVISOR:
            parts.append(f"divisor_{self.scale_lr_divisor:g}")
        if self.eps is not None:
            parts.append(f"eps_{self.eps:g}")
        if self.shift_lr_multiplier != 1:
            parts.append(f"shifts_x{self.shift_lr_multiplier:g}")
        return "_".join(parts) if len(parts) > (self.input_norm != "none") else "_".join([*parts, "neutral"])

    def callbacks(self) -> list[L.Callback]:
        """Return the Trainer's callbacks: RevisitedBatchNorm if the arm has a scale, otherwise none."""
        if self.scale is None:
            return []
        # No monitor: nobody reads the statistics of so many runs.
        callback = RevisitedBatchNorm(
            scale=self.scale,
            scale_lr_divisor=self.scale_lr_divisor,
            shift_lr_multiplier=self.shift_lr_multiplier,
            eps=self.eps,
            monitor=False,
        )
        return [callback]


BASELINE = Arm()


def parse_arm(text: str) -> Arm:
    """Return the arm that a text such as `scale=0.1,input_norm=batch` or `baseline` describes.

    Args:
        text: Settings of `Arm` as `name=value`, with commas between them; or `baseline`. `input_norm=true` is `batch`.

    Returns:
        The arm.

    Raises:
        ValueError: If a setting is unknown, is given twice or has an invalid value. Also if settings of the callback
            lack a scale, since its default of 0.1 would be easy to overlook.

    Example:
        >>> parse_arm("scale=1,scale_lr_divisor=1,eps=1e-3,shift_lr_multiplier=10").name
        'eps_0.001_shifts_x10'
    """
    settings: dict[str, Any] = {}
    known = [field.name for field in fields(Arm)]
    for part in (part.strip() for part in text.split(",")):
        if part == "baseline":
            continue
        name, is_setting, value = part.partition("=")
        if not is_setting or name not in known:
            raise ValueError(f"arm {text!r}: {part!r} is no setting; use baseline or {', '.join(known)} as name=value")
        if name in settings:
            raise ValueError(f"arm {text!r}: {name} is there twice")
        settings[name] = _input_norm(text, value) if name == "input_norm" else _number(text, name, value)
    if "scale" not in settings and settings.keys() - {"input_norm"}:
        raise ValueError(f"arm {text!r}: say which scale, scale=1,scale_lr_divisor=1 to leave scales alone")
    arm = Arm(**settings)
    try:
        arm.callbacks()
    except ValueError as error:
        raise ValueError(f"arm {text!r}: {error}") from error
    return arm


def _input_norm(text: str, value: str) -> str:
    value = {"true": "batch", "false": "none"}.get(value.lower(), value)
    if value not in INPUT_NORMS:
        raise ValueError(f"arm {text!r}: input_norm={value!r} is unknown: use one of {', '.join(INPUT_NORMS)}")
    return value


def _number(text: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"arm {text!r}: {name}={value!r} is no number") from error


def reference(arm: Arm) -> Arm:
    """Return the arm that another arm is compared with.

    An arm with the callback is compared with the same input without the callback. An arm that changes only the input is
    compared with the baseline.

    Args:
        arm: Any arm.

    Returns:
        The arm's baseline; the baseline is its own.
    """
    return BASELINE if arm.scale is None else Arm(input_norm=arm.input_norm)
