"""Makes permanent parameter groups: scales and shifts get groups with learning rates of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_revbn.core.arguments import check_choice
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.initialization import rule_scales, rule_shifts
from lightning_revbn.core.layers import BatchNormRecord, find_batch_norms
from lightning_revbn.core.rates import Rates, Role

__all__ = [
    "GROUP_MARK",
    "MARKS",
    "SHIFT_MARK",
    "Group",
    "MarkKeeper",
    "WeightDecayExempt",
    "exempt_parameters",
    "is_divided",
    "keep_marks",
    "scale_param_groups",
]

Group: TypeAlias = "dict[str, Any]"
WeightDecayExempt: TypeAlias = Literal["scale", "norm", "vectors"]

GROUP_MARK = "scale_lr_divisor"
"""Key that `scale_param_groups` sets in a group of scales, whose learning rate is already divided."""
SHIFT_MARK = "shift_lr_multiplier"
"""Key that `scale_param_groups` sets in a group of shifts, whose learning rate is already multiplied."""
MARKS = (GROUP_MARK, SHIFT_MARK)


def scale_param_groups(
    module: nn.Module,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    divisor: float = 100.0,
    weight_decay_exempt: WeightDecayExempt | None = "scale",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    shift_multiplier: float = 1.0,
) -> list[Group]:
    """Sort a model's parameters into permanent groups, batch norm scales with lr / c and shifts with lr * k.

    Use it for engines that take the parameters away from the optimizer, such as DeepSpeed, or to see the groups.
    Otherwise `ScaleUpdateRule` is the better choice. Schedules that write the same number into every group destroy the
    ratio of permanent groups: OneCycleLR and CyclicLR with a scalar, SWALR, CosineAnnealingLR with `eta_min`. And a
    checkpoint with other groups cannot be resumed.

    With `weight_decay_exempt="vectors"` these are the paper's groups: weight decay on convolutions and linear layers
    alone. Scales that are 0 in every channel at the time of the call keep the full learning rate (see
    `InitReport.scales`). So call it before the model is trained, or name those layers in `exclude`.

    Args:
        module: The model.
        lr: Learning rate of all parameters but scales and shifts.
        weight_decay: Weight decay of parameters that are not exempt. Shifts get weight decay / k, so that lr * k
            shrinks them as lr would.
        divisor: The constant c; values up to 1 leave the learning rate of scales alone.
        weight_decay_exempt: The parameters without weight decay: `"scale"`, `"norm"` (scales and shifts of batch norm),
            `"vectors"` (batch norm and every bias) or None.
        include: `fnmatch` patterns on dotted names of the layers whose scale and shift get rates of their own.
        exclude: Patterns of layers that do not; stronger than `include`.
        shift_multiplier: The factor k; 1 leaves the learning rate of shifts alone.

    Returns:
        At most six groups for `torch.optim` optimizers, none of them empty; each parameter is in a single group.
        Groups of scales or shifts with a learning rate of their own have the key `scale_lr_divisor` or
        `shift_lr_multiplier`. `RevisitedBatchNorm` and `ScaleUpdateRule` recognise the groups by this key.

    Raises:
        TypeError: If the divisor or the multiplier is not a number.
        ValueError: If the divisor or the multiplier is not finite and positive, or a pattern or choice is unknown.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> for group in scale_param_groups(model, lr=0.1, weight_decay=1e-4, shift_multiplier=10.0):
        ...     print(len(group["params"]), group["lr"], group["weight_decay"])
        2 0.1 0.0001
        1 1.0 1e-05
        1 0.001 0.0
    """
    rates = Rates(divisor, shift_multiplier)
    with gathered(module, fsdp=False):
        records = find_batch_norms(module, include=include, exclude=exclude)
    scales = {id(scale) for scale in rule_scales(records)} if rates.divides_scales else set[int]()
    shifts = {id(shift) for shift in rule_shifts(records)} if rates.multiplies_shifts else set[int]()
    exempt = {id(parameter) for parameter in exempt_parameters(module, weight_decay_exempt, records=records)}
    order: list[tuple[Role, bool]] = [(role, gets_none) for role in get_args(Role) for gets_none in (False, True)]
    found: dict[tuple[Role, bool], list[nn.Parameter]] = {key: [] for key in order}
    for parameter in module.parameters():
        role = "scale" if id(parameter) in scales else "shift" if id(parameter) in shifts else "other"
        found[role, id(parameter) in exempt].append(parameter)
    marks: dict[Role, Group] = {
        "other": {},
        "shift": {SHIFT_MARK: rates.multiplier},
        "scale": {GROUP_MARK: rates.divisor},
    }
    return [
        {
            "params": parameters,
            "lr": rates.lr(role, lr, "scale_param_groups"),
            "weight_decay": 0.0 if gets_none else rates.weight_decay(role, weight_decay),
            **marks[role],
        }
        for (role, gets_none), parameters in found.items()
        if parameters
    ]


def exempt_parameters(
    module: nn.Module,
    weight_decay_exempt: WeightDecayExempt | None = "scale",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    records: Sequence[BatchNormRecord] | None = None,
) -> list[nn.Parameter]:
    """List the parameters that take no weight decay, for `ScaleUpdateRule(weight_decay_exempt=...)`.

    Args:
        module: The model.
        weight_decay_exempt: `"scale"`, `"norm"` (scales and shifts of batch norm), `"vectors"` (batch norm and every
            bias: the paper's recipe) or None.
        include: `fnmatch` patterns on dotted names of batch norm layers; a layer that matches none counts as any other
            module.
        exclude: Patterns of layers that count as any other module; stronger than `include`.
        records: The batch norm layers, if they are known already; then `include` and `exclude` do not count.

    Returns:
        The parameters, each once. Scales kept at a deliberate zero are included.

    Raises:
        ValueError: If the choice is unknown, or a pattern matches no layer.

    Example:
        >>> import torch
        >>> from lightning_revbn import ScaleUpdateRule, init_batch_norms
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> scales = init_batch_norms(model).scales
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
        >>> ScaleUpdateRule(optimizer, scales, weight_decay_exempt=exempt_parameters(model, "vectors"))
        ScaleUpdateRule(SGD, 1 scales, divisor=100, 3 without weight decay)
    """
    check_choice("weight_decay_exempt", weight_decay_exempt, [*get_args(WeightDecayExempt), None])
    if weight_decay_exempt is None:
        return []
    if records is None:
        with gathered(module, fsdp=False):
            records = find_batch_norms(module, include=include, exclude=exclude)
    found: dict[int, nn.Parameter] = {}
    for record in records:
        if record.target is None:
            continue
        for parameter in (record.scale, None if weight_decay_exempt == "scale" else record.shift):
            if parameter is not None:
                found[id(parameter)] = parameter
    if weight_decay_exempt == "vectors":
        for name, parameter in module.named_parameters():
            attribute = name.rpartition(".")[2]
            # Recurrent layers have `bias_ih_l0` and the like, attention has `in_proj_bias`.
            if attribute == "bias" or attribute.startswith("bias_") or attribute.endswith("_bias"):
                found[id(parameter)] = parameter
    return list(found.values())


def is_divided(
    optimizer: object, scales: Iterable[Tensor], exempt: Iterable[Tensor], shifts: Iterable[Tensor] = ()
) -> bool:
    """Tell whether an optimizer's own groups, made by `scale_param_groups`, do what a rule would do.

    Args:
        optimizer: The optimizer, of any kind.
        scales: The scales that should learn with lr / c.
        exempt: The parameters that should take no weight decay.
        shifts: The shifts that should learn with lr * k.

    Returns:
        True if it has such groups, they hold all its scales and shifts by kind, and no exempt parameter decays.
    """
    groups: list[Group] = getattr(optimizer, "param_groups", [])
    divided, multiplied, undecayed = ({id(parameter) for parameter in own} for own in (scales, shifts, exempt))
    return any(mark in group for group in groups for mark in MARKS) and not any(
        (id(parameter) in divided and GROUP_MARK not in group)
        or (id(parameter) in multiplied and SHIFT_MARK not in group)
        or (id(parameter) in undecayed and group.get("weight_decay", 0.0) != 0.0)
        for group in groups
        for parameter in group["params"]
    )


def keep_marks(optimizer: Optimizer) -> MarkKeeper:
    """Keep the marks of `scale_param_groups` in an optimizer's groups, whatever checkpoint is loaded into it.

    torch's `load_state_dict` takes over the keys of the saved groups. Groups made by hand have no mark, so after
    loading them a rule would divide a learning rate twice. A `ScaleUpdateRule` keeps the marks of its own optimizer;
    this function is for an optimizer without a rule.

    Args:
        optimizer: The optimizer.

    Returns:
        A handle; its `remove()` ends it.
    """
    return MarkKeeper(optimizer)


class MarkKeeper:
    """Sets the marks of groups again after a load; a mark from the checkpoint takes precedence."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._marks: dict[int, Group] = {}
        self._handles = [
            optimizer.register_load_state_dict_pre_hook(self._note),
            optimizer.register_load_state_dict_post_hook(self._restore),
        ]

    def remove(self) -> None:
        """Stop keeping the marks."""
        for handle in self._handles:
            handle.remove()

    def _note(self, optimizer: Optimizer, state_dict: object) -> None:
        self._marks = {
            id(parameter): {mark: group[mark] for mark in MARKS if mark in group}
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def _restore(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                group.update({**self._marks.get(id(parameter), {}), **group})
