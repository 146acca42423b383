"""Puts the update rule on the optimizers of a fit, follows replaced optimizers, and removes the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_revbn.callbacks.engine_groups import check_engine_groups, what_groups_miss
from lightning_revbn.callbacks.rewriting import Rewriting
from lightning_revbn.callbacks.rule_settings import RuleSettings
from lightning_revbn.core.coverage import Coverage
from lightning_revbn.core.initialization import rule_scales, rule_shifts
from lightning_revbn.core.layers import Selection
from lightning_revbn.core.next_call import EveryCall
from lightning_revbn.core.param_groups import exempt_parameters, is_divided
from lightning_revbn.core.rates import Rates
from lightning_revbn.core.rule_engine import engine_of
from lightning_revbn.core.torch_compat import runs_step_hooks
from lightning_revbn.core.update_rule import ScaleUpdateRule
from lightning_revbn.core.update_watch import UpdateWatch
from lightning_revbn.lightning_compat import MisconfigurationException

__all__ = ["UpdateRules"]


@dataclass(frozen=True)
class _Parameters:
    """Scales and shifts of the selected layers, even if they learn as others, and all parameters without decay."""

    scales: list[nn.Parameter]
    shifts: list[nn.Parameter]
    exempt: list[nn.Parameter]


class UpdateRules:
    """The update rules of a fit, a rule for each optimizer.

    Args:
        owner: The callback's name, for messages.
        selection: The settings that decide on every layer.
        settings: How scales and shifts learn.
    """

    def __init__(self, owner: str, selection: Selection, settings: RuleSettings) -> None:
        self._owner = owner
        self._selection = selection
        self.settings = settings
        self.rates = Rates(settings.divisor, settings.shift_multiplier)
        self._attached: list[_Attached] = []
        self._guards: list[RemovableHandle] = []
        self._seen: object = None
        self._guard: EveryCall | None = None
        self._has_stepped = False
        self._was_set_back = False

    @property
    def covered(self) -> int:
        """How many scales learn with lr / c now."""
        return sum(attached.rule.covered for attached in self._attached)

    @property
    def covered_shifts(self) -> int:
        """How many shifts learn with lr * k now."""
        return sum(attached.rule.covered_shifts for attached in self._attached)

    @property
    def exempted(self) -> int:
        """How many parameters take no weight decay now, in groups that have one."""
        return sum(attached.exempted for attached in self._attached)

    @property
    def has_updated(self) -> bool:
        """Whether weights hold an update of this fit; steps of a user's loop past the strategy count."""
        return self._has_stepped or any(attached.has_updated for attached in self._attached)

    @property
    def has_ever_updated(self) -> bool:
        """Whether an optimizer has updated in this fit, even if its weights were set back since."""
        return self._was_set_back or self.has_updated

    def begin(self, trainer: Trainer, follow: Callable[[], None]) -> None:
        """Start a fit: from now on, every step of the strategy calls `follow` first and is checked.

        Args:
            trainer: The Trainer.
            follow: Keeps up with replaced optimizers.
        """
        self._has_stepped = self._was_set_back = False

        def around(method: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            follow()
            result = self._checked(optimizer, method, *args, **kwargs)
            self._has_stepped = True
            return result

        self._guard = EveryCall(trainer.strategy, "optimizer_step", around)

    def set_back(self) -> None:
        """Forget the updates: weights from before them were loaded, as Lightning's finders do after trials."""
        self._was_set_back = self.has_ever_updated
        self._has_stepped = False
        for attached in self._attached:
            attached.set_back()

    def are_current(self, trainer: Trainer) -> bool:
        """Tell whether optimizers and their parameters are the same as when the rules were attached.

        Args:
            trainer: The Trainer.

        Returns:
            Whether they are; True while no rules are attached.
        """
        return self._seen is None or self._seen == _signature(trainer)

    def attach(self, trainer: Trainer, module: LightningModule, rewriting: Rewriting) -> None:
        """Put the update rule on every optimizer of the strategy.

        Args:
            trainer: The Trainer.
            module: The module to be trained.
            rewriting: The records of its layers.

        Raises:
            MisconfigurationException: If the rule cannot hold for an optimizer.
        """
        self._remove_rules()
        optimizers = trainer.strategy.optimizers
        parameters = self._choose(module, rewriting) if optimizers else _Parameters([], [], [])
        try:
            coverage = Coverage.of(parameters.scales, parameters.shifts, parameters.exempt, self.rates)
        except ValueError as error:  # tied layers
            raise MisconfigurationException(f"{self._owner}: {error}") from error
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance] # an engine's own
                self._attach(optimizer, parameters, coverage)
            elif coverage:
                check_engine_groups(self._owner, optimizer, trainer, self._selection, self.settings)
        self._seen = _signature(trainer)

    def remove(self) -> None:
        """Remove the rules, and stop following optimizers."""
        self._remove_rules()
        if self._guard is not None:
            self._guard.undo()
            self._guard = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the rules: optimizers and the strategy belong to this process."""
        return {**self.__dict__, "_attached": [], "_guards": [], "_seen": None, "_guard": None}

    def _remove_rules(self) -> None:
        # The rules take their counts along, so the answer is kept here.
        self._has_stepped = self.has_updated
        self._seen = None
        while self._attached:
            self._attached.pop().rule.remove()
        while self._guards:
            self._guards.pop().remove()

    def _choose(self, module: nn.Module, rewriting: Rewriting) -> _Parameters:
        records = rewriting.look(module)
        scales, shifts = rule_scales(records, sorted(rewriting.zero_kept)), rule_shifts(records)
        # In tied layers a tensor may be scale and shift. It takes the role whose learning rate the settings change.
        if not self.rates.multiplies_shifts:
            shifts = _without(shifts, scales)
        elif not self.rates.divides_scales:
            scales = _without(scales, shifts)
        return _Parameters(
            scales,
            shifts,
            exempt_parameters(module, self.settings.weight_decay_exempt, records=records) if records else [],
        )

    def _attach(self, optimizer: Optimizer, parameters: _Parameters, coverage: Coverage) -> None:
        try:
            coverage.refuse_other_groups(optimizer)
        except ValueError as error:
            raise MisconfigurationException(f"{self._owner}: {error}") from error
        if not coverage:
            # Steps need no change, but a checkpoint may bring groups that were made with other numbers.
            if coverage.ways and runs_step_hooks(optimizer):
                self._guards.append(optimizer.register_load_state_dict_post_hook(coverage.refuse_other_groups))
            return
        try:
            rule = ScaleUpdateRule(
                optimizer,
                parameters.scales,
                self.settings.divisor,
                parameters.exempt,
                shifts=parameters.shifts,
                shift_multiplier=self.settings.shift_multiplier,
                warn_if_unused=False,  # `tell` warns once for all optimizers
            )
        except (TypeError, ValueError) as error:
            divided = parameters.scales if self.rates.divides_scales else []
            multiplied = parameters.shifts if self.rates.multiplies_shifts else []
            if is_divided(optimizer, divided, parameters.exempt, multiplied):
                return  # its own groups already do the rule's work
            missing = what_groups_miss(optimizer, self.settings)
            raise MisconfigurationException(f"{self._owner}: {error}{missing}") from error
        self._attached.append(_Attached(rule))

    def _checked(self, optimizer: Optimizer, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a step, and check that the rule took part: a replaced `step` may run no hooks."""
        attached = next((attached for attached in self._attached if attached.rule.optimizer is optimizer), None)
        if attached is None:
            return method(optimizer, *args, **kwargs)
        attached.before_step()
        args, kwargs = attached.around_closure(args, kwargs)
        try:
            result = method(optimizer, *args, **kwargs)
        except BaseException:
            # torch does not run its post-hooks after an exception, so the engine is still in the step.
            if engine := engine_of(optimizer):
                engine.recover()
            raise
        if attached.has_passed_by():
            raise MisconfigurationException(
                f"{self._owner}: {type(optimizer).__name__} has updated without running torch's step hooks, so "
                f"{attached.rule.coverage.missed}. Its step() was replaced, by a wrapper or a patch: let the new "
                "step() call the class's own, or build the optimizer from scale_param_groups"
            )
        return result


