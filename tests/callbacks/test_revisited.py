"""The callback in real Trainers: what is rewritten and when, what the optimizer does, what user code can see."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from helpers.aftermath import assert_rule_is_gone
from helpers.by_hand import C
from helpers.lit import LitNet, loader, quiet, sgd, trainer
from helpers.models import BATCH_NORMS, ResidualNet, assert_same_parameters, images, residual_net, scales
from helpers.rates import Rates, assert_ratio_everywhere, probing_sgd
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_revbn import BatchNormMonitor, InputBatchNorm, RevisitedBatchNorm, ScaleUpdateRule, init_batch_norms
from lightning_revbn.core.update_rule import active_rule

HALF = "applies half of the method: no scale was rewritten"


def scale_values(module: nn.Module) -> list[float]:
    values = [scale.unique() for scale in scales(module)]
    assert all(len(value) == 1 for value in values)
    return [round(value.item(), 6) for value in values]


class Noting(LitNet):
    """Notes the scales before each training step, and what the optimizer's step did."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first_scales: list[float] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.first_scales is None:
            self.first_scales = scale_values(self)
        return super().training_step(batch, batch_idx)


# --- the rewrite ------------------------------------------------------------------------------------------------------


def test_every_fresh_layer_starts_training_from_the_scale(tmp_path: Path) -> None:
    module = Noting()
    run = trainer(tmp_path, callback := quiet(scale=0.25))
    run.fit(module, loader())
    assert module.first_scales == [0.25] * 3
    assert [record.name for record in callback.report.rewritten] == [f"model.{name}" for name in BATCH_NORMS]
    assert_rule_is_gone(module, run)


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm. 3 scales are torch.bfloat16:UserWarning")
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-true", "bf16-mixed"])
def test_the_report_is_right_in_every_precision(tmp_path: Path, precision: Any) -> None:
    trainer(tmp_path, callback := quiet(), precision=precision).fit(LitNet(), loader())
    assert len(callback.report.rewritten) == 3


def test_scales_whose_numbers_are_too_coarse_to_learn_so_slowly_are_named(tmp_path: Path) -> None:
    target, above = torch.tensor([0.25, 1.0], dtype=torch.bfloat16)
    apart = (torch.nextafter(target, above) - target).item()
    told = rf"3 scales are torch.bfloat16, such as the scale of 'model.stem.1'. Values near 0.25 are {apart:.2g} apart"
    module = LitNet()
    with pytest.warns(UserWarning, match=told):
        trainer(tmp_path, quiet(scale=0.25), precision="bf16-true").fit(module, loader())
    assert scale_values(module) == [0.25] * 3  # as it says
    # Where nothing is divided there is nothing to tell.
    trainer(tmp_path, quiet(scale=0.25, scale_lr_divisor=1.0), precision="bf16-true").fit(LitNet(), loader())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_only_fit_rewrites(tmp_path: Path, stage: str) -> None:
    class Evaluated(LitNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.model(batch[0])

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.model(batch[0])

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch[0])

    module = Evaluated()
    getattr(trainer(tmp_path, quiet()), stage)(module, loader(1), **({} if stage == "predict" else {"verbose": False}))
    assert scale_values(module) == [1.0] * 3


class BuiltLate(Noting):
    """Builds its network in a hook that Lightning calls after the callbacks' setup."""

    def __init__(self, hook: str) -> None:
        super().__init__(model=nn.Identity())
        self.hook = hook
        self.built = 0

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")

    def _build(self, hook: str) -> None:
        if hook == self.hook and not self.built:
            self.model = residual_net()
            self.built += 1


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_made_in_the_modules_own_hooks_are_rewritten(tmp_path: Path, hook: str) -> None:
    module = BuiltLate(hook)
    run = trainer(tmp_path, quiet(include=["model.*"]))
    run.fit(module, loader())
    assert module.first_scales == [0.1] * 3
    assert_rule_is_gone(module, run)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_made_in_the_modules_own_hooks_lose_to_a_checkpoint(tmp_path: Path, hook: str) -> None:
    save = ModelCheckpoint(tmp_path / "saved", "end")
    first = BuiltLate(hook)
    trainer(tmp_path, quiet(), save, enable_checkpointing=True, max_epochs=1).fit(first, loader())
    resumed = BuiltLate(hook)
    resumed.first_scales = []  # trained scales differ between channels
    trainer(tmp_path, callback := quiet()).fit(resumed, loader(), ckpt_path=tmp_path / "saved" / "end.ckpt")
    assert callback.report.rewritten == []


