"""Several callbacks in one Trainer, each for layers of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers.aftermath import Snapshot, assert_nothing_left, assert_rule_is_gone
from helpers.lit import LitNet, loader, quiet, trainer
from helpers.logs import rows
from helpers.models import BATCH_NORMS, assert_same_parameters, images, residual_net, scales, shifts
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm


def without_rule(**settings: Any) -> RevisitedBatchNorm:
    return RevisitedBatchNorm(scale_lr_divisor=1, weight_decay_exempt=None, **settings)


def pair(**settings: Any) -> list[RevisitedBatchNorm]:
    return [
        without_rule(scale=0.5, include=["*.stem.*"], **settings),
        without_rule(scale=0.25, exclude=["*.stem.*"], **settings),
    ]


class Starts(LitNet):
    """Notes the scales that training starts from."""

    def on_train_start(self) -> None:
        self.starts = [scale[0].item() for scale in scales(self)]


def keys_in(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)["callbacks"])


def test_each_callback_rewrites_its_layers_and_one_monitor_logs(tmp_path: Path) -> None:
    module, logger = Starts(), CSVLogger(tmp_path)
    run = trainer(tmp_path, *pair(), logger=logger, max_epochs=1)
    run.fit(module, loader(2))
    assert module.starts == [0.5, 0.25, 0.25]
    assert [row["step"] for row in rows(tmp_path) if "revbn/scale_mean" in row] == ["0", "1"]
    logged = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert json.loads(logged["revbn/scale"]) == [0.5, 0.25]
    assert logged["revbn/zero_scale"] == "keep"


def test_a_monitor_with_a_prefix_of_its_own_logs_too(tmp_path: Path) -> None:
    first, second = pair(monitor=True)
    other = without_rule(exclude=["*.stem.*"], monitor=BatchNormMonitor(prefix="other"))
    trainer(tmp_path, first, other, logger=CSVLogger(tmp_path), max_epochs=1).fit(LitNet(), loader(2))
    logged = rows(tmp_path)
    assert [len([row for row in logged if f"{prefix}/scale_mean" in row]) for prefix in ("revbn", "other")] == [2, 2]
    assert second.monitor is not None


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm has no effect.*no parameter learns:UserWarning")
def test_states_of_several_are_saved_and_loaded_each_by_its_layers(tmp_path: Path) -> None:
    run = trainer(tmp_path, *pair(monitor=False), max_epochs=1)
    run.fit(LitNet(model=residual_net(zero_init_residual=True)), loader(2))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert keys_in(tmp_path / "end.ckpt") == {
        "RevisitedBatchNorm{'include': ['*.stem.*']}",
        "RevisitedBatchNorm{'exclude': ['*.stem.*']}",
    }
    first, second = resumed = pair(monitor=False)
    run = trainer(tmp_path, *reversed(resumed), max_epochs=2)
    run.fit(LitNet(), loader(2), ckpt_path=tmp_path / "end.ckpt")
    assert first.state_dict()["zero_kept"] == []
    assert second.state_dict()["zero_kept"] == ["model.bn2"]


@pytest.mark.parametrize("settings", [{}, {"scale": 0.2}, {"exclude": ["*.bn2"]}, {"scale": {"*": 0.2}}])
def test_a_callback_alone_has_the_name_of_the_class_for_a_key(settings: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, quiet(**settings), quiet(enabled=False), max_epochs=1)
    run.fit(LitNet(), loader(1))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert keys_in(tmp_path / "end.ckpt") == {"RevisitedBatchNorm"}


def test_callbacks_that_were_used_alone_may_be_used_together(tmp_path: Path) -> None:
    first, second = callbacks = pair(monitor=False)
    for callback in callbacks:
        run = trainer(tmp_path, callback, max_epochs=1)
        run.fit(LitNet(), loader(1))
        run.save_checkpoint(tmp_path / "alone.ckpt")
        assert keys_in(tmp_path / "alone.ckpt") == {"RevisitedBatchNorm"}
    together = trainer(tmp_path, first, second, max_epochs=1)
    together.fit(module := Starts(), loader(1))
    assert module.starts == [0.5, 0.25, 0.25]
    together.save_checkpoint(tmp_path / "together.ckpt")
    run.save_checkpoint(tmp_path / "alone.ckpt")
    assert len(keys_in(tmp_path / "together.ckpt")) == 2
    assert keys_in(tmp_path / "alone.ckpt") == {"RevisitedBatchNorm"}


def test_a_subclass_has_a_key_of_its_own(tmp_path: Path) -> None:
    class Mine(RevisitedBatchNorm):
        pass

    run = trainer(tmp_path, Mine(scale=0.2, monitor=False), max_epochs=1)
    run.fit(LitNet(), loader(1))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert keys_in(tmp_path / "end.ckpt") == {Mine.__qualname__}


MULTIPLIER = 3.0


def backbone_and_head(**settings: Any) -> list[RevisitedBatchNorm]:
    return [
        quiet(scale=0.1, scale_lr_divisor=100, include=["*.stem.*"], **settings),
        quiet(scale=0.5, scale_lr_divisor=10, shift_lr_multiplier=MULTIPLIER, exclude=["*.stem.*"], **settings),
    ]


def scheduled(optimizer: Optimizer) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.01),
}


def one_optimizer(name: str) -> Callable[[nn.Module], Any]:
    return lambda module: scheduled(MAKE[name](module.parameters()))


def by_hand(name: str) -> Callable[[nn.Module], Any]:
    """Configure one optimizer from the groups of a careful user, who has written the scales too."""

    def configure(module: nn.Module) -> Any:
        stem, *block = scales(module)
        _, *fast = shifts(module)
        with torch.no_grad():
            stem.fill_(0.1)
            for scale in block:
                scale.fill_(0.5)
        own = {id(parameter) for parameter in [stem, *block, *fast]}
        groups = [
            {"params": [parameter for parameter in module.parameters() if id(parameter) not in own]},
            {"params": [stem], "lr": 0.05 / 100, "weight_decay": 0.0},
            {"params": block, "lr": 0.05 / 10, "weight_decay": 0.0},
            {"params": fast, "lr": 0.05 * MULTIPLIER, "weight_decay": 0.01 / MULTIPLIER},
        ]
        return scheduled(MAKE[name](groups))

    return configure


@pytest.fixture(params=MAKE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def expected(name: str, tmp_path: Path) -> LitNet:
    module = LitNet(by_hand(name))
    trainer(tmp_path, max_epochs=2).fit(module, loader())
    return module


@pytest.mark.parametrize("order", [1, -1])
def test_two_callbacks_on_one_optimizer_equal_groups_made_by_hand_to_the_bit(
    order: int, name: str, expected: LitNet, tmp_path: Path
) -> None:
    module = LitNet(one_optimizer(name))
    run = trainer(tmp_path, *backbone_and_head()[::order], max_epochs=2)
    before = Snapshot(module, run)
    run.fit(module, loader())
    assert_nothing_left(before, like=expected)
    assert_rule_is_gone(module, run)


@pytest.mark.parametrize("order", [1, -1])
def test_two_callbacks_on_one_optimizer_go_on_from_a_checkpoint_to_the_bit(
    order: int, name: str, expected: LitNet, tmp_path: Path
) -> None:
    run = trainer(tmp_path, *backbone_and_head(), max_epochs=1)
    run.fit(LitNet(one_optimizer(name)), loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    module = LitNet(one_optimizer(name))
    run = trainer(tmp_path, *backbone_and_head()[::order], max_epochs=2)
    run.fit(module, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert run.global_step == 12
    assert_same_parameters(expected, module)
    assert_rule_is_gone(module, run)


def test_two_callbacks_follow_an_optimizer_that_is_replaced(tmp_path: Path) -> None:
    class Replacing(L.Callback):
        """Gives the Trainer another optimizer in the middle of the second epoch."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 3):
                trainer.optimizers = [pl_module.configure_optimizers()]

    def constant(configure: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
        return lambda module: configure(module)["optimizer"]

    def once(module: nn.Module, made: list[Any]) -> Any:
        values = [scale.detach().clone() for scale in scales(module)]
        made.append(constant(by_hand("SGD"))(module))
        if len(made) > 1:  # the scales are those that training has reached
            with torch.no_grad():
                for scale, value in zip(scales(module), values, strict=True):
                    scale.copy_(value)
        return made[-1]

    made: list[Any] = []
    hand = LitNet(lambda module: once(module, made))
    trainer(tmp_path, Replacing()).fit(hand, loader())
    module = LitNet(constant(one_optimizer("SGD")))
    run = trainer(tmp_path, *backbone_and_head(), Replacing())
    run.fit(module, loader())
    assert len(made) == 2
    assert_same_parameters(hand, module)
    assert_rule_is_gone(module, run)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end"])
def test_two_callbacks_leave_nothing_after_an_exception(hook: str, tmp_path: Path) -> None:
    class Failing(L.Callback):
        pass

    def fail(self: Failing, *args: Any) -> None:
        raise ZeroDivisionError

    setattr(Failing, hook, fail)
    module = LitNet()
    run = trainer(tmp_path, *backbone_and_head(), Failing())
    before = Snapshot(module, run)
    with pytest.raises(ZeroDivisionError):
        run.fit(module, loader())
    assert_nothing_left(before)
    assert_rule_is_gone(module, run)
    started = [0.1, 0.5, 0.5] if hook == "on_train_batch_end" else [1.0, 1.0, 1.0]
    assert [scale[0].item() for scale in scales(module)] == pytest.approx(started, rel=0.1)


def test_one_trainer_may_fit_again_with_two_callbacks(name: str, expected: LitNet, tmp_path: Path) -> None:
    run = trainer(tmp_path, *backbone_and_head(), max_epochs=2)
    run.fit(LitNet(one_optimizer(name)), loader())
    run.fit_loop.max_epochs = 4
    module = LitNet(one_optimizer(name))
    run.fit(module, loader())
    assert_same_parameters(expected, module)
    assert "optimizer_step" not in vars(run.strategy)


def test_the_rates_of_both_callbacks_are_logged(tmp_path: Path) -> None:
    first, second = backbone_and_head()
    run = trainer(tmp_path, first, second, BatchNormMonitor(), logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(LitNet(), loader(2))
    logged = [row for row in rows(tmp_path) if "revbn/scale_lr" in row]
    assert [float(row["revbn/scale_lr"]) for row in logged] == pytest.approx([(0.05 / 100 + 0.05 / 10) / 2] * 2)
    assert [float(row["revbn/shift_lr"]) for row in logged] == pytest.approx([0.05 * MULTIPLIER] * 2)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ([{}, {"scale": 0.2}], "'model.stem.1', 'model.bn1', 'model.bn2'"),
        ([{"include": ["*.bn*"]}, {"scale": {"*.bn2": 0.2}}], "'model.bn2'"),
    ],
)
def test_two_callbacks_for_one_layer_are_refused_by_its_name_and_write_nothing(
    settings: list[dict[str, Any]], shown: str, tmp_path: Path
) -> None:
    module = LitNet()
    run = trainer(tmp_path, *(quiet(**own) for own in settings))
    said = f"2 callbacks RevisitedBatchNorm in the Trainer select the same layers: {shown}. Divide the layers"
    before = Snapshot(module, run)
    with pytest.raises(MisconfigurationException, match=said) as error:
        run.fit(module, loader(1))
    first, second = (", ".join(f"{name}={value!r}" for name, value in own.items()) for own in settings)
    assert str(error.value).endswith(f"the callbacks are RevisitedBatchNorm({first}) and RevisitedBatchNorm({second})")
    assert all((scale == 1).all() for scale in scales(module))
    assert_nothing_left(before)


def test_many_shared_layers_are_counted(tmp_path: Path) -> None:
    module = LitNet(model=torch.nn.Sequential(residual_net(), torch.nn.BatchNorm1d(5)))
    assert len(BATCH_NORMS) == 3
    with pytest.raises(MisconfigurationException, match=r"'model\.0\.bn2' and 1 more. Divide"):
        trainer(tmp_path, quiet(), quiet(scale=0.2)).fit(module, [images(8)])
