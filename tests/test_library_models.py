"""Real networks of torchvision and timm: outputs, what is around a model, residual branches that start closed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
import torchvision
from helpers.lit import loader, trainer
from helpers.models import assert_same_parameters
from helpers.scripts import run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_revbn import RevisitedBatchNorm, init_batch_norms
from lightning_revbn.core.update_rule import active_rule

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=5),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def set_by_hand(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data[:] = 0.1
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_scales_set_by_hand(name: str, training: bool) -> None:
    rewritten = network(name).train(training)
    init_batch_norms(rewritten)
    results = []
    for model in (rewritten, set_by_hand(network(name)).train(training)):
        torch.manual_seed(1)  # dropout and stochastic depth
        outputs = model(torch.randn(4, 3, 64, 64))
        cross_entropy(outputs, torch.arange(4)).backward()
        results.append([outputs, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_around_the_model_changes(name: str) -> None:
    model = network(name)

    def around() -> tuple[Any, ...]:
        hooks = {
            (module_name, key): len(value)
            for module_name, module in model.named_modules()
            for key, value in vars(module).items()
            if key.endswith("hooks")
        }
        classes = [type(module) for module in model.modules()]
        return list(model.state_dict()), classes, hooks, [id(parameter) for parameter in model.parameters()]

    before = around()
    init_batch_norms(model)
    assert around() == before


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = network("resnet18").eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)  # no C++ compiler needed


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (torch.zeros(2, 3, 32, 32),)).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch's compilers
@pytest.mark.parametrize("way", [copied, pickled, saved, compiled, exported])
def test_a_rewritten_model_can_be_copied_saved_compiled_and_exported(way: Callable[[nn.Module], nn.Module]) -> None:
    model = network("resnet18").eval()
    init_batch_norms(model)
    inputs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(way(model)(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_a_sample_of_the_libraries_models_passes_every_check() -> None:
    done = run_script("benchmarks/zoo.py", "--sample", "4")
    assert done.stdout.splitlines()[-1] == "every check passed"


# --- timm's resnet50 starts the last batch norm of its 16 residual branches at zero -----------------------------------

CLOSED = [f"model.layer{s}.{b}.bn3" for s, blocks in enumerate((3, 4, 6, 3), 1) for b in range(blocks)]


class Timm(L.LightningModule):
    """timm's ResNet-50, and what its optimizer did to the zero scales."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = timm.create_model("resnet50", num_classes=5)
        self.rates: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.model(nn.functional.interpolate(batch[0], 32)), batch[1])

    def configure_optimizers(self) -> Any:
        names = {id(layer.weight): name for name, layer in self.named_modules() if isinstance(layer, nn.BatchNorm2d)}
        rates = self.rates

        class Noting(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                found = {names[id(p)]: g["lr"] for g in self.param_groups for p in g["params"] if id(p) in names}
                rates.append(found)
                return result

        return Noting(self.parameters(), lr=0.05, momentum=0.9)


def fit(path: Path, *callbacks: Any, steps: int = 3, **options: Any) -> Timm:
    module = Timm()
    run = trainer(
        path, *callbacks, max_steps=steps, max_epochs=-1, enable_checkpointing=bool(options.pop("save", False))
    )
    run.fit(module, loader(3, 4), **options)
    return module


def zero_scales(module: Timm) -> dict[str, Tensor]:
    return {name: module.get_submodule(name).weight.detach() for name in CLOSED}


def test_scales_that_start_at_zero_keep_the_full_learning_rate_and_leave_zero_as_without_the_callback(
    tmp_path: Path,
) -> None:
    before = zero_scales(Timm())
    assert len(before) == 16
    assert not any(scale.any() for scale in before.values())
    plain = fit(tmp_path)
    kept = fit(tmp_path, callback := RevisitedBatchNorm(monitor=False))
    assert callback.state_dict()["zero_kept"] == sorted(CLOSED)
    assert len(kept.rates) == 3
    for rates in kept.rates:
        assert {name for name, rate in rates.items() if rate == 0.05} == set(CLOSED)
        assert {rate for name, rate in rates.items() if name not in CLOSED} == {0.05 / 100}
    ours, theirs = (torch.stack([s.abs().mean() for s in zero_scales(m).values()]).mean() for m in (kept, plain))
    assert 0.3 < ours / theirs < 3

    overwritten = fit(tmp_path, callback := RevisitedBatchNorm(monitor=False, zero_scale="overwrite"))
    assert len(callback.report.rewritten) == 53
    assert all(set(rates.values()) == {0.05 / 100} for rates in overwritten.rates)
    assert all(abs(scale.mean() - 0.1) < 0.01 for scale in zero_scales(overwritten).values())


def test_after_a_resume_they_are_still_the_same_scales(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, RevisitedBatchNorm(monitor=False), save, save=True)
    callback = RevisitedBatchNorm(monitor=False)
    resumed = fit(tmp_path, callback, ckpt_path=tmp_path / "saved" / "step=1.ckpt")
    assert callback.state_dict()["zero_kept"] == sorted(CLOSED)
    assert len(resumed.rates) == 2
    assert all({name for name, rate in rates.items() if rate == 0.05} == set(CLOSED) for rates in resumed.rates)
    assert_same_parameters(whole, resumed)
    assert active_rule(resumed.trainer.optimizers[0]) is None