class Pretrained(LitNet):
    """Loads trained weights in its own setup, which Lightning calls after the callbacks' setup."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = residual_net(seed=3)
        self.weights(images(8)[0])
        nn.init.constant_(self.weights.bn1.weight, 0.7)
        self.first_scale: float | None = None

    def setup(self, stage: str) -> None:
        self.model.load_state_dict(self.weights.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.first_scale is None:
            self.first_scale = self.model.bn1.weight[0].item()
        return super().training_step(batch, batch_idx)


def test_weights_loaded_in_the_modules_own_setup_are_kept(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=HALF):
        trainer(tmp_path, callback := quiet(include=["model.*"])).fit(module := Pretrained(), loader())
    assert module.first_scale == pytest.approx(0.7)
    assert {record.state for record in callback.report.left_alone} == {"trained", "excluded"}


def test_weights_loaded_in_the_modules_own_setup_are_overwritten_where_asked_for(tmp_path: Path) -> None:
    trainer(tmp_path, callback := quiet(include=["model.*"], trained="overwrite")).fit(module := Pretrained(), loader())
    assert module.first_scale == pytest.approx(0.1)
    assert len(callback.report.rewritten) == 3


def test_trained_layers_can_be_refused_before_training(tmp_path: Path) -> None:
    module = LitNet()
    module.model(images(8)[0])
    run = trainer(tmp_path, quiet(trained="error"))
    with pytest.raises(ValueError, match=r"model.bn1 \(BatchNorm2d\): its running statistics are not fresh"):
        run.fit(module, loader())
    assert run.global_step == 0
    assert not {"setup", "configure_model"} & vars(module).keys()


class Lazy(Noting):
    """Made by its first batch."""

    def __init__(self) -> None:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
        super().__init__(model=nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), *head))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = LitNet.training_step(self, batch, batch_idx)
        if self.first_scales is None:
            self.first_scales = scale_values(self)
        return loss


def test_lazy_layers_are_rewritten_when_they_are_made_and_learn_with_the_rule(tmp_path: Path) -> None:
    module = Lazy()
    run = trainer(tmp_path, callback := RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    run.fit(module, loader())
    assert module.first_scales == [0.1]
    (record,) = callback.report.records
    assert (record.verdict, record.reason) == ("rewrite", "lazy: written when its first input makes it")
    scale_moved = (module.model[1].weight - 0.1).abs().max()
    assert 0 < scale_moved < module.model[1].bias.abs().max() / 10
    assert not module.model[1]._forward_pre_hooks
    assert "revbn/scale_drift" in run.callback_metrics


def test_a_resumed_lazy_layer_keeps_its_trained_scale(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", "end")
    resumed = Lazy()
    resumed.first_scales = []
    trainer(tmp_path, quiet(), save, enable_checkpointing=True, max_epochs=1).fit(first := Lazy(), loader())
    torch.manual_seed(0)
    trainer(tmp_path, callback := quiet(), max_epochs=1).fit(
        resumed, loader(), ckpt_path=tmp_path / "saved" / "end.ckpt"
    )
    assert torch.equal(resumed.model[1].weight, first.model[1].weight)
    (record,) = callback.report.records
    assert (record.verdict, record.reason) == ("skip", "restored, from a checkpoint or by the model's hooks")


def test_a_lazy_layer_that_was_never_made_is_left_without_a_hook(tmp_path: Path) -> None:
    module = Lazy()
    before = len(module.model[1]._forward_pre_hooks)
    trainer(tmp_path, quiet(), max_steps=0, max_epochs=-1).fit(module, loader())
    assert len(module.model[1]._forward_pre_hooks) == before


def test_layers_built_on_the_meta_device_are_rewritten_once_they_have_values(tmp_path: Path) -> None:
    class Meta(Noting):
        def __init__(self) -> None:
            with torch.device("meta"):
                super().__init__()

        def configure_model(self) -> None:
            self.model = self.model.to_empty(device="cpu")
            for layer in self.model.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()

    module = Meta()
    trainer(tmp_path, callback := quiet()).fit(module, loader())
    assert module.first_scales == [0.1] * 3
    assert len(callback.report.rewritten) == 3


def test_a_pretrained_network_keeps_its_scales_and_the_report_says_so(tmp_path: Path) -> None:
    module = LitNet(lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
    module.model(images(8)[0])
    nn.init.uniform_(module.model.bn1.weight)
    trained = module.model.bn1.weight.detach().clone()
    with pytest.warns(UserWarning, match=HALF):
        trainer(tmp_path, callback := quiet()).fit(module, loader())
    assert torch.equal(module.model.bn1.weight, trained)
    assert {record.reason for record in callback.report.records} == {"its running statistics are not fresh"}


@pytest.mark.parametrize("trained", ["keep", "overwrite", "error"])
def test_a_second_fit_never_loses_what_the_first_one_trained(tmp_path: Path, trained: Any) -> None:
    module = LitNet()
    callback = quiet(trained=trained)
    trainer(tmp_path, callback).fit(module, loader())
    before = [scale.detach().clone() for scale in scales(module)]
    trainer(tmp_path, callback, max_steps=0, max_epochs=-1).fit(module, loader())
    assert all(torch.equal(scale, old) for scale, old in zip(scales(module), before, strict=True))
    trainer(tmp_path, callback).fit(module, loader())
    assert {record.reason for record in callback.report.records} <= {
        "trained in an earlier fit",
        "its running statistics are not fresh",
    }
    assert callback.report.rewritten == []


def test_a_callback_used_for_another_model_treats_it_afresh(tmp_path: Path) -> None:
    callback = quiet(trained="overwrite")
    trainer(tmp_path, callback).fit(LitNet(), loader())
    other = Noting()
    other.model(images(8)[0])
    nn.init.constant_(other.model.bn1.weight, 0.7)
    trainer(tmp_path, callback).fit(other, loader())
    assert other.first_scales == [0.1] * 3


@pytest.mark.parametrize("trained", ["keep", "overwrite", "error"])
def test_the_front_layer_keeps_its_own_scale_and_learns_with_the_rule(tmp_path: Path, trained: Any) -> None:
    lr, c, weight_decay = 0.05, 100.0, 0.01
    by_hand = LitNet(model=nn.Sequential(nn.BatchNorm2d(3), residual_net()))
    nn.init.constant_(by_hand.model[0].weight, 0.25 * 0.58)
    by_hand.model[0].bias.requires_grad_(False)
    for scale in scales(by_hand.model[1]):
        nn.init.constant_(scale, 0.25)
    own = {id(scale) for scale in scales(by_hand)}
    rest = [value for value in by_hand.parameters() if id(value) not in own]
    groups = [{"params": rest, "weight_decay": weight_decay}, {"params": scales(by_hand), "lr": lr / c}]
    by_hand.configure = lambda module: torch.optim.SGD(groups, lr=lr, momentum=0.9)
    trainer(tmp_path).fit(by_hand, loader())

    module = LitNet(model=nn.Sequential(InputBatchNorm(3, scale=0.25 * 0.58), residual_net()))
    callback = RevisitedBatchNorm(scale=0.25, trained=trained, monitor=False)
    trainer(tmp_path, callback).fit(module, loader())
    assert_same_parameters(by_hand, module)
    assert not torch.equal(module.model[0].weight, torch.full((3,), 0.25 * 0.58))
    assert str(callback.report).count("the input layer starts at a scale of its own") == 1


def test_the_switch_turns_everything_off(tmp_path: Path) -> None:
    plain, switched = LitNet(), LitNet()
    trainer(tmp_path).fit(plain, loader())
    callback = RevisitedBatchNorm(enabled=False)
    trainer(tmp_path, callback, logger=CSVLogger(tmp_path)).fit(switched, loader())
    assert_same_parameters(plain, switched)
    assert callback.state_dict() == {}
    assert not list(tmp_path.rglob("metrics.csv"))


def test_scale_one_without_divisor_and_exemption_changes_nothing(tmp_path: Path) -> None:
    plain, neutral = LitNet(), LitNet()
    trainer(tmp_path).fit(plain, loader())
    callback = quiet(scale=1.0, scale_lr_divisor=1, weight_decay_exempt=None)
    with pytest.warns(UserWarning, match="has no effect: no scale was rewritten"):
        trainer(tmp_path, callback).fit(neutral, loader())
    assert_same_parameters(plain, neutral)


# --- the update rule --------------------------------------------------------------------------------------------------


def against_a_hand_written_module(path: Path, **options: Any) -> tuple[LitNet, LitNet]:
    by_hand = LitNet(configure=hand_made)
    for scale in scales(by_hand):
        nn.init.constant_(scale, 0.1)
    trainer(path, **options).fit(by_hand, loader())
    module = LitNet()
    trainer(path, quiet(), **options).fit(module, loader())
    return by_hand, module


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}],
    ids=["plain", "accumulation", "clip-value"],
)
def test_training_equals_a_hand_written_module_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_same_parameters(*against_a_hand_written_module(tmp_path, **options))


def test_training_with_the_norm_of_gradients_clipped_equals_a_hand_written_module(tmp_path: Path) -> None:
    # The norm is summed in the order of the groups, which is another one in groups made by hand.
    by_hand, module = against_a_hand_written_module(tmp_path, gradient_clip_val=0.1)
    for (name, value), other in zip(by_hand.state_dict().items(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7, msg=name)


def hand_made(module: nn.Module) -> torch.optim.Optimizer:
    own = {id(scale) for scale in scales(module)}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in own]
    divided = {"params": scales(module), "lr": 0.05 / C, "weight_decay": 0.0}
    return torch.optim.SGD([{"params": rest}, divided], lr=0.05, momentum=0.9, weight_decay=0.01)


def test_manual_optimization_with_two_optimizers_follows_the_rule_in_both(tmp_path: Path) -> None:
    class Two(LitNet):
        def __init__(self, configure: Any) -> None:
            super().__init__(configure, model=nn.ModuleList([residual_net(1), residual_net(2)]))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer, network in zip(self.optimizers(), self.model, strict=True):
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(network(batch[0]), batch[1]))
                optimizer.step()

    by_hand = Two(lambda module: [hand_made(network) for network in module.model])
    for scale in scales(by_hand):
        nn.init.constant_(scale, 0.1)
    trainer(tmp_path).fit(by_hand, loader())
    module = Two(lambda module: [sgd(network) for network in module.model])
    trainer(tmp_path, quiet()).fit(module, loader())
    assert_same_parameters(by_hand, module)


def test_the_papers_settings_train_a_resnet18_as_hand_made_layers_and_groups_do(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=5)
        nn.init.zeros_(model.fc.bias)
        return model

    def papers_groups(module: nn.Module) -> torch.optim.Optimizer:
        layers = list(module.modules())
        norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        weights = [layer.weight for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)]
        vectors = [norm.bias for norm in norms] + [layer.bias for layer in layers if isinstance(layer, nn.Linear)]
        groups = [
            {"params": weights, "weight_decay": 1e-4},
            {"params": vectors},
            {"params": [norm.weight for norm in norms], "lr": 0.1 / 100},
        ]
        assert sum(len(group["params"]) for group in groups) == len(list(module.parameters())) == 62
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    by_hand = LitNet(papers_groups, network())
    for layer in by_hand.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data[:] = 0.1
    trainer(tmp_path, max_epochs=1).fit(by_hand, loader(4))

    module = LitNet(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4), network())
    callback = quiet(scale=0.1, scale_lr_divisor=100, weight_decay_exempt="vectors")
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader(4))
    assert_same_parameters(by_hand, module)


@pytest.mark.parametrize("schedule", ["onecycle", "cyclic", "cosine-eta_min"])
def test_the_ratio_holds_under_schedules_that_write_one_rate_to_all_groups(tmp_path: Path, schedule: str) -> None:
    seen: Rates = []

    def configure(module: nn.Module) -> Any:
        optimizer = probing_sgd(seen)(module)
        scheduler = {
            "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.1, total_steps=12, cycle_momentum=False
            ),
            "cyclic": lambda: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 3, cycle_momentum=False),
            "cosine-eta_min": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=1e-3),
        }[schedule]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    trainer(tmp_path, quiet()).fit(LitNet(configure), loader())
    assert_ratio_everywhere(seen, 12)


def test_the_ratio_holds_in_the_tuner_and_the_fit_after_it_starts_from_the_scale(tmp_path: Path) -> None:
    seen: Rates = []
    module = Noting(probing_sgd(seen))
    run = trainer(tmp_path, callback := quiet())
    Tuner(run).lr_find(module, loader(10), min_lr=1e-4, max_lr=1.0, num_training=20)
    assert_ratio_everywhere(seen, 20)
    assert_rule_is_gone(module, run)
    module.first_scales = None
    run.fit(module, loader(10))
    assert module.first_scales == [0.1] * 3
    assert len(callback.report.rewritten) == 3


def test_groups_added_by_backbone_finetuning_are_covered(tmp_path: Path) -> None:
    seen: Rates = []

    class Finetuned(LitNet):
        @property
        def backbone(self) -> nn.Module:
            return self.model.stem

    module = Finetuned(
        lambda m: torch.optim.SGD((p for n, p in m.model.named_parameters() if "stem" not in n), lr=0.05)
    )

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rule = active_rule(optimizer)
            assert rule is not None
            seen.append((len(optimizer.param_groups), rule.covered))

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer(tmp_path, finetuning, quiet(), Watch()).fit(module, loader())
    assert seen[0] == (1, 2)
    assert seen[-1] == (2, 3)


def test_scales_kept_at_zero_keep_the_full_learning_rate(tmp_path: Path) -> None:
    module = LitNet(model=residual_net(zero_init_residual=True))

    def by_hand(module: nn.Module) -> torch.optim.Optimizer:
        net = module.model
        divided = [net.stem[1].weight, net.bn1.weight]
        exempt = [net.bn2.weight]
        rest = [p for p in module.parameters() if id(p) not in {id(q) for q in [*divided, *exempt]}]
        groups = [
            {"params": rest},
            {"params": exempt, "weight_decay": 0.0},
            {"params": divided, "lr": 0.05 / C, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01)

    reference = LitNet(by_hand, copy.deepcopy(module.model))
    init_batch_norms(reference.model)
    trainer(tmp_path).fit(reference, loader())
    trainer(tmp_path, quiet()).fit(module, loader())
    assert_same_parameters(reference, module)
    assert module.model.bn2.weight.abs().max() > 1e-3  # some 1e-5 at lr / c


def test_permanent_groups_in_configure_optimizers_are_left_as_they_are(tmp_path: Path) -> None:
    from lightning_revbn import scale_param_groups

    configure = lambda m: torch.optim.SGD(scale_param_groups(m, 0.05, 0.01), momentum=0.9)  # noqa: E731
    ruled, permanent = LitNet(), LitNet(configure)
    trainer(tmp_path, quiet()).fit(ruled, loader())
    trainer(tmp_path, quiet()).fit(permanent, loader())
    assert_same_parameters(ruled, permanent)


def test_an_optimizer_that_cannot_follow_the_rule_is_refused_before_training(tmp_path: Path) -> None:
    module = LitNet(lambda m: torch.optim.LBFGS(m.parameters()))
    run = trainer(tmp_path, quiet())
    with pytest.raises(MisconfigurationException, match="RevisitedBatchNorm: LBFGS takes one step for all parameters"):
        run.fit(module, loader())
    assert run.global_step == 0
    trainer(tmp_path, quiet(scale_lr_divisor=1, weight_decay_exempt=None), max_epochs=1).fit(module, loader(1))


# --- what user code sees ----------------------------------------------------------------------------------------------


class Looking(LitNet):
    """Looks at the optimizer's groups from every place where user code runs during a step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.looks: dict[str, list[Any]] = {}

    def look(self, place: str) -> None:
        optimizer = self.trainer.optimizers[0]
        groups = [
            (id(group), tuple(map(id, group["params"])), {k: v for k, v in group.items() if k != "params"})
            for group in optimizer.param_groups
        ]
        self.looks.setdefault(place, []).append((id(optimizer.param_groups), groups))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.look("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        self.look("on_before_backward")

    def on_after_backward(self) -> None:
        self.look("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.look("on_before_optimizer_step")

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.look("configure_gradient_clipping")
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.look("optimizer_step before")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.look("optimizer_step after")

    def on_train_batch_end(self, *args: Any) -> None:
        self.look("on_train_batch_end")


def test_user_code_sees_one_and_the_same_groups_everywhere(tmp_path: Path) -> None:
    module = Looking()
    run = trainer(tmp_path, quiet(), LearningRateMonitor(), logger=CSVLogger(tmp_path), gradient_clip_val=1.0)
    run.fit(module, loader())
    assert set(module.looks) == {
        "training_step", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
        "configure_gradient_clipping", "optimizer_step before", "optimizer_step after", "on_train_batch_end",
    }  # fmt: skip
    first = module.looks["training_step"][0]
    assert len(first[1]) == 1
    assert all(look == first for looks in module.looks.values() for look in looks)
    assert all(len(looks) == 12 for looks in module.looks.values())
    assert run.callback_metrics["lr-SGD"] == pytest.approx(0.05)


@pytest.mark.parametrize("error", [RuntimeError("user's"), KeyboardInterrupt()])
@pytest.mark.parametrize("hook", ["training_step", "on_before_optimizer_step", "on_train_batch_end"])
def test_after_an_exception_nothing_is_left_behind(tmp_path: Path, error: BaseException, hook: str) -> None:
    module = Looking()
    original = getattr(module, hook)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if module.trainer.global_step == 3:
            module.look("before the error")
            raise error
        return original(*args, **kwargs)

    setattr(module, hook, failing)
    run = trainer(tmp_path, quiet())
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        run.fit(module, loader())
    module.look("after the error")
    assert module.looks["after the error"] == module.looks["before the error"]
    assert len(run.optimizers[0].param_groups) == 1
    assert_rule_is_gone(module, run)


def test_a_failing_setup_leaves_no_wrapped_method_behind(tmp_path: Path) -> None:
    class Failing(BuiltLate):
        def setup(self, stage: str) -> None:
            raise RuntimeError("no data")

    module = Failing("configure_model")
    run = trainer(tmp_path, quiet())
    with pytest.raises(RuntimeError, match="no data"):
        run.fit(module, loader())
    assert_rule_is_gone(module, run)


def test_a_copy_of_the_module_made_in_another_callbacks_setup_has_its_own_methods(tmp_path: Path) -> None:
    class Copying(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.copy = copy.deepcopy(pl_module)

    module = BuiltLate("configure_model")
    trainer(tmp_path, quiet(), copying := Copying()).fit(module, loader())
    assert inspect.ismethod(copying.copy.configure_model)
    copying.copy.configure_model()
    assert copying.copy.built == 1
    assert module.built == 1


# --- checkpoints ------------------------------------------------------------------------------------------------------


def every_step(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=-1)


def test_a_checkpoint_is_the_same_as_without_the_callback_but_for_its_own_state(tmp_path: Path) -> None:
    for name, callbacks in (("plain", []), ("ruled", [quiet()])):
        run = trainer(tmp_path, *callbacks, every_step(tmp_path / name), enable_checkpointing=True, max_epochs=1)
        run.fit(LitNet(), loader(2))
    for step in (1, 2):
        plain, ruled = (
            torch.load(tmp_path / name / f"step={step}.ckpt", weights_only=True) for name in ("plain", "ruled")
        )
        assert ruled["state_dict"].keys() == plain["state_dict"].keys()
        (left,), (right,) = ruled["optimizer_states"], plain["optimizer_states"]
        assert left["param_groups"] == right["param_groups"]
        assert left["state"].keys() == right["state"].keys()
        assert ruled["lr_schedulers"] == plain["lr_schedulers"]
        assert ruled.keys() == plain.keys()
        assert ruled["callbacks"].keys() - plain["callbacks"].keys() >= {"RevisitedBatchNorm"}


@pytest.mark.parametrize("hook", ["none", "configure_model"])
def test_a_run_stopped_at_any_step_and_resumed_ends_as_the_undisturbed_one(tmp_path: Path, hook: str) -> None:
    def module() -> LitNet:
        def configure(m: nn.Module) -> Any:
            optimizer = torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        made = Noting() if hook == "none" else BuiltLate(hook)
        made.configure = configure
        made.first_scales = []  # trained scales differ between channels
        return made

    whole = module()
    run = trainer(
        tmp_path,
        RevisitedBatchNorm(),
        every_step(tmp_path / "saved"),
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
    )
    run.fit(whole, loader(4))
    assert run.global_step == 8
    for step in range(1, 8):
        resumed = module()
        callback = RevisitedBatchNorm()
        run = trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
        run.fit(resumed, loader(4), ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        assert run.global_step == 8
        assert_same_parameters(whole, resumed)
        assert callback.report.rewritten == []
        assert {record.reason for record in callback.report.records} == {
            "restored, from a checkpoint or by the model's hooks"
        }


def resume(path: Path, saved_with: list[L.Callback], resumed_with: list[L.Callback]) -> tuple[LitNet, L.Trainer]:
    save = ModelCheckpoint(path / "saved", "end")
    trainer(path, *saved_with, save, enable_checkpointing=True, max_epochs=1).fit(LitNet(), loader())
    module = Noting(model=residual_net(seed=9))
    module.first_scales = []  # trained scales differ between channels
    run = trainer(path, *resumed_with, max_epochs=2)
    run.fit(module, loader(), ckpt_path=path / "saved" / "end.ckpt")
    return module, run


def test_a_run_saved_with_the_callback_resumes_without_it(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Please add the following callbacks: .*RevisitedBatchNorm"):
        module, run = resume(tmp_path, [quiet()], [])
    assert run.global_step == 12
    assert all(scale.mean() < 0.3 for scale in scales(module))  # it went on from 0.1, at the full learning rate


def test_a_run_saved_without_the_callback_resumes_with_it_and_keeps_its_scales(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=HALF):
        module, run = resume(tmp_path, [], [callback := quiet()])
    assert run.global_step == 12
    assert all(scale.mean() > 0.8 for scale in scales(module))
    assert [record.verdict for record in callback.report.records] == ["skip"] * 3
    saved = torch.load(tmp_path / "saved" / "end.ckpt", weights_only=True)["state_dict"]
    moved = (saved["model.bn1.weight"] - module.model.bn1.weight).abs().max()
    shift_moved = (saved["model.bn1.bias"] - module.model.bn1.bias).abs().max()
    assert 0 < moved < shift_moved / 10  # and they learn with lr / c from there


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 0.25}, r"made with scale=0.1, this run has scale=0.25. Restored scales keep their values"),
        ({"scale_lr_divisor": 50}, r"made with scale_lr_divisor=100.0, this run has scale_lr_divisor=50.0"),
        (
            {"weight_decay_exempt": None},
            r"made with weight_decay_exempt='scale', this run has weight_decay_exempt=None",
        ),
    ],
)
def test_a_resumed_run_with_other_settings_says_so(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        resume(tmp_path, [quiet()], [quiet(**options)])


def test_the_layers_kept_at_zero_are_the_same_after_a_resume(tmp_path: Path) -> None:
    def module() -> LitNet:
        return LitNet(model=residual_net(zero_init_residual=True))

    whole = module()
    run = trainer(tmp_path, quiet(), every_step(tmp_path / "saved"), enable_checkpointing=True)
    run.fit(whole, loader(3))
    # Built without the zeros: only the checkpoint knows which layers were started there.
    for resumed in (module(), LitNet(model=residual_net())):
        trainer(tmp_path, callback := quiet()).fit(resumed, loader(3), ckpt_path=tmp_path / "saved" / "step=2.ckpt")
        assert_same_parameters(whole, resumed)
        assert callback.state_dict()["zero_kept"] == ["model.bn2"]


def test_settings_are_saved_as_plain_values(tmp_path: Path) -> None:
    callback = RevisitedBatchNorm(scale={"model.*": 0.2}, scale_lr_divisor=10)
    run = trainer(
        tmp_path,
        callback,
        every_step(tmp_path / "saved"),
        enable_checkpointing=True,
        max_epochs=1,
        logger=CSVLogger(tmp_path),
    )
    run.fit(LitNet(), loader(1))
    state = torch.load(tmp_path / "saved" / "step=1.ckpt", weights_only=True)["callbacks"]["RevisitedBatchNorm"]
    assert {key: state[key] for key in ("scale", "scale_lr_divisor", "weight_decay_exempt", "zero_kept")} == {
        "scale": {"model.*": 0.2},
        "scale_lr_divisor": 10.0,
        "weight_decay_exempt": "scale",
        "zero_kept": [],
    }


def test_a_callback_that_has_trained_can_be_pickled_and_copied(tmp_path: Path) -> None:
    callback = RevisitedBatchNorm()
    trainer(tmp_path, callback, logger=CSVLogger(tmp_path)).fit(LitNet(), loader())
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.state_dict().keys() == callback.state_dict().keys()
    trainer(tmp_path, copy.deepcopy(callback), logger=CSVLogger(tmp_path)).fit(LitNet(), loader())


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_the_table_is_printed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, quiet()).fit(LitNet(), loader())
    (said,) = [record.getMessage() for record in caplog.records if "RevisitedBatchNorm:\n" in record.getMessage()]
    assert "model.stem.1 ... model.bn2 (3) | BatchNorm2d | 6        | -> 0.1 | freshly initialised" in said
    assert "\n3 scales learn with lr / 100\n" in said


def test_on_a_terminal_rich_draws_the_table_unless_lightning_is_silenced(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    trainer(tmp_path, quiet(), max_epochs=1).fit(LitNet(), loader(1))
    drawn = capsys.readouterr().err
    assert "│ model.stem.1 ... model.bn2 (3) │ BatchNorm2d │ 6        │ -> 0.1 │ freshly initialised │" in drawn
    assert "3 scales learn with lr / 100" in drawn
    caplog.set_level(logging.WARNING, logger="lightning.pytorch")
    trainer(tmp_path, quiet(), max_epochs=1).fit(LitNet(), loader(1))
    assert "freshly initialised" not in capsys.readouterr().err


def test_a_model_without_batch_norm_is_warned_about(tmp_path: Path) -> None:
    module = LitNet(model=nn.Sequential(nn.Flatten(), nn.Linear(108, 5)))
    with pytest.warns(UserWarning, match="RevisitedBatchNorm has no effect: the model has no batch norm layers"):
        trainer(tmp_path, quiet(), max_epochs=1).fit(module, loader())


def test_a_callback_that_rewrites_nothing_and_divides_nothing_warns(tmp_path: Path) -> None:
    module = LitNet()
    for scale in scales(module):
        scale.requires_grad_(False)
    module.configure = lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="has no effect: no scale was rewritten, and none learns with lr / 100"):
        trainer(tmp_path, quiet(), max_epochs=1).fit(module, loader())


def test_scales_outside_every_optimizer_are_warned_about(tmp_path: Path) -> None:
    module = LitNet(lambda m: torch.optim.SGD(m.model.head.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="no optimizer holds a batch norm scale, so none learns with lr / c"):
        trainer(tmp_path, quiet(), max_epochs=1).fit(module, loader())


def test_a_pattern_that_matches_nothing_stops_before_training(tmp_path: Path) -> None:
    for options in ({"exclude": ["model.bn3"]}, {"scale": {"model.bn3": 0.2, "*": 0.1}}):
        run = trainer(tmp_path, quiet(**options))
        with pytest.raises(ValueError, match=r": the pattern 'model.bn3' matches none .* 'model.bn"):
            run.fit(LitNet(), loader())
        assert run.global_step == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scale": 0}, "scale=0 must be finite and positive"),
        ({"scale_lr_divisor": float("nan")}, "must be finite and positive, got nan"),
        ({"weight_decay_exempt": "all"}, "weight_decay_exempt='all' is unknown"),
        ({"zero_scale": "drop"}, "zero_scale='drop' is unknown"),
        ({"trained": "drop"}, "trained='drop' is unknown"),
    ],
)
def test_wrong_settings_are_refused_when_the_callback_is_made(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        RevisitedBatchNorm(**options)


def test_the_settings_can_be_read_back() -> None:
    callback = RevisitedBatchNorm(
        {"a": 0.2}, 10, 3, 1e-3, "norm", ["a*"], ["ab"], "overwrite", "error", BatchNormMonitor(3), False
    )
    assert (callback.scale, callback.scale_lr_divisor, callback.weight_decay_exempt) == ({"a": 0.2}, 10.0, "norm")
    assert (callback.shift_lr_multiplier, callback.eps) == (3.0, 1e-3)
    assert (tuple(callback.include), tuple(callback.exclude)) == (("a*",), ("ab",))
    assert (callback.zero_scale, callback.trained, callback.enabled) == ("overwrite", "error", False)
    assert callback.monitor is not None
    assert callback.monitor.every_n_steps == 3


def test_the_defaults_are_the_papers_starting_point() -> None:
    callback = RevisitedBatchNorm()
    assert (callback.scale, callback.scale_lr_divisor, callback.weight_decay_exempt) == (0.1, 100.0, "scale")
    assert (callback.include, callback.exclude) == (("*",), ())
    assert (callback.zero_scale, callback.trained, callback.enabled) == ("keep", "keep", True)
    assert isinstance(callback.monitor, BatchNormMonitor)
    assert RevisitedBatchNorm(monitor=False).monitor is None


def test_the_trainers_own_monitor_replaces_the_built_in_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormMonitor(prefix="bn"), RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    run.fit(LitNet(), loader())
    assert {key.split("/")[0] for key in run.callback_metrics} == {"bn"}


def test_the_built_in_monitor_is_back_in_a_trainer_without_one(tmp_path: Path) -> None:
    callback = RevisitedBatchNorm()
    trainer(tmp_path, BatchNormMonitor(), callback, logger=CSVLogger(tmp_path)).fit(LitNet(), loader(1))
    run = trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    run.fit(LitNet(), loader(1))
    assert "revbn/scale_mean" in run.callback_metrics


def test_plain_pytorch_equals_the_callback(tmp_path: Path) -> None:
    module = LitNet()
    trainer(tmp_path, quiet(), max_epochs=1).fit(module, loader())

    model: ResidualNet = residual_net()
    report = init_batch_norms(model)
    optimizer = sgd(model)
    with ScaleUpdateRule(optimizer, report.scales, weight_decay_exempt=report.scales):
        for inputs, targets in loader():
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert_same_parameters(module.model, model)
