"""The optimizers of many packages, and the arguments that their constructors and steps require."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from helpers.models import ResidualNet, scales, shifts
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

LR, DIVISOR, MULTIPLIER, BATCH = 0.01, 100.0, 10.0, 8
SCHEDULE = (0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5)
"""Factor of the learning rates at each step: a warm-up and a decay."""

MODULES: dict[str, str] = {  # by name on PyPI: modules that have another name, or are searched only in part
    "torch": "torch.optim",
    "torch (distributed)": "torch.distributed.optim",
    "timm": "timm.optim",
    "transformers": "transformers.optimization",
    "opacus": "opacus.optimizers",
    "fairscale": "fairscale.optim",
    "torchao": "torchao.optim",
    "torch-optimi": "optimi",
    "torch-adopt": "adopt",
    "torch-sm3": "SM3",
    "adabelief-slim": "adabelief",
    "adams-torch": "adams",
    "dog-optimizer": "dog",
    "dowgopt": "dowg",
    "homopt": "HomOpt",
    "ivon-opt": "ivon",
    "muon-optimizer": "muon",
    "salsa-optimizer": "salsa",
    "tauon-optimizer": "tauon",
    "Adam-tanhx": "Adam_tanhx",
    "casmo-optimizer": "casmo",
    "muon-fsdp2": "muon_fsdp2",
    "pytorch-lamb": "pytorch_lamb",
    "sophia-optimizer": "sophia",
    "FracGrad": "FracGrad",
    "lightning-bolts": "pl_bolts.optimizers",
    "facebookresearch/optimizers": "distributed_shampoo",  # on GitHub only
}
_SAME_NAME = [  # except for hyphens
    "pytorch_optimizer", "torch_optimizer", "heavyball", "schedulefree", "prodigyopt", "adabound", "dadaptation",
    "lion_pytorch", "adan_pytorch", "came_pytorch", "bitsandbytes", "grokadamw", "adabelief_pytorch",
    "ranger_adabelief", "ranger21", "adam_mini", "adamp", "adamod", "madgrad", "adam_atan2_pytorch", "kron_torch",
    "quad_torch", "nadir", "flashoptim", "fsgdm", "galore_torch", "apollo_torch", "torchium", "torchastic", "sgd_sai",
    "sgd_boost", "core_optimizer", "open_lars", "agc_optims", "adv_optm", "optimuon", "truegrad", "parameterfree",
    "lomo_optim", "asranger", "zengrad_pytorch", "rangerlite", "pytorch_ranger", "rmsgd", "ncg_optimizer",
    "dolphinflow", "ano_optimizer", "relativistic_adam", "evo_optimizer", "elra", "gefen", "psilogic", "adamr",
    "scao", "topological_adam", "fanos", "qqn_torch", "psd_optimizer", "opteon", "adafactor8bit",
]  # fmt: skip
MODULES.update({name.replace("_", "-"): name for name in _SAME_NAME})

Groups = list[dict[str, Any]]
REQUIRED: dict[str, Callable[[ResidualNet, Groups], Any]] = {  # required arguments of constructors, by name
    "params": lambda model, groups: groups[0]["params"] if len(groups) == 1 and len(groups[0]) == 1 else groups,
    "model": lambda model, groups: model,
    "named_parameters": lambda model, groups: list(model.named_parameters()),
    "muon_params": lambda model, groups: [model.head.weight],
    "polar_params": lambda model, groups: [model.head.weight],
    "optimizer": lambda model, groups: SGD(groups, lr=LR, momentum=0.9),
    "optim": lambda model, groups: SGD(groups, lr=LR),
    "inner_optimizer": lambda model, groups: SGD(groups, lr=LR),
    "base": lambda model, groups: SGD(groups, lr=LR),
    "direction": lambda model, groups: SGD(groups, lr=LR),
    "magnitude": lambda model, groups: Adam(groups, lr=LR),
    "specs": lambda model, groups: [{**group, "optimizer": SGD, "lr": LR} for group in groups],
    "base_optimizer": lambda model, groups: SGD,
    "optimizer_class": lambda model, groups: SGD,
    "averager": lambda model, groups: None,
    "lr": lambda model, groups: LR,
    "num_iterations": lambda model, groups: len(SCHEDULE),
    "num_data": lambda model, groups: 1000,
    "ess": lambda model, groups: 1000.0,
    "noise_multiplier": lambda model, groups: 0.1,
    "max_grad_norm": lambda model, groups: 1.0,
    "expected_batch_size": lambda model, groups: BATCH,
}
_TIMED_BY_LR = {"relative_step": False, "scale_parameter": False}
ARGUMENTS: dict[str, dict[str, Any]] = {  # by pattern of the class's qualified name; later patterns win
    "*.DAdapt*": {"lr": 1.0, "d0": 0.01},  # rounding swallows the first steps of the default, 1e-6
    "dadaptation.*DAdaptAdaGrad": {"momentum": 0.9},
    "dog.*": {"lr": 1.0, "reps_rel": 0.01},
    "*.AdaShift": {"keep_num": 2},  # the default updates nothing in its first ten steps
    "optimi.*StableAdamW": {"triton": False},
    "bitsandbytes.*LARS*": {"momentum": 0.9},
    "bitsandbytes.*SGD*": {"momentum": 0.9},
    "transformers.*Adafactor": _TIMED_BY_LR,
    "galore_torch.*Adafactor": _TIMED_BY_LR,
    "apollo_torch.*Adafactor": _TIMED_BY_LR,
    "torchium.*AdaFactor": _TIMED_BY_LR,
    "flashoptim.*": {"quantize": False, "fused": False, "master_weight_bits": None},  # the defaults need a GPU
    "ranger21.*": {"num_epochs": 1, "num_batches_per_epoch": len(SCHEDULE)},
    "fairscale.*AdaScale": {"num_gradients_to_accumulate": 2},
    "fairscale.*AdaScaleWrapper": {"num_gradients_to_accumulate": 2, "optim_cls": SGD},
    "fairscale.*OSS": {"optim": SGD},
}
USE_MUON = ("muon.*WithAuxAdam", "pytorch_optimizer.*.muon.*")
"""Classes whose groups each must say whether Muon updates them."""

SCRIPTS = {"setup", "__main__"}
"""Modules that run a script when they are imported."""
BASES = {"BaseOptimizer", "MuonBase", "Optimizer1State", "Optimizer2State", "StochLineSearchBase", "_AdamBase"}
"""Base classes, which are skipped, as is every class whose constructor requires `defaults`."""


def sampled(optimizer: Any, compute: Callable[..., Tensor]) -> None:
    """Step as IVON requires: with the gradient at randomly perturbed parameters."""
    with optimizer.sampled_params(train=True):
        compute()
    optimizer.step()


WAYS: dict[str, Callable[[Any, Callable[..., Tensor]], Any]] = {
    "step()": lambda optimizer, compute: (compute(), optimizer.step()),
    "step(closure)": lambda optimizer, compute: (compute(), optimizer.step(compute)),
    "create_graph": lambda optimizer, compute: (compute(create_graph=True), optimizer.step()),
    "bfloat16": lambda optimizer, compute: (compute(), optimizer.step()),
}
"""Ways to do a step, each from the optimizer and a function that computes the gradients."""


def ways(cls: type[Optimizer]) -> dict[str, Callable[[Any, Callable[..., Tensor]], Any]]:
    """Return the ways of stepping that a class may require, the usual ways first."""
    return {"sampled": sampled} if hasattr(cls, "sampled_params") else WAYS


def optimizers(module: str) -> dict[str, type[Optimizer]]:
    """Import a package with its submodules, and return the optimizer classes that it defines, by qualified name."""
    package, top = importlib.import_module(module), module.partition(".")[0]
    modules = [package]
    for info in pkgutil.walk_packages(getattr(package, "__path__", []), f"{module}.", onerror=lambda name: None):
        if "test" not in info.name and info.name.rpartition(".")[2] not in SCRIPTS:
            try:
                modules.append(importlib.import_module(info.name))
            except Exception:  # a submodule may need a package that is not installed: skip only this submodule
                continue
    return {
        f"{value.__module__}.{value.__qualname__}": value
        for each in modules
        for value in vars(each).values()
        if inspect.isclass(value)
        and issubclass(value, Optimizer)
        and value.__module__.partition(".")[0] == top
        and value.__name__ not in BASES
        and not inspect.isabstract(value)
        and "defaults" not in required_arguments(value)
    }


def required_arguments(cls: type[Optimizer]) -> list[str]:
    """Name the arguments without default, except the first argument."""
    _, *others = inspect.signature(cls).parameters.values()
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in others if each.default is each.empty and each.kind in fixed]


def user_groups(cls: type[Optimizer], model: ResidualNet, two: bool) -> Groups:
    """Return the groups of a user who does not know the rule: all parameters, or backbone and head."""
    if fits(cls, USE_MUON):
        matrix, *others = sorted(model.parameters(), key=lambda parameter: parameter.dim() != 2)
        return [{"params": [matrix], "use_muon": True}, {"params": others, "use_muon": False}]
    head = list(model.head.parameters())
    rest = list(model.parameters())[: -len(head)]
    return [{"params": rest}, {"params": head}] if two else [{"params": rest + head}]


def construct(cls: type[Optimizer], model: ResidualNet, groups: Groups, decay: float) -> Any:
    """Build an optimizer from groups, with the arguments that its constructor requires."""
    first, *others = inspect.signature(cls).parameters
    options = {name: REQUIRED[name](model, groups) for name in required_arguments(cls)}
    options.update({name: value for name, value in (("lr", LR), ("weight_decay", decay)) if name in others})
    for pattern in fits(cls, ARGUMENTS):
        options.update(ARGUMENTS[pattern])
    leading = "optimizer" if first == "base_optimizer" else first if first in REQUIRED else "params"
    return cls(REQUIRED[leading](model, groups), **options)


def construct_by_hand(cls: type[Optimizer], model: ResidualNet, groups: Groups, decay: float, multiplier: float) -> Any:
    """Build an optimizer from divided groups, or divide its groups afterwards if its constructor takes no groups."""
    usual = construct(cls, model, groups, decay)
    own = {id(scale) for scale in scales(model)}
    try:
        optimizer = construct(cls, model, divided(model, groups, usual.param_groups, multiplier), decay)
    except Exception:
        optimizer = None
    if optimizer is None or not any(own.issuperset(map(id, group["params"])) for group in optimizer.param_groups):
        optimizer = construct(cls, model, groups, decay)
        optimizer.param_groups[:] = divided(model, optimizer.param_groups, optimizer.param_groups, multiplier)
    return optimizer


def divided(model: ResidualNet, groups: Groups, usual: Groups, multiplier: float) -> Groups:
    """Divide groups by hand.

    Args:
        model: The model.
        groups: The user's groups.
        usual: The same groups with the settings that the optimizer gives them.
        multiplier: The factor k; 1 leaves the shifts in their groups.

    Returns:
        Each group without its scales and shifts, a group of the shifts with lr * k and weight decay / k, and a group of
        the scales with lr / c and no weight decay.
    """
    own = {id(scale): "scale" for scale in scales(model)}
    if multiplier != 1:
        own.update({id(shift): "shift" for shift in shifts(model)})
    parts: Groups = []
    for group, settings in zip(groups, usual, strict=True):
        changes: dict[str, dict[str, Any]] = {"other": {}, "shift": {}, "scale": {}}
        if "lr" in settings:
            changes["shift"]["lr"], changes["scale"]["lr"] = settings["lr"] * multiplier, settings["lr"] / DIVISOR
        if "weight_decay" in settings:
            decay = settings["weight_decay"]
            numbers = decay if isinstance(decay, list) else [decay]
            divided_decay = [None if each is None else each / multiplier for each in numbers]
            none = [0.0] * len(numbers)
            changes["shift"]["weight_decay"] = divided_decay if isinstance(decay, list) else divided_decay[0]
            changes["scale"]["weight_decay"] = none if isinstance(decay, list) else 0.0
        for kind, own_settings in changes.items():
            part = [parameter for parameter in group["params"] if own.get(id(parameter), "other") == kind]
            parts += [{**group, **own_settings, "params": part}] if part else []
    return parts


def fits(cls: type[Optimizer], patterns: Iterable[str]) -> list[str]:
    """Return the patterns that match the qualified name of a class."""
    return [pattern for pattern in patterns if fnmatchcase(f"{cls.__module__}.{cls.__qualname__}", pattern)]
