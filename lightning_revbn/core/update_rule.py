"""The update rule: batch norm scales learn with lr / c, inside the optimizer's own step.

The optimizer that everybody holds is never changed. For the time of one update its code runs on a *view* of it: the
same object in every respect (they share one `__dict__`), except that `param_groups` shows each group that holds scales
as two, the scales with lr / c. Schedulers, gradient clipping, loggers, `state_dict()` and exception handlers hold the
optimizer itself, so none of them can ever meet a divided group, whatever happens inside the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_revbn.core.arguments import check_choice, check_divisor
from lightning_revbn.core.gathered import gathered
from lightning_revbn.core.initialization import rule_scales
from lightning_revbn.core.layers import BatchNormRecord, find_batch_norms

WeightDecayExempt: TypeAlias = Literal["scale", "norm", "vectors"]
Group: TypeAlias = "dict[str, Any]"

GROUP_MARK = "scale_lr_divisor"
"""Key that `scale_param_groups` sets in a group whose learning rate is already divided."""


class ScaleUpdateRule:
    """Divide the learning rate of batch norm scales by a constant c at every step of an optimizer.

    The division happens while the optimizer updates, on the learning rate that is in force then, so lr / c holds under
    every schedule, and a checkpoint of the optimizer is the same with and without the rule. It equals permanent
    parameter groups (see `scale_param_groups`) to the bit, where a schedule lets those keep their ratio. Scales may
    be added to the optimizer later; groups made by `scale_param_groups` are left as they are.

    The rule ends with `remove()`, at the end of a `with` block, or with the optimizer. Copies and pickles of the
    optimizer do not carry it.

    Args:
        optimizer: Any optimizer that derives from `torch.optim.Optimizer` and updates from its `param_groups`; or what
            `Fabric.setup` returned for one.
        scales: The scales, as the optimizer holds them: take them after the model was moved or wrapped.
        divisor: The constant c. Any sufficiently large value works in the paper, which uses 100
            (https://arxiv.org/abs/2110.13989). Values up to 1 leave the learning rate alone.
        weight_decay_exempt: Parameters that take no weight decay, scales or others.
        warn_if_unused: Whether to warn, at the first step, that the optimizer holds none of these parameters.

    Raises:
        TypeError: If `optimizer` is no torch optimizer, or a scale is no tensor.
        ValueError: If the divisor is not finite and positive, the optimizer is one for which the rule cannot hold
            (the message names it), it has a rule already, or a group with scales has no learning rate.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with ScaleUpdateRule(optimizer, [model[1].weight], divisor=100.0):
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     model[1].weight.grad.fill_(1.0)
        ...     optimizer.step()
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
        >>> round(model[1].weight[0].item(), 4)  # 1 - 0.1 / 100
        0.999
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scales: Iterable[Tensor],
        divisor: float = 100.0,
        weight_decay_exempt: Iterable[Tensor] = (),
        *,
        warn_if_unused: bool = True,
    ) -> None:
        self.divisor = check_divisor(divisor)
        optimizer = _behind_stand_in(optimizer)
        _refuse_unsupported(optimizer)
        self._optimizer = optimizer
        # The tensors are kept so that no other one can take over an id.
        self._scales = _by_id("scales", scales) if self.divisor > 1 else {}
        self._exempt = _by_id("weight_decay_exempt", weight_decay_exempt)
        self._warn_if_unused = warn_if_unused
        self._plans: list[_Plan] = []
        self._parts: list[Group] | None = None
        self._was_read = False
        self._probe: tuple[Tensor, Tensor] | None = None
        for index, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in self._scales for parameter in group["params"]) and GROUP_MARK not in group:
                divide_lr(group.get("lr"), self.divisor, f"parameter group {index} of {type(optimizer).__name__}")
        self._view_class = _view_class(type(optimizer), self._read_groups)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        """Return the class, the optimizer's class and the settings."""
        return (
            f"{type(self).__name__}({type(self._optimizer).__name__}, {len(self._scales)} scales, "
            f"divisor={self.divisor:g}, {len(self._exempt)} without weight decay)"
        )

    def remove(self) -> None:
        """End the rule and leave the optimizer as if it had never been there; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the rule is on."""
        return self._optimizer

    @property
    def covered(self) -> int:
        """How many of the optimizer's parameters learn with lr / c now."""
        return sum(
            id(parameter) in self._scales
            for group in self._optimizer.param_groups
            if GROUP_MARK not in group
            for parameter in group["params"]
        )

    def learning_rates(self) -> list[float]:
        """Return the learning rates that the scales would be updated with now.

        Returns:
            One number for every parameter group that holds scales, in the order of the groups; empty if the optimizer
            holds none.
        """
        where = type(self._optimizer).__name__
        return [
            float(group["lr"] if GROUP_MARK in group else divide_lr(group["lr"], self.divisor, where))
            for group in self._optimizer.param_groups
            if any(id(parameter) in self._scales for parameter in group["params"])
        ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if optimizer is not self._optimizer:
            return None  # a subclass that calls super().step(): the view is in place already
        self._parts = None
        if not self._was_read:
            self._probe = self._take_probe()
        view = object.__new__(self._view_class)
        view.__dict__ = optimizer.__dict__
        if len(args) > 1 and callable(args[1]):
            return (view, self._wrap(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": self._wrap(kwargs["closure"])}
        return (view, *args[1:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self._optimizer:
            return
        self._fold()
        if self._was_read or self._probe is None:
            return
        # A step that does nothing at all is the optimizer's right; one that updates must have read its groups.
        parameter, before = self._probe
        if not torch.equal(parameter, before):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() did not update from its param_groups, so the scales did not learn "
                "with lr / c: use scale_param_groups for this optimizer, and look for a step hook that replaces "
                "the step's arguments"
            )

    def _take_probe(self) -> tuple[Tensor, Tensor] | None:
        """Remember one covered parameter's values, until an update has been seen to read the divided groups."""
        held = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        covered = (p for p in held if (id(p) in self._scales or id(p) in self._exempt) and not is_lazy(p))
        parameter = next((p for p in covered if p.numel()), None)  # FSDP1 leaves some ranks no part of a scale
        return None if parameter is None else (parameter, parameter.detach().clone())

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Let the closure run before the groups are divided, since it may change learning rates or add groups."""

        def fold_and_run(*args: Any, **kwargs: Any) -> Any:
            self._fold()
            return closure(*args, **kwargs)

        return fold_and_run

    def _read_groups(self) -> list[Group]:
        """Return what the view shows as `param_groups`: the same objects until the next closure or step."""
        self._was_read, self._probe = True, None
        if self._parts is None:
            self._parts = self._divide()
        return self._parts

    def _divide(self) -> list[Group]:
        groups = self._optimizer.param_groups
        del self._plans[len(groups) :]
        parts: list[Group] = []
        for index, group in enumerate(groups):
            if index == len(self._plans):
                self._plans.append(_Plan(group, self._scales, self._exempt))
            elif not self._plans[index].fits(group):
                self._plans[index] = _Plan(group, self._scales, self._exempt)
            parts += self._plans[index].divide(group, self.divisor)
        if self._warn_if_unused and (self._scales or self._exempt):
            self._warn_if_unused = False
            if all(plan.untouched for plan in self._plans):
                warnings.warn(
                    f"{self!r} has no effect: the optimizer holds none of these parameters. Was the model moved or "
                    "wrapped after the scales were taken from it?",
                    stacklevel=2,
                )
        return parts

    def _fold(self) -> None:
        """Carry over what the optimizer wrote into its groups (step counts, say), and forget the division."""
        if self._parts is not None:
            for plan in self._plans:
                plan.fold()
            self._parts = None


class _Plan:
    """How one parameter group is divided: computed once, and again only when the group's parameters change."""

    def __init__(self, group: Group, scales: dict[int, Tensor], exempt: dict[int, Tensor]) -> None:
        self._params: list[Tensor] = list(group["params"])
        self._marked = marked = GROUP_MARK in group
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for position, parameter in enumerate(self._params):
            kind = id(parameter) in scales and not marked, id(parameter) in exempt
            kinds.setdefault(kind, []).append(position)
        # The part that learns as the group says comes first: it is the one whose writes are carried over.
        self._kinds = sorted(kinds.items())
        self._members = [[self._params[position] for position in positions] for _, positions in self._kinds]
        self._plain = set(kinds) <= {(False, False)}
        self.untouched = self._plain and not marked
        self._lead: tuple[Group, Group, frozenset[str]] | None = None

    def fits(self, group: Group) -> bool:
        params = group["params"]
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and (GROUP_MARK in group) == self._marked
        )

    def divide(self, group: Group, divisor: float) -> list[Group]:
        if self._plain:
            return [group]
        parts: list[Group] = []
        for ((is_divided, is_exempt), positions), members in zip(self._kinds, self._members, strict=True):
            part = group.copy()
            part["params"] = members
            if "param_names" in part:
                part["param_names"] = [group["param_names"][position] for position in positions]
            if parts:  # a tensor that the optimizer updates in place must not be updated once for every part
                part.update({key: value.clone() for key, value in part.items() if isinstance(value, Tensor)})
            if is_divided:
                part["lr"] = divide_lr(group.get("lr"), divisor, "a parameter group")
            if is_exempt and "weight_decay" in part:
                part["weight_decay"] = 0.0
            parts.append(part)
        (lead_divided, lead_exempt), _ = self._kinds[0]
        own = ["params", "param_names", *["lr"] * lead_divided, *["weight_decay"] * lead_exempt]
        self._lead = group, parts[0], frozenset(own)
        return parts

    def fold(self) -> None:
        if self._lead is None:
            return
        group, part, own = self._lead
        self._lead = None
        for key, value in part.items():
            if key not in own and (key not in group or group[key] is not value):
                group[key] = value


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
    with gathered(module, fsdp=False):
        records = find_batch_norms(module, include=include, exclude=exclude)
    scales = {id(scale) for scale in rule_scales(records)} if divisor > 1 else set[int]()
    exempt = {id(parameter) for parameter in exempt_parameters(module, records, weight_decay_exempt)}
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        kinds.setdefault((id(parameter) in scales, id(parameter) in exempt), []).append(parameter)
    groups: list[Group] = []
    for (is_divided, is_exempt), parameters in sorted(kinds.items()):
        group: Group = {
            "params": parameters,
            "lr": divide_lr(lr, divisor, "lr") if is_divided else lr,
            "weight_decay": 0.0 if is_exempt else weight_decay,
        }
        if is_divided:
            group[GROUP_MARK] = divisor
        groups.append(group)
    return groups


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


def scale_learning_rates(optimizer: Optimizer, scales: Iterable[Tensor]) -> list[float]:
    """Return the learning rates that an optimizer would update scales with now, whoever set them.

    Args:
        optimizer: The optimizer, with or without a `ScaleUpdateRule`.
        scales: The scales; with a rule those that it covers count instead.

    Returns:
        One number for every parameter group that holds scales; empty if the optimizer holds none.
    """
    rule = active_rule(optimizer)
    if rule is not None and rule.divisor > 1:
        return rule.learning_rates()
    ids = {id(scale) for scale in scales}
    return [
        float(group["lr"])
        for group in optimizer.param_groups
        if GROUP_MARK in group or any(id(parameter) in ids for parameter in group["params"])
    ]


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


def active_rule(optimizer: Optimizer) -> ScaleUpdateRule | None:
    """Find the rule that is in force on an optimizer.

    Args:
        optimizer: The optimizer.

    Returns:
        The rule, or None.
    """
    hooks: dict[int, Any] = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((owner for owner in owners if isinstance(owner, ScaleUpdateRule)), None)


def _behind_stand_in(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer itself where Fabric or Lightning hand out another object in its place.

    Such an object has the class of the optimizer among its own and no groups: it only passes calls on.
    """
    own: dict[str, Any] = getattr(optimizer, "__dict__", {})
    behind = own.get("_optimizer")
    if isinstance(behind, Optimizer) and isinstance(optimizer, type(behind)) and "param_groups" not in own:
        return behind
    return optimizer


def _refuse_unsupported(optimizer: object) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"ScaleUpdateRule needs a torch.optim.Optimizer, got {name}; where an engine has taken over the optimizer, "
            "build the optimizer from scale_param_groups"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{name} takes one step for all parameters in one group: scales cannot learn with lr / c in it"
        )
    inner = [key for key, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if inner:
        raise ValueError(
            f"{name} wraps another optimizer (its attribute {inner[0]!r}), which does the update: build the parameter "
            f"groups that {name} starts from with scale_param_groups; or, in a loop of your own, give the optimizer "
            "inside to ScaleUpdateRule"
        )
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"{name}.step() does not run torch's step hooks (it does not call Optimizer.__init__): "
            "use scale_param_groups for this optimizer"
        )
    if active_rule(optimizer) is not None:
        raise ValueError(f"this {name} has a ScaleUpdateRule already: remove() that one first")


def _by_id(argument: str, parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for parameter in parameters:
        if not isinstance(parameter, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{argument} takes parameters, got {type(parameter).__name__}")
        found[id(parameter)] = parameter
    return found


def _view_class(cls: type[Optimizer], read_groups: Callable[[], list[Group]]) -> type[Optimizer]:
    """Derive a class whose `param_groups` come from a function; a property outranks the instance's `__dict__`."""

    def refuse_write(view: Optimizer, groups: Any) -> None:
        raise RuntimeError(
            f"{cls.__name__}.step() replaces its param_groups, which ScaleUpdateRule cannot follow: "
            "use scale_param_groups"
        )

    namespace = {"param_groups": property(lambda view: read_groups(), refuse_write), "__module__": cls.__module__}
    make_class: Any = type(cls)  # the optimizer may have a metaclass, such as ABCMeta
    return make_class(cls.__name__, (cls,), namespace)
