"""Faults: whatever breaks a run, nothing of the callback stays behind, and the run can be resumed."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import pytest
import torch
from helpers.aftermath import Snapshot, assert_nothing_left
from helpers.by_hand import LR, C, sgd_by_hand
from helpers.lit import Configure, LitNet, loader, sgd, trainer
from helpers.models import ResidualNet, assert_same_parameters, residual_net, scales
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

Whole: TypeAlias = "tuple[Run, Counter[str], Counter[str]]"
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # runs are resumed in folders of their own


def scheduled(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def configure(module: nn.Module) -> dict[str, Any]:
    return scheduled(torch.optim.SGD(module.parameters(), LR, 0.9, weight_decay=0.01))


def by_hand(module: nn.Module) -> dict[str, Any]:
    return scheduled(sgd_by_hand(module))


class Net(LitNet):
    """A module with everything that a fit can use."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.model(inputs), targets)

    def train_dataloader(self) -> Any:
        return loader(4)

    def val_dataloader(self) -> Any:
        return loader(1)


class Data(L.LightningDataModule):
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0}

    def train_dataloader(self) -> Any:
        return loader(4)

    def val_dataloader(self) -> Any:
        return loader(1)


class Stateful(L.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": 1}


# --- an exception in every hook of the user's -------------------------------------------------------------------------

NOT_CALLED = {  # methods that users call, hooks of other stages, and on_exception, which has a test of its own
    "optimizers", "lr_schedulers", "print", "log", "log_dict", "all_gather", "forward", "manual_backward",
    "toggle_optimizer", "untoggle_optimizer", "toggled_optimizer", "clip_gradients", "freeze", "unfreeze", "to_onnx",
    "to_torchscript", "to_tensorrt", "to", "cuda", "cpu", "type", "float", "double", "half", "save_hyperparameters",
    "remove_ignored_hparams", "configure_sharded_model", "on_exception", "from_datasets", "load_from_checkpoint",
}  # fmt: skip


def hooks(base: type) -> list[str]:
    """List the hooks that Lightning calls in a fit, of one of its classes."""
    lightnings = [cls for cls in base.__mro__ if cls.__module__.startswith("lightning.")]
    names = {name for cls in lightnings for name, method in vars(cls).items() if callable(method)}
    if issubclass(base, nn.Module):
        names |= {"state_dict", "load_state_dict"}
    other_stages = ("test", "predict")
    return sorted(
        name
        for name in names - NOT_CALLED
        if not name.startswith("_") and not any(stage in name for stage in other_stages)
    )


class UsersError(Exception):
    pass


class Calls:
    """Counts the calls of hooks, and fails in one of them."""

    def __init__(self, fail_in: str = "", at: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.fail_in, self.at = fail_in, at

    def note(self, hook: str) -> None:
        self.counts[hook] += 1
        if (hook, self.counts[hook]) == (self.fail_in, self.at):
            raise UsersError(hook)


def watched(base: type, names: Iterable[str], calls: Calls) -> type:
    """Derive a class that overrides hooks: they are counted, then do what they did."""

    def override(name: str) -> Callable[..., Any]:
        original = getattr(base, name)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.note(name)
            return original(self, *args, **kwargs)

        return hook

    return type(base.__name__, (base,), {name: override(name) for name in names})


OWNERS: dict[str, type] = {
    "module": Net,
    "datamodule": Data,
    "callback before": Stateful,
    "callback after": Stateful,
}


class Run:
    """A fit with one watched object of the user's, under the callback or with groups made by hand."""

    def __init__(
        self,
        folder: Path,
        owner: str,
        calls: Calls,
        ruled: bool = True,
        *,
        broken_at: int = -1,
        checkpoint_io: TorchCheckpointIO | None = None,
        more: Sequence[L.Callback] = (),
        detect_anomaly: bool = False,
    ) -> None:
        base = OWNERS[owner]
        names = [*hooks(base), *["on_exception"] * hasattr(base, "on_exception")]
        user: Any = watched(base, names, calls)
        self.folder = folder
        self.module: Any = (user if owner == "module" else Net)(configure if ruled else by_hand)
        self.data = user() if owner == "datamodule" else None
        callbacks = [user()] if "callback" in owner else []
        if ruled:
            ours = RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True))
            callbacks.insert(0 if owner == "callback after" else len(callbacks), ours)
        else:
            for scale in scales(self.module):
                nn.init.constant_(scale, 0.1)
        if broken_at >= 0:
            self.module.training_step = functools.partial(break_at, self.module, broken_at)
        save = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        self.trainer = trainer(
            folder,
            *callbacks,
            *more,
            save,
            logger=CSVLogger(folder),
            enable_checkpointing=True,
            plugins=checkpoint_io,
            detect_anomaly=detect_anomaly,
            gradient_clip_val=0.1,
            gradient_clip_algorithm="value",
        )
        self.before = Snapshot(self.module, self.trainer, *callbacks, *[self.data] * (self.data is not None))

    def fit(self, ckpt_path: Path | None = None) -> None:
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=ckpt_path)

    def newest(self) -> Path | None:
        files = (self.folder / "saved").glob("*.ckpt")
        return max(files, key=lambda file: int(file.stem.partition("=")[2]), default=None)