class _Attached:
    """A rule on an optimizer, with a check for steps that bypass the rule.

    Args:
        rule: The rule.
    """

    def __init__(self, rule: ScaleUpdateRule) -> None:
        self.rule = rule
        self._ids = rule.coverage.covered
        self._step = _own_step(rule.optimizer)
        self._watch = UpdateWatch()
        self._updates = 0
        self._forgotten = 0

    @property
    def exempted(self) -> int:
        """How many parameters of the optimizer take no weight decay now, in groups that have one."""
        decaying = (group for group in self.rule.optimizer.param_groups if group.get("weight_decay"))
        exempt = self.rule.coverage.exempt
        return sum(id(held) in exempt and held.requires_grad for group in decaying for held in group["params"])

    @property
    def has_updated(self) -> bool:
        """Whether the rule has seen an update since it was set back."""
        return self.rule.updates != self._forgotten

    def set_back(self) -> None:
        """Forget the updates until now."""
        self._forgotten = self.rule.updates

    def before_step(self) -> None:
        """Start to watch a parameter of the rule."""
        rule = self.rule
        self._updates = rule.updates
        # A fused optimizer updates values without moving the version. Comparing values is slower, so it is done only
        # until the rule has seen an update, and after `step` was replaced.
        self._watch.by_value = not rule.updates or _own_step(rule.optimizer) is not self._step
        held = (parameter for group in rule.optimizer.param_groups for parameter in group["params"])
        # FSDP1 leaves some ranks no element of a scale, and such a scale never changes.
        covered = (p for p in held if id(p) in self._ids and p.requires_grad and not is_lazy(p) and p.numel())
        self._watch.start(next(covered, None))

    def around_closure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a step with a closure that restarts the watch when it returns.

        A training step may change parameters itself. If a GradScaler then skips the step, that change is not an update.
        """
        if args and callable(args[0]):
            return (self._followed(args[0]), *args[1:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._followed(kwargs["closure"])}
        return args, kwargs

    def _followed(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self._watch.start_again()
            return result

        return run

    def has_passed_by(self) -> bool:
        """Tell whether the step has updated the watched parameter without the rule."""
        if self.rule.updates != self._updates:
            self._step = _own_step(self.rule.optimizer)
            return False
        return self._watch.has_changed()


def _without(parameters: list[nn.Parameter], others: list[nn.Parameter]) -> list[nn.Parameter]:
    left_out = {id(parameter) for parameter in others}
    return [parameter for parameter in parameters if id(parameter) not in left_out]


def _own_step(optimizer: Optimizer) -> object:
    """Return the `step` that was set on an optimizer, such as a scheduler's counting wrapper; None without."""
    return vars(optimizer).get("step")


def _signature(trainer: Trainer) -> list[list[int]]:
    """Return ids that change when optimizers are replaced, or get other parameters."""
    # This runs before every step: `map` runs no Python code per parameter.
    return [
        [id(optimizer), *chain.from_iterable(map(id, group["params"]) for group in optimizer.param_groups)]
        for optimizer in trainer.strategy.optimizers
    ]
