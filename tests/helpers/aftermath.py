"""Checks that a fit, however it ended, leaves trained values behind and no other change. All fault tests share it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_revbn.core.update_rule import active_rule

# Lightning adds these attributes to module, Trainer and callbacks in every fit.
LIGHTNINGS_OWN = {"_hparams", "_last_val_time", "log", "log_dict", "val_check_batch"}


class Snapshot:
    """The state of a run's objects before its fit; after the fit, `assert_nothing_left` compares with it.

    Args:
        module: The module to be trained.
        trainer: The Trainer that will train it.
        others: Other objects of the run: a DataModule, callbacks of the user.
    """

    def __init__(self, module: L.LightningModule, trainer: L.Trainer, *others: object) -> None:
        self.module, self.trainer = module, trainer
        self.objects = {type(owner).__name__: owner for owner in (trainer, trainer.strategy, *others)}
        self.objects |= {f"module {name!r}": layer for name, layer in module.named_modules()}
        self.looks = {name: _looks(owner) for name, owner in self.objects.items()}
        self.parameters = {name: _properties(parameter) for name, parameter in module.named_parameters()}
        self.everywhere = _global_hooks()


def assert_nothing_left(
    before: Snapshot, like: nn.Module | None = None, plain: L.LightningModule | None = None
) -> None:
    """Assert that a fit left no group, hook, class, attribute or wrapped method behind, and lost no scale.

    Optimizers are compared with other optimizers of the module, all other objects with the snapshot.

    Args:
        before: The snapshot that was taken before the fit.
        like: A module trained in the same way by hand, whose values must be equal to the bit (NaN equals NaN).
        plain: A module with the same fit without the callback, to compare optimizers with; None compares with fresh
            optimizers.
    """
    for name, owner in before.objects.items():
        (cls, attributes, shadowing, hooks), now = before.looks[name], _looks(owner)
        assert now[0] is cls, f"{name} has another class"
        new = now[1] - attributes - LIGHTNINGS_OWN
        assert not new, f"{name} has new attributes {new}"
        assert now[2] == shadowing, f"{name} has a wrapped method"
        assert now[3] == hooks, f"{name} has other hooks"
    assert _global_hooks() == before.everywhere

    now = {name: _properties(parameter) for name, parameter in before.module.named_parameters()}
    lost = {name for name in before.parameters if now.get(name) != before.parameters[name]}
    assert not lost, f"{lost} are other parameters, or of another kind"

    # A fit that ends before Lightning makes the optimizers has no optimizers.
    optimizers = before.trainer.optimizers
    owner = before.module if plain is None else plain
    others = _fresh_optimizers(owner) if plain is None else plain.trainer.optimizers
    for optimizer, other in zip(optimizers, others if optimizers else [], strict=True):
        assert type(optimizer) is type(other)
        # Torch's schedulers leave this attribute after a step of the optimizer.
        assert vars(optimizer).keys() - {"_opt_called"} == vars(other).keys() - {"_opt_called"}
        assert _hooks(optimizer) == _hooks(other), "the optimizer has a hook"
        assert _groups(optimizer, before.module) == _groups(other, owner), "the optimizer has other groups"

    if like is not None:
        values, expected = before.module.state_dict(), like.state_dict()
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def assert_rule_is_gone(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Assert, without a snapshot, that no rule, hook of a step or wrapped method is left.

    The check also holds with callbacks that leave their own traces, for which `assert_nothing_left` would fail.
    """
    for optimizer in trainer.optimizers:
        assert active_rule(optimizer) is None
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert not {"setup", "configure_model"} & vars(module).keys()
    assert "setup_optimizers" not in vars(trainer.strategy)


def _looks(owner: object) -> tuple[type, set[str], set[str], dict[str, int]]:
    """Return an object's class, its attributes, those that hide attributes of the class, and its number of hooks."""
    attributes = set(vars(owner))
    return type(owner), attributes, {name for name in attributes if hasattr(type(owner), name)}, _hooks(owner)


def _hooks(owner: object) -> dict[str, int]:
    return {name: len(value) for name, value in vars(owner).items() if name.endswith("hooks") and value is not None}


def _global_hooks() -> dict[str, int]:
    places = [import_module(f"torch.{name}") for name in ("nn.modules.module", "optim.optimizer")]
    return {
        name: len(value)
        for place in places
        for name, value in vars(place).items()
        if name.startswith("_global_") and name.endswith("hooks")
    }


def _properties(parameter: nn.Parameter) -> tuple[object, ...]:
    return id(parameter), type(parameter), parameter.shape, parameter.dtype, parameter.requires_grad, parameter.is_leaf


def _groups(optimizer: Optimizer, module: nn.Module) -> list[tuple[list[str], list[str], Any]]:
    """Return parameters, keys and weight decay of every group; the schedule changes only the learning rates."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        ([names[id(p)] for p in group["params"]], sorted(group.keys() - {"initial_lr"}), group["weight_decay"])
        for group in optimizer.param_groups
    ]


def _fresh_optimizers(module: L.LightningModule) -> list[Optimizer]:
    made: Any = module.configure_optimizers()
    return [one["optimizer"] if isinstance(one, dict) else one for one in (made if isinstance(made, list) else [made])]
