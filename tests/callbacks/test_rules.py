"""Groups of `scale_param_groups` beside a callback with other numbers, and a callback that asks for no rule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.aftermath import Snapshot, assert_nothing_left
from helpers.lit import LitNet, loader, quiet, sgd, trainer
from helpers.models import scales
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_revbn import scale_param_groups
from lightning_revbn.core.param_groups import MARKS
from lightning_revbn.core.update_rule import active_rule

NEUTRAL: dict[str, Any] = {"scale": 1.0, "scale_lr_divisor": 1, "weight_decay_exempt": None}


class Wrapping(Optimizer):
    """An optimizer around another one, on which no rule can be put."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("made", "settings", "said"),
    [
        ({"shift_multiplier": 10.0}, {}, "with a shift multiplier of 10, but the rule has a shift multiplier of 1:"),
        (
            {"shift_multiplier": 10.0},
            {"shift_lr_multiplier": 3},
            "with a shift multiplier of 10, but the rule has a shift multiplier of 3:",
        ),
        ({}, {"scale_lr_divisor": 1}, "with a divisor of 100, but the rule has a divisor of 1:"),
        ({"divisor": 10.0}, {}, "with a divisor of 10, but the rule has a divisor of 100:"),
        ({"divisor": 10.0}, NEUTRAL, "with a divisor of 10, but the rule has a divisor of 1:"),
        (
            {"divisor": 1.0, "shift_multiplier": 10.0},
            NEUTRAL,
            "with a shift multiplier of 10, but the rule has a shift multiplier of 1:",
        ),
    ],
)
def test_groups_made_with_other_numbers_are_refused_at_the_start_of_the_fit(
    made: dict[str, Any], settings: dict[str, Any], said: str, wrapped: bool, tmp_path: Path
) -> None:
    def configure(module: nn.Module) -> Optimizer:
        optimizer = torch.optim.SGD(scale_param_groups(module, 0.05, 0.01, **made))
        return Wrapping(optimizer) if wrapped else optimizer

    module = LitNet(configure)
    run = trainer(tmp_path, quiet(**settings))
    before = Snapshot(module, run)
    kind = "Wrapping" if wrapped else "SGD"
    message = rf"RevisitedBatchNorm: parameter group \d of {kind} was made by scale_param_groups {re.escape(said)} give"
    with pytest.raises(MisconfigurationException, match=message + " both the same number$"):
        run.fit(module, loader())
    assert run.global_step == 0
    assert_nothing_left(before)
    assert all((scale == 1).all() for scale in scales(module))


