"""Permanent parameter groups: scales apart from other parameters, with lr / c in the group itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn

from lightning_revbn.core.arguments import check_choice, check_divisor
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.initialization import rule_scales
from lightning_revbn.core.layers import BatchNormRecord, find_batch_norms

__all__ = [
    "GROUP_MARK",
    "Group",
    "Part",
    "WeightDecayExempt",
    "divide_lr",
    "exempt_parameters",
    "is_divided",
    "parts_of",
    "scale_param_groups",
]

Group: TypeAlias = "dict[str, Any]"
WeightDecayExempt: TypeAlias = Literal["scale", "norm", "vectors"]

GROUP_MARK = "scale_lr_divisor"
"""Key that `scale_param_groups` sets in a group whose learning rate is already divided."""


def scale_param_groups(
    module: nn.Module,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    divisor: float = 100.0,
    weight_decay_exempt: WeightDecayExempt | None = "scale",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[Group]:
    """Sort a model's parameters into permanent groups, the batch norm scales with lr / c.

    For engines that take the parameters away from the optimizer, such as DeepSpeed, and for those who want to see the
    groups. Everywhere else `ScaleUpdateRule` is the better choice: schedules that write one number into every group
    (OneCycleLR and CyclicLR with a scalar, SWALR, CosineAnnealingLR with `eta_min`) destroy the ratio of permanent
    groups, and a checkpoint with other groups cannot be resumed.

    With `weight_decay_exempt="vectors"` these are the paper's groups: weight decay on convolutions and linear layers
    alone. Scales that are 0 in every channel when this is called keep the full learning rate (see
    `InitReport.scales`); so call it on a model that has not been trained yet, or name those layers in `exclude`.

    Args:
        module: The model.
        lr: Learning rate of everything but the scales.
        weight_decay: Weight decay of what is not exempt.
        divisor: The constant c; values up to 1 leave the learning rate alone.
        weight_decay_exempt: What takes no weight decay: `"scale"`, `"norm"` (scales and shifts of batch norm),
            `"vectors"` (batch norm and every bias) or None.
        include: `fnmatch` patterns on dotted names of the layers whose scale is divided.
        exclude: Patterns of layers whose scale is not; stronger than `include`.

    Returns:
        One to four groups for `torch.optim` optimizers, each parameter in exactly one, empty groups left out. The
        groups of the scales carry the key `scale_lr_divisor`, by which `RevisitedBatchNorm` knows them.

    Raises:
        ValueError: If the divisor is not finite and positive, or a pattern or choice is unknown.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> for group in scale_param_groups(model, lr=0.1, weight_decay=1e-4):
        ...     print(len(group["params"]), group["lr"], group["weight_decay"])
        3 0.1 0.0001
        1 0.001 0.0
    """
    divisor = check_divisor(divisor)
    # The verdicts need values, which ZeRO-3 partitions; FSDP1 wraps the model later.
    with gathered(module, fsdp=False):
        records = find_batch_norms(module, include=include, exclude=exclude)
    scales = {id(scale) for scale in rule_scales(records)} if divisor > 1 else set[int]()
    exempt = {id(parameter) for parameter in exempt_parameters(module, records, weight_decay_exempt)}
    parameters = list(module.parameters())
    return [
        _permanent_group(part, parameters, lr, weight_decay, divisor) for part in parts_of(parameters, scales, exempt)
    ]


def _permanent_group(
    part: Part, parameters: Sequence[nn.Parameter], lr: float | Tensor, weight_decay: float, divisor: float
) -> Group:
    group: Group = {
        "params": [parameters[position] for position in part.positions],
        "lr": divide_lr(lr, divisor, "lr") if part.divided else lr,
        "weight_decay": 0.0 if part.exempt else weight_decay,
    }
    if part.divided:
        group[GROUP_MARK] = divisor
    return group


@dataclass(frozen=True)
class Part:
    """Parameters that learn alike, out of a list of parameters.

    Attributes:
        positions: Where the parameters stand in the list.
        divided: Whether they learn with lr / c.
        exempt: Whether they take no weight decay.
    """

    positions: tuple[int, ...]
    divided: bool
    exempt: bool


def parts_of(params: Sequence[Tensor], scales: Collection[int], exempt: Collection[int]) -> list[Part]:
    """Sort parameters into parts, in a group or in a whole model.

    Args:
        params: The parameters.
        scales: The `id` of every parameter that learns with lr / c.
        exempt: The `id` of every parameter that takes no weight decay.

    Returns:
        The parts that are not empty; a part that learns as any other parameter comes first.
    """
    positions: dict[tuple[bool, bool], list[int]] = {}
    for position, parameter in enumerate(params):
        positions.setdefault((id(parameter) in scales, id(parameter) in exempt), []).append(position)
    return [Part(tuple(found), divided, exempt) for (divided, exempt), found in sorted(positions.items())]


def exempt_parameters(
    module: nn.Module, records: Sequence[BatchNormRecord], weight_decay_exempt: WeightDecayExempt | None
) -> list[nn.Parameter]:
    """List the parameters that take no weight decay.

    Args:
        module: The model.
        records: Its batch norm layers; those that patterns leave out count as any other module.
        weight_decay_exempt: `"scale"`, `"norm"`, `"vectors"` or None, as in `scale_param_groups`.

    Returns:
        The parameters, each once. Scales kept at a deliberate zero are among the scales.

    Raises:
        ValueError: If the choice is unknown.
    """
    check_choice("weight_decay_exempt", weight_decay_exempt, [*get_args(WeightDecayExempt), None])
    if weight_decay_exempt is None:
        return []
    found: dict[int, nn.Parameter] = {}
    for record in records:
        if record.target is None:
            continue
        for parameter in (record.scale, None if weight_decay_exempt == "scale" else record.shift):
            if parameter is not None:
                found[id(parameter)] = parameter
    # By name, since the scale of a LayerNorm, which is to decay, has one dimension as well.
    if weight_decay_exempt == "vectors":
        for name, parameter in module.named_parameters():
            attribute = name.rpartition(".")[2]
            if attribute == "bias" or attribute.startswith("bias_") or attribute.endswith("_bias"):
                found[id(parameter)] = parameter
    return list(found.values())


def divide_lr(lr: Any, divisor: float, where: str) -> Any:
    """Divide a learning rate; a tensor gives a new tensor, since one tensor may serve all groups.

    Args:
        lr: A number or a tensor.
        divisor: The constant c.
        where: What holds the learning rate, for the message.

    Returns:
        lr / c, of the type of `lr`.

    Raises:
        ValueError: If there is no learning rate to divide.
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float, Tensor)):
        raise ValueError(
            f"{where} has lr={lr!r}: lr / c needs a number or a tensor, so give the optimizer an explicit lr"
        )
    return lr / divisor


def is_divided(optimizer: object, scales: Iterable[Tensor], exempt: Iterable[Tensor]) -> bool:
    """Tell whether an optimizer's own groups, made by `scale_param_groups`, do what a rule would do.

    Args:
        optimizer: The optimizer, of any kind.
        scales: The scales that are to learn with lr / c.
        exempt: The parameters that are to take no weight decay.

    Returns:
        True if it has such groups, every scale that it holds is in one, and no exempt parameter decays.
    """
    groups: list[Group] = getattr(optimizer, "param_groups", [])
    divided, undecayed = {id(scale) for scale in scales}, {id(parameter) for parameter in exempt}
    return any(GROUP_MARK in group for group in groups) and not any(
        (id(parameter) in divided and GROUP_MARK not in group)
        or (id(parameter) in undecayed and group.get("weight_decay", 0.0) != 0.0)
        for group in groups
        for parameter in group["params"]
    )