def break_at(module: LitNet, step: int, batch: Any, batch_idx: int) -> Tensor:
    if module.trainer.global_step == step:
        raise UsersError("training_step")
    return type(module).training_step(module, batch, batch_idx)


CASES = [(owner, hook) for owner, base in OWNERS.items() for hook in hooks(base)]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, bool], Whole]:
    """A run to the end, and how often it called each hook, and the same for one resumed in its midst."""

    @functools.cache
    def train(owner: str, ruled: bool) -> Whole:
        folder = tmp_path_factory.mktemp(owner)
        fresh, resumed = Calls(), Calls()
        run = Run(folder, owner, fresh, ruled)
        run.fit()
        counts = fresh.counts.copy()
        assert_nothing_left(run.before)
        again = Run(tmp_path_factory.mktemp(owner), owner, resumed, ruled)
        again.fit(folder / "saved" / "step=3.ckpt")
        return run, counts, resumed.counts.copy()

    return train


@pytest.mark.parametrize(("owner", "hook"), CASES)
def test_an_exception_in_any_hook_leaves_nothing_behind_and_loses_nothing(
    owner: str, hook: str, undisturbed: Any, tmp_path: Path
) -> None:
    whole, fresh, resumed = undisturbed(owner, True)
    assert hook in fresh | resumed, "never called: add it to the run, or to NOT_CALLED"
    runs: list[Run] = []
    for ruled in (True, False):
        saved = None if hook in fresh else undisturbed(owner, ruled)[0].folder / "saved" / "step=3.ckpt"
        run = Run(tmp_path / str(ruled), owner, Calls(hook, min((fresh if hook in fresh else resumed)[hook], 3)), ruled)
        with pytest.raises(UsersError, match=hook):
            run.fit(saved)
        runs.append(run)
    ruled, reference = runs
    given_back = copy.deepcopy(reference.module)
    for scale in scales(given_back):
        if (scale == 0.1).all():  # as it was written before the fit by hand: no update has come
            nn.init.ones_(scale)
    assert_nothing_left(ruled.before, like=given_back)

    again = Run(tmp_path / "again", owner, Calls())
    again.fit(ruled.newest())
    assert_same_parameters(whole.module, again.module)


def broken_twice(folder: Path, owner: str, ruled: bool) -> Run:
    """Train until the module fails at step 3, and the user's `on_exception` too."""
    run = Run(folder, owner, Calls("on_exception", 1), ruled, broken_at=3)
    with pytest.raises(UsersError, match="on_exception") as raised:
        run.fit()
    assert str(raised.value.__context__) == "training_step"
    return run


@pytest.mark.parametrize("owner", ["datamodule", "callback after"])
def test_an_exception_while_handling_one_leaves_nothing_behind(owner: str, tmp_path: Path) -> None:
    ruled, reference = (broken_twice(tmp_path / str(ruled), owner, ruled) for ruled in (True, False))
    assert_nothing_left(ruled.before, like=reference.module)