@pytest.mark.parametrize("settings", [{}, NEUTRAL])
@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm applies half of the method:UserWarning")
@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm has no effect.*no parameter learns:UserWarning")
def test_groups_made_with_other_numbers_are_refused_when_a_checkpoint_brings_them(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def groups(module: nn.Module) -> list[dict[str, Any]]:
        divisor = settings.get("scale_lr_divisor", 100.0)
        return scale_param_groups(module, 0.05, 0.01, divisor, shift_multiplier=10.0)

    def unmarked(module: nn.Module) -> Optimizer:
        kept = ({key: value for key, value in group.items() if key not in MARKS} for group in groups(module))
        return torch.optim.SGD(list(kept))

    run = trainer(tmp_path, max_epochs=1)
    run.fit(LitNet(lambda module: torch.optim.SGD(groups(module))), loader())
    run.save_checkpoint(tmp_path / "fast.ckpt")
    module = LitNet(unmarked)
    run = trainer(tmp_path, quiet(**settings))
    with pytest.raises(ValueError, match="with a shift multiplier of 10, but the rule has a shift multiplier of 1:"):
        run.fit(module, loader(), ckpt_path=tmp_path / "fast.ckpt")
    assert run.global_step in (0, 6)
    (optimizer,) = run.optimizers
    assert not any(value for key, value in vars(optimizer).items() if key.endswith("_hooks"))


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm has no effect.*no parameter learns:UserWarning")
def test_a_callback_that_changes_no_rate_puts_nothing_into_a_step(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Looking(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            (optimizer,) = trainer.optimizers
            hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
            seen.append(bool(hooks) or active_rule(optimizer) is not None)

    plain, module = LitNet(), LitNet()
    trainer(tmp_path).fit(plain, loader())
    run = trainer(tmp_path, quiet(**NEUTRAL), Looking())
    before = Snapshot(module, run)
    run.fit(module, loader())
    assert seen == [False] * 12
    assert_nothing_left(before, like=plain)


FAST: dict[str, Any] = {"scale": 1.0, "scale_lr_divisor": 1, "shift_lr_multiplier": 10, "weight_decay_exempt": None}


def fast_groups(module: nn.Module, **options: Any) -> Optimizer:
    made = {"divisor": 1.0, "shift_multiplier": 10.0, "weight_decay_exempt": None, **options}
    return Wrapping(torch.optim.SGD(scale_param_groups(module, 0.05, 0.01, **made)))


def test_the_report_tells_of_shifts_where_shifts_alone_have_groups(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    trainer(tmp_path, quiet(**FAST), max_epochs=1).fit(LitNet(fast_groups), loader(1))
    assert "3 shifts learn with the learning rate of their groups, made by scale_param_groups" in caplog.text
    assert "scales learn" not in caplog.text
    caplog.clear()
    both = LitNet(lambda module: fast_groups(module, divisor=100.0))
    trainer(tmp_path, quiet(**{**FAST, "scale_lr_divisor": 100}), max_epochs=1).fit(both, loader(1))
    for kind in ("scales", "shifts"):
        assert f"3 {kind} learn with the learning rate of their groups, made by scale_param_groups" in caplog.text


def test_groups_that_leave_out_shifts_are_refused_by_the_name_of_shifts(tmp_path: Path) -> None:
    module = LitNet(lambda module: fast_groups(module, exclude=["model.bn1"]))
    said = "not every shift is in such a group, or some decay: call scale_param_groups on the whole module, with "
    said += "weight_decay_exempt=None, divisor=1.0, shift_multiplier=10.0"
    with pytest.raises(MisconfigurationException, match=re.escape(said)):
        trainer(tmp_path, quiet(**FAST)).fit(module, loader())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "so scales did not learn with lr / 100. Its"),
        (FAST, r"so shifts did not learn with lr \* 10. Its"),
        (
            {**FAST, "scale_lr_divisor": 50},
            r"so scales did not learn with lr / 50 and shifts did not learn with lr \* 10. Its",
        ),
        (
            {**FAST, "shift_lr_multiplier": 1, "weight_decay_exempt": "norm"},
            "so parameters decayed that take no weight decay. Its",
        ),
    ],
    ids=["scales", "shifts", "both", "decay"],
)
def test_an_update_that_passes_by_says_what_it_missed(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    def configure(module: nn.Module) -> Optimizer:
        optimizer = sgd(module)
        plain = torch.optim.SGD(module.parameters(), lr=0.05)
        optimizer.step = plain.step  # type: ignore[method-assign]
        return optimizer

    with pytest.raises(MisconfigurationException, match=said):
        trainer(tmp_path, quiet(**settings)).fit(LitNet(configure), loader())


def test_a_learning_rate_that_a_step_writes_before_it_fails_is_in_the_group_and_in_a_checkpoint_at_once(
    tmp_path: Path,
) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 0.5
            raise OSError("in the update")

    seen: list[float] = []

    class Looking(L.Callback):
        def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    module = LitNet(lambda module: Failing(module.parameters(), lr=0.05))
    with pytest.raises(OSError, match="in the update"):
        trainer(tmp_path, Looking(), quiet()).fit(module, loader())
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)["optimizer_states"][0]
    assert [*seen, saved["param_groups"][0]["lr"]] == [0.025, 0.025]


def test_a_tensor_that_is_scale_and_shift_of_tied_layers_learns_as_what_has_a_rate_of_its_own(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        net[2].bias = net[1].weight
        return net

    module = LitNet(sgd, model=tied())
    callback = quiet()
    seen: list[tuple[int, int]] = []

    class Looking(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            rule = active_rule(trainer.optimizers[0])
            assert rule is not None
            seen.append((rule.covered, rule.covered_shifts))

    trainer(tmp_path, callback, Looking(), max_epochs=1).fit(module, loader(1))
    assert seen == [(2, 0)]


def test_a_step_that_a_scaler_skips_may_follow_on_a_training_step_that_changes_scales(tmp_path: Path) -> None:
    class Clamping(LitNet):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with torch.no_grad():
                for scale in scales(self.model):
                    scale.clamp_(min=0.2)
            return super().training_step(batch, batch_idx)

    class Skipping(Precision):
        """Run the closure and make no step, as a GradScaler does that has found an infinite gradient."""

        def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
            return closure()

    module = Clamping()
    trainer(tmp_path, quiet(), max_epochs=1, plugins=[Skipping()]).fit(module, loader(2))
    assert all(torch.equal(scale, torch.full_like(scale, 0.2)) for scale in scales(module.model))
