"""Puts the update rule on the optimizers of a fit, and takes it away."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_revbn.callbacks.engine_groups import check_engine_groups, what_groups_miss
from lightning_revbn.callbacks.rewriting import Rewriting
from lightning_revbn.core.initialization import rule_scales
from lightning_revbn.core.layers import Selection
from lightning_revbn.core.param_groups import WeightDecayExempt, exempt_parameters, is_divided
from lightning_revbn.core.update_rule import ScaleUpdateRule
from lightning_revbn.lightning_compat import MisconfigurationException

__all__ = ["UpdateRules"]


class UpdateRules:
    """The update rules of one fit, one for each optimizer.

    Args:
        owner: What the user calls the callback, for messages.
        selection: The settings that decide on every layer.
        divisor: The constant c.
        weight_decay_exempt: What takes no weight decay.
    """

    def __init__(
        self, owner: str, selection: Selection, divisor: float, weight_decay_exempt: WeightDecayExempt | None
    ) -> None:
        self._owner = owner
        self._selection = selection
        self._divisor = divisor
        self._exempt: WeightDecayExempt | None = weight_decay_exempt
        self._rules: list[ScaleUpdateRule] = []

    @property
    def covered(self) -> int:
        """How many scales learn with lr / c now."""
        return sum(rule.covered for rule in self._rules)

    def attach(self, trainer: Trainer, module: LightningModule, rewriting: Rewriting) -> None:
        """Put the update rule on every optimizer that does not have it yet.

        Args:
            trainer: The Trainer.
            module: The module to be trained.
            rewriting: What is known of its layers.

        Raises:
            MisconfigurationException: If the rule cannot hold for an optimizer.
        """
        ruled = {id(rule.optimizer) for rule in self._rules}
        optimizers = [optimizer for optimizer in trainer.strategy.optimizers if id(optimizer) not in ruled]
        divided, exempt = self._choose(module, rewriting) if optimizers else ([], [])
        for optimizer in optimizers if divided or exempt else ():
            if isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance] # an engine's own
                self._attach(optimizer, divided, exempt)
            else:
                check_engine_groups(self._owner, optimizer, trainer, self._selection, self._divisor, self._exempt)

    def remove(self) -> None:
        """Take the rules away."""
        while self._rules:
            self._rules.pop().remove()

    def __getstate__(self) -> dict[str, object]:
        """Leave behind the rules, since optimizers belong to this process."""
        return {**self.__dict__, "_rules": []}

    def _choose(self, module: nn.Module, rewriting: Rewriting) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the scales that are to learn with lr / c, and the parameters that take no weight decay."""
        records = rewriting.look(module)
        divided = rule_scales(records, sorted(rewriting.zero_kept)) if self._divisor > 1 else []
        return divided, exempt_parameters(module, self._exempt, records=records) if records else []

    def _attach(self, optimizer: Optimizer, divided: list[nn.Parameter], exempt: list[nn.Parameter]) -> None:
        try:
            rule = ScaleUpdateRule(optimizer, divided, self._divisor, exempt, warn_if_unused=False)
        except (TypeError, ValueError) as error:
            if is_divided(optimizer, divided, exempt):
                return  # its own groups do what the rule would do
            missing = what_groups_miss(optimizer, self._exempt)
            raise MisconfigurationException(f"{self._owner}: {error}{missing}") from error
        self._rules.append(rule)