def test_where_an_earlier_callback_ends_the_cleaning_up_the_next_fit_does_it(tmp_path: Path) -> None:
    run = broken_twice(tmp_path, "callback before", ruled=True)
    assert run.trainer.optimizers[0]._optimizer_step_pre_hooks  # Lightning tells no callback after the broken one
    (ours,) = (callback for callback in run.trainer.callbacks if isinstance(callback, RevisitedBatchNorm))

    class Check(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert_nothing_left(run.before)  # already now, not only when this fit ends

    trainer(tmp_path / "next", ours, Check(), logger=CSVLogger(tmp_path)).fit(Net(configure))


# --- signals, disks, numbers ------------------------------------------------------------------------------------------


class FullDisk(TorchCheckpointIO):
    """Has room for some checkpoints; of the next one it takes half, and the kernel refuses the rest."""

    def __init__(self, room: int) -> None:
        self.room = room

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.room -= 1
        if self.room >= 0:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        torch.save(checkpoint, buffer := io.BytesIO())
        half = len(buffer.getvalue()) // 2
        Path(path).write_bytes(buffer.getvalue()[:half])
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(buffer.getvalue()[half:])


def terminated(run: Run, step: int) -> None:
    def training_step(batch: Any, batch_idx: int) -> Tensor:
        if run.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return Net.training_step(run.module, batch, batch_idx)

    run.module.training_step = training_step


def diverging(run: Run, step: int) -> None:
    def training_step(batch: Any, batch_idx: int) -> Tensor:
        loss = Net.training_step(run.module, batch, batch_idx)
        run.module.log("loss", loss := loss * float("nan") if run.trainer.global_step == step else loss)
        return loss

    run.module.training_step = training_step


def both_ways(
    folder: Path, prepare: Callable[[Run], None], error: type[BaseException] | None, **options: Any
) -> tuple[Run, Run]:
    """Run into the same fault under the callback, and with groups made by hand."""
    runs: list[Run] = []
    for ruled in (True, False):
        run = Run(folder / str(ruled), "module", Calls(), ruled, **{key: make() for key, make in options.items()})
        prepare(run)
        with pytest.raises(error) if error else contextlib.nullcontext():
            run.fit()
        runs.append(run)
    return runs[0], runs[1]


def assert_resumed_as(whole: Run, folder: Path, saved: Path | None) -> None:
    again = Run(folder, "module", Calls())
    again.fit(saved)
    assert again.trainer.global_step == whole.trainer.global_step
    assert_same_parameters(whole.module, again.module)


def test_a_terminated_run_leaves_nothing_behind_and_resumes(undisturbed: Any, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    ruled, reference = both_ways(tmp_path, lambda run: terminated(run, 3), SIGTERMException)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert 3 <= ruled.trainer.global_step == reference.trainer.global_step < 8
    del ruled.module.training_step
    assert_nothing_left(ruled.before, like=reference.module)
    assert_resumed_as(undisturbed("module", True)[0], tmp_path / "again", ruled.newest())


def test_a_disk_that_is_full_in_the_midst_of_a_checkpoint_leaves_nothing_behind(
    undisturbed: Any, tmp_path: Path
) -> None:
    ruled, reference = both_ways(tmp_path, lambda run: None, OSError, checkpoint_io=lambda: FullDisk(3))
    assert_nothing_left(ruled.before, like=reference.module)
    torn = ruled.newest()
    assert torn is not None
    assert torn.name == "step=4.ckpt"
    refused = Run(tmp_path / "torn", "module", Calls())
    with pytest.raises((RuntimeError, OSError)):  # torch's, and which one depends on the version
        refused.fit(torn)
    assert refused.trainer.global_step == 0
    assert_nothing_left(refused.before)
    assert_resumed_as(undisturbed("module", True)[0], tmp_path / "again", torn.with_name("step=3.ckpt"))


class SaveOnException(Checkpoint):
    """What ModelCheckpoint does with save_on_exception=True in later versions of Lightning."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "exception.ckpt")


def test_a_full_disk_while_an_exception_is_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    calls = Calls("training_step", 4)
    run = Run(tmp_path, "module", calls, checkpoint_io=FullDisk(3), more=[SaveOnException()])
    with pytest.raises(OSError, match="No space left on device") as raised:
        run.fit()
    assert isinstance(raised.value.__context__, UsersError)
    assert_nothing_left(run.before)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*EarlyStopping")
@pytest.mark.parametrize("ending", ["nothing", "early stopping", "anomaly detection"])
def test_a_loss_that_is_not_a_number_leaves_nothing_behind(ending: str, undisturbed: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "nothing": {},
        "early stopping": {"more": lambda: [EarlyStopping("loss", check_on_train_epoch_end=True)]},
        "anomaly detection": {"detect_anomaly": lambda: True},
    }[ending]
    error = RuntimeError if ending == "anomaly detection" else None
    ruled, reference = both_ways(tmp_path, lambda run: diverging(run, 3), error, **options)
    assert ruled.trainer.global_step == reference.trainer.global_step
    del ruled.module.training_step
    assert_nothing_left(ruled.before, like=reference.module)
    if not error:  # the step was made
        assert all(scale.isnan().all() for scale in scales(ruled.module))
    if ending == "nothing":
        assert math.isnan(ruled.trainer.callback_metrics["revbn/scale_mean"])
    assert_resumed_as(undisturbed("module", True)[0], tmp_path / "again", ruled.folder / "saved" / "step=3.ckpt")


# --- checkpoints of other runs ----------------------------------------------------------------------------------------


KEYS = (
    *(
        "scale",
        "scale_lr_divisor",
        "shift_lr_multiplier",
        "eps",
        "weight_decay_exempt",
        "include",
        "exclude",
        "zero_scale",
        "trained",
    ),
    *("zero_kept", "monitor"),
)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), 0.01)


def two_groups(module: nn.Module) -> torch.optim.Optimizer:
    parameters = list(module.parameters())
    return torch.optim.SGD([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.05, momentum=0.9)


class Deeper(ResidualNet):
    """The net with one batch norm layer more."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.load_state_dict(residual_net().state_dict())
        self.last = nn.BatchNorm1d(5)
        nn.init.constant_(self.last.weight, start)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


class Lenient(LitNet):
    """Loads what fits, and starts with new optimizer state."""

    def __init__(self, model: nn.Module, configure: Configure = sgd) -> None:
        super().__init__(configure, model)
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = []


def save(folder: Path, module: LitNet, *callbacks: L.Callback, **options: Any) -> Path:
    """Train for an epoch and return the checkpoint."""
    keep = ModelCheckpoint(folder / "saved", "end")
    trainer(folder, *callbacks, keep, enable_checkpointing=True, max_epochs=1, **options).fit(module, loader(4))
    return folder / "saved" / "end.ckpt"


def quiet(**options: Any) -> RevisitedBatchNorm:
    return RevisitedBatchNorm(monitor=False, **options)


def attempt(folder: Path, module: LitNet, saved: Path, *callbacks: L.Callback) -> tuple[Snapshot, str]:
    """Resume, and return the snapshot from before and the error."""
    run = trainer(folder, *callbacks, max_epochs=2)
    before = Snapshot(module, run, *callbacks)
    try:
        run.fit(module, loader(4), ckpt_path=saved)
    except Exception as error:
        return before, repr(error)
    return before, ""


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        (sgd, adamw, "KeyError"),
        (adamw, sgd, "KeyError('momentum')"),
        (sgd, two_groups, "ValueError('loaded state dict has a different number of parameter groups')"),
    ],
)
def test_a_resume_with_another_optimizer_ends_as_it_does_without_the_callback(
    first: Any, second: Any, error: str, tmp_path: Path
) -> None:
    plain, said = attempt(tmp_path, LitNet(second), save(tmp_path / "plain", LitNet(first)))
    ruled, same = attempt(tmp_path, LitNet(second), save(tmp_path / "ruled", LitNet(first), quiet()), quiet())
    assert same == said
    assert error in said
    assert_nothing_left(ruled, plain=plain.module)


