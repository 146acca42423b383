"""Private names of Lightning live in one file, and a fit goes on without each of them, with one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.lit import LitNet, loader, trainer
from helpers.logs import rows
from helpers.models import assert_same_parameters
from helpers.private_names import private_names_of_lightning
from helpers.raw import RawData, SeeingNet
from helpers.scripts import run_code
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm, lightning_compat

Without = Callable[[str], None]


@pytest.fixture(autouse=True)
def _no_warning_given_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_compat, "_warned", set())


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    """Hide a private name from the package alone, as if this version of Lightning had renamed it."""

    def hide(name: str) -> None:
        def get(owner: object, asked: str, *default: Any) -> Any:
            return getattr(owner, f"{asked}_renamed" if asked == name else asked, *default)

        monkeypatch.setattr(lightning_compat, "getattr", get, raising=False)

    return hide


def fit(path: Path, *callbacks: L.Callback, **options: Any) -> tuple[LitNet, L.Trainer, list[str]]:
    """Train a small network, and return it with its Trainer and what the package warned of."""
    module, run = LitNet(), trainer(path, *callbacks, **{"logger": CSVLogger(path), **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader())
    return module, run, [str(one.message) for one in caught if "this version of Lightning has no" in str(one.message)]


def test_private_names_of_lightning_are_used_in_one_file_alone() -> None:
    assert list(private_names_of_lightning()) == ["lightning_revbn/lightning_compat.py"]


def test_the_docstring_has_every_private_name() -> None:
    (uses,) = private_names_of_lightning().values()
    assert lightning_compat.__doc__
    missing = {name for _, name in uses if name not in lightning_compat.__doc__}
    assert not missing


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("_batches_that_stepped", {"accumulate_grad_batches": 2}),
        ("_logger_connector", {"log_every_n_steps": 3}),
        ("should_update_logs", {"log_every_n_steps": 3}),
        ("_should_accumulate", {"accumulate_grad_batches": 4}),  # the last two batches of six make a step of their own
    ],
)
def test_the_log_is_the_same_without_a_name_and_one_warning_says_so(
    name: str, options: dict[str, Any], tmp_path: Path, without: Without
) -> None:
    def callback() -> L.Callback:
        return RevisitedBatchNorm(monitor=BatchNormMonitor(activations=True))

    expected, _, silent = fit(tmp_path / "with", callback(), **options)
    without(name)
    module, _, warned = fit(tmp_path / "without", callback(), **options)
    assert not silent
    assert len(warned) == 1
    assert_same_parameters(module, expected)
    assert rows(tmp_path / "without") == rows(tmp_path / "with")
    assert len(rows(tmp_path / "with")) > 1


def test_a_fit_with_several_optimizers_goes_on_without_the_count_of_batches(tmp_path: Path, without: Without) -> None:
    class Two(LitNet):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.model.stem, self.model.head)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

    def logged(path: Path) -> list[dict[str, str]]:
        trainer(path, BatchNormMonitor(), logger=CSVLogger(path)).fit(Two(), loader())
        return rows(path)

    expected = logged(tmp_path / "with")
    without("_batches_that_stepped")
    with pytest.warns(UserWarning, match="has no _batches_that_stepped"):
        assert logged(tmp_path / "without") == expected


def test_inputs_are_normalised_without_the_name_of_the_hook_and_examples_are_not_counted(
    tmp_path: Path, without: Without
) -> None:
    class WithExample(SeeingNet):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.full((2, 3, 6, 6), 200, dtype=torch.uint8)

        def forward(self, inputs: Any) -> Any:
            return self.model(inputs)

    def trained(path: Path) -> tuple[WithExample, RawData]:
        module, data = WithExample(), RawData()
        trainer(path, enable_model_summary=True).fit(module, data)  # the summary sends the example
        return module, data

    expected, their_data = trained(tmp_path / "with")
    without("_current_fx_name")
    with pytest.warns(UserWarning, match="has no _current_fx_name"):
        module, data = trained(tmp_path / "without")
    assert_same_parameters(module, expected)
    assert data.input_statistics().count.tolist() == their_data.input_statistics().count.tolist()
    assert data.input_statistics().count[0] == 2 * 48 * 36


def test_layer_synchronisation_is_not_checked_without_its_name(without: Without) -> None:
    strategy = DDPStrategy()
    assert lightning_compat.layer_sync(strategy) is None
    without("_layer_sync")
    with pytest.warns(UserWarning, match="has no _layer_sync"):
        assert lightning_compat.layer_sync(strategy) is None


def test_a_fit_on_one_device_needs_no_layer_synchronisation(tmp_path: Path, without: Without) -> None:
    without("_layer_sync")
    _, _, warned = fit(tmp_path, RevisitedBatchNorm(monitor=False))
    assert not warned  # its strategy never had the name


@pytest.mark.parametrize("name", ["callback_metrics", "progress_bar_metrics"])
def test_a_fit_goes_on_where_the_metrics_of_callbacks_are_copies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(L.Trainer, name).fget
    monkeypatch.setattr(L.Trainer, name, property(lambda self: dict(real(self))))
    _, _, warned = fit(tmp_path, RevisitedBatchNorm(monitor=BatchNormMonitor(progress_bar=True)))
    assert len(warned) == 1
    assert name in warned[0]


@pytest.mark.parametrize("first", ["import pytorch_lightning", "pass"])
def test_callbacks_are_those_of_pytorch_lightning_however_they_are_imported(first: str) -> None:
    said = run_code(
        f"{first}\n"
        "from lightning_revbn.callbacks.monitor import BatchNormMonitor\n"
        "from lightning_revbn.callbacks.revisited import RevisitedBatchNorm\n"
        "import lightning_revbn, pytorch_lightning as pl\n"
        "options = dict(logger=False, enable_checkpointing=False, accelerator='cpu')\n"
        "for direct in (BatchNormMonitor, RevisitedBatchNorm):\n"
        "    run = pl.Trainer(callbacks=direct(), **options)\n"
        "    print(any(type(callback) is direct for callback in run.callbacks), issubclass(direct, pl.Callback))\n"
        "    print(direct is getattr(lightning_revbn, direct.__name__))\n"
    )
    assert said.split() == ["True"] * 6
