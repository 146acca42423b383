"""Converts a small scale into equivalent settings of a network whose scales start at 1.

With ReLU, a network whose batch norm layers start at scale g equals a network that starts at scale 1. Only learning
rates, the start of the last linear layer and eps differ. The derivation is in docs/why.md.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ScaleOneTerms", "scale_1_terms"]


@dataclass(frozen=True)
class ScaleOneTerms:
    """The settings with which a network of scale 1 learns the same.

    `str(terms)` is a line of text. Weight decay per step stays the same: where a factor multiplies the learning rate of
    a parameter, it divides the parameter's weight decay.

    Attributes:
        scale_lr: Factor of the learning rate of scales, 1 / (c g²).
        shift_lr: Factor of the learning rate of shifts, k / g².
        head_start: Factor of the starting weights of the last linear layer, g.
        head_lr: Factor of the learning rate of these weights, g².
        eps: eps of every batch norm layer whose input comes from other batch norm layers, eps / g². The first layer,
            which sees the data, keeps its eps.
    """

    scale_lr: float
    shift_lr: float
    head_start: float
    head_lr: float
    eps: float

    def __str__(self) -> str:
        """Return the terms as a line of text."""
        return (
            f"At scale 1 a ReLU network trained by SGD would learn the same with: scales lr x {self.scale_lr:.3g}, "
            f"shifts lr x {self.shift_lr:.3g}, last linear layer x {self.head_start:.3g} at the start and "
            f"lr x {self.head_lr:.3g}, eps {self.eps:.3g} behind the first layer"
        )


def scale_1_terms(
    scale: float, divisor: float = 100.0, shift_multiplier: float = 1.0, eps: float = 1e-5
) -> ScaleOneTerms:
    """Convert settings of the method to settings of a network whose scales start at 1.

    This is exact for networks of ReLU with a uniform scale, trained by SGD with or without momentum and with no scale
    kept at zero. Optimizers that normalise gradients, such as Adam, take other steps; other activations are not
    homogeneous.

    Args:
        scale: The starting value g of scales.
        divisor: The constant c. Values up to 1 leave the learning rate of scales alone.
        shift_multiplier: The factor k of the learning rate of shifts.
        eps: eps of the batch norm layers.

    Returns:
        The terms.

    Example:
        >>> terms = scale_1_terms(0.1, divisor=100, shift_multiplier=1, eps=1e-5)
        >>> print(terms)  # doctest: +NORMALIZE_WHITESPACE
        At scale 1 a ReLU network trained by SGD would learn the same with: scales lr x 1, shifts lr x 100,
        last linear layer x 0.1 at the start and lr x 0.01, eps 0.001 behind the first layer
    """
    square = scale**2
    return ScaleOneTerms(
        scale_lr=1 / (max(divisor, 1.0) * square),  # a divisor below 1 switches the division off
        shift_lr=shift_multiplier / square,
        head_start=scale,
        head_lr=square,
        eps=eps / square,
    )