@pytest.mark.parametrize("more", [True, False])
def test_a_resume_with_more_or_fewer_layers_ends_as_it_does_without_the_callback(more: bool, tmp_path: Path) -> None:
    first, second = (residual_net, Deeper) if more else (Deeper, residual_net)
    plain, said = attempt(tmp_path, LitNet(model=second()), save(tmp_path / "plain", LitNet(model=first())))
    saved = save(tmp_path / "ruled", LitNet(model=first()), quiet())
    ruled, same = attempt(tmp_path, LitNet(model=second()), saved, quiet())
    assert same == said
    assert ("Missing key(s)" if more else "Unexpected key(s)") in said
    assert_nothing_left(ruled, plain=plain.module)


def with_groups(module: nn.Module, full: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The groups of the callback made by hand; the scales in `full` keep the full learning rate."""
    own, whole = {id(scale) for scale in scales(module)}, {id(scale) for scale in full}
    rest = [p for p in module.parameters() if id(p) not in own]
    divided = [scale for scale in scales(module) if id(scale) not in whole]
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": divided, "lr": 0.05 / C}, {"params": list(full)}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*RevisitedBatchNorm")
@pytest.mark.parametrize("start", [1.0, 0.0])
def test_layers_that_a_checkpoint_does_not_have_are_treated_as_in_a_fresh_run(start: float, tmp_path: Path) -> None:
    saved = save(tmp_path, LitNet(), RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    module = Lenient(Deeper(start))
    run = trainer(tmp_path, ours := RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    before = Snapshot(module, run, ours)
    with pytest.warns(UserWarning, match="drift starts again from the present values"):
        run.fit(module, loader(4), ckpt_path=saved)

    reference = Lenient(Deeper(0.1 if start else 0.0), lambda m: with_groups(m, [] if start else [m.model.last.weight]))
    trainer(tmp_path).fit(reference, loader(4), ckpt_path=saved)
    assert_nothing_left(before, like=reference)
    old, new = ours.report.records[:3], ours.report.records[3]
    assert {record.reason for record in old} == {"restored, from a checkpoint or by the model's hooks"}
    assert (new.name, new.verdict) == ("model.last", "rewrite" if start else "skip")
    assert ours.state_dict()["zero_kept"] == ([] if start else ["model.last"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*RevisitedBatchNorm")
def test_layers_that_only_the_checkpoint_has_are_forgotten(tmp_path: Path) -> None:
    saved = save(tmp_path, LitNet(model=Deeper(0.0)), quiet())
    module, reference = Lenient(residual_net()), Lenient(residual_net(), with_groups)
    run = trainer(tmp_path, ours := quiet())
    before = Snapshot(module, run, ours)
    run.fit(module, loader(4), ckpt_path=saved)
    trainer(tmp_path).fit(reference, loader(4), ckpt_path=saved)
    assert_nothing_left(before, like=reference)


@pytest.mark.parametrize("zeros", [True, False])
def test_a_run_from_before_the_callback_keeps_its_scales_and_its_zeros(zeros: bool, tmp_path: Path) -> None:
    def net() -> nn.Module:
        return residual_net(zero_init_residual=zeros)

    saved = save(tmp_path, LitNet(model=net()))
    full = lambda m: [m.model.bn2.weight] if zeros else []  # noqa: E731
    module, reference = Lenient(net()), Lenient(net(), lambda m: with_groups(m, full(m)))
    run = trainer(tmp_path, ours := quiet())
    before = Snapshot(module, run, ours)
    with pytest.warns(UserWarning, match="applies half of the method: no scale was rewritten"):
        run.fit(module, loader(4), ckpt_path=saved)
    trainer(tmp_path).fit(reference, loader(4), ckpt_path=saved)
    assert_nothing_left(before, like=reference)
    assert ours.report.rewritten == []


OLDER: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **{f"without {key}": lambda state, key=key: {k: v for k, v in state.items() if k != key} for key in KEYS},
    "empty": lambda state: {},
    "with unknown keys": lambda state: {**state, "momentum": 0.1, "layers": ["model.bn9"]},
    "without the shifts of the monitor": lambda state: {
        **state, "monitor": {"start": {"scale": state["monitor"]["start"]["scale"]}}
    },
    "with another monitor": lambda state: {**state, "monitor": {"start": {"model.bn1": 1.0}}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:BatchNormMonitor. drift starts again", "ignore:RevisitedBatchNorm applies half")
@pytest.mark.parametrize("older", OLDER)
def test_the_callbacks_own_older_state_resumes_alike(older: str, tmp_path: Path) -> None:
    def module() -> LitNet:
        return LitNet(model=residual_net(zero_init_residual=True))

    saved = save(tmp_path, module(), RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
    checkpoint = torch.load(saved, weights_only=True)
    assert tuple(checkpoint["callbacks"]["RevisitedBatchNorm"]) == KEYS
    checkpoint["callbacks"]["RevisitedBatchNorm"] = OLDER[older](checkpoint["callbacks"]["RevisitedBatchNorm"])
    torch.save(checkpoint, old := tmp_path / "old.ckpt")
    runs: list[Snapshot] = []
    for path in (saved, old):
        run = trainer(tmp_path, ours := RevisitedBatchNorm(), logger=CSVLogger(tmp_path))
        runs.append(Snapshot(module(), run, ours))
        run.fit(runs[-1].module, loader(4), ckpt_path=path)
        assert ours.state_dict()["zero_kept"] == ["model.bn2"]
    assert_nothing_left(runs[1], like=runs[0].module)
