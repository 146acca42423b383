from __future__ import annotations

from pathlib import Path

import pytest
from helpers.lit import LitNet, loader, trainer
from helpers.logs import read, write_csv, write_events
from helpers.models import BATCH_NORMS
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_revbn import BatchNormMonitor
from lightning_revbn.runs.batch_norm_runs import batch_norm_run, find_prefix
from lightning_revbn.runs.scalars import LogError


@pytest.mark.parametrize(
    ("kind", "order"), [("csv", sorted(BATCH_NORMS)), ("both", BATCH_NORMS), ("events", BATCH_NORMS)]
)
def test_layers_are_in_the_order_of_the_model_if_event_files_tell(kind: str, order: list[str], tmp_path: Path) -> None:
    loggers = [
        CSVLogger(tmp_path / "run", name="", version=""),
        TensorBoardLogger(tmp_path / "run", name="", version=""),
    ]
    chosen = {"csv": loggers[:1], "events": loggers[1:], "both": loggers}[kind]
    trainer(tmp_path, BatchNormMonitor(every_n_steps=1), logger=chosen).fit(LitNet(), loader(1))
    run = batch_norm_run("run", read(tmp_path / "run"))
    assert run.layers == tuple(f"model.{name}" for name in order)
    assert run.by_depth == (kind != "csv")


def test_layers_without_an_order_are_sorted_with_numbers_by_value(tmp_path: Path) -> None:
    names = ["layer10.bn", "layer9.bn", "layer9.10", "layer9.9"]
    write_csv(tmp_path, [(0, {f"revbn/{name}/scale_mean": 1.0 for name in names})])
    assert batch_norm_run("", read(tmp_path)).layers == ("layer9.9", "layer9.10", "layer9.bn", "layer10.bn")


def test_layers_that_have_different_quantities_are_sorted_too(tmp_path: Path) -> None:
    keys = ["a/scale_mean", "b/normalized_absmax", "c/normalized_absmax"]
    write_csv(tmp_path, [(0, {f"revbn/{key}": 1.0 for key in keys})])
    assert batch_norm_run("", read(tmp_path)).layers == ("a", "b", "c")


def test_layers_without_a_scale_keep_their_place(tmp_path: Path) -> None:
    keys = ["b/scale_mean", "d/scale_mean", *(f"{layer}/normalized_absmax" for layer in "abcd")]
    write_events(tmp_path, [(0, {f"revbn/{key}": 1.0 for key in keys})])
    assert batch_norm_run("", read(tmp_path)).layers == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["loss", "revbn/scale_mean", "revbn/a/scale_mean", "other/scale_mean"], "revbn"),
        (["bn/affine/scale_mean", "bn/affine/a.b/scale_mean", "bn/loss"], "bn/affine"),
        (["revbn/own/scale_mean", "revbn/own/a/scale_std"], "revbn/own"),
        (["bn/a/scale_mean", "bn/b/scale_mean"], "bn"),
        (["scale_mean", "a/scale_mean"], ""),
        (["loss"], "revbn"),
    ],
)
def test_the_prefix_is_found(keys: list[str], prefix: str) -> None:
    assert find_prefix(keys) == prefix


def test_several_prefixes_are_an_error_that_names_them() -> None:
    with pytest.raises(LogError, match="under one, two: choose by --prefix"):
        find_prefix(["one/scale_mean", "one/a/scale_mean", "two/scale_mean"])


@pytest.mark.parametrize("prefix", ["revbn", "bn/affine", ""])
def test_runs_with_any_prefix_are_found_without_being_told(prefix: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "run", name="", version="")
    trainer(tmp_path, BatchNormMonitor(every_n_steps=1, prefix=prefix), logger=logger).fit(LitNet(), loader(1))
    scalars = read(tmp_path / "run")
    for given_prefix in (None, prefix):
        run = batch_norm_run("run", scalars, given_prefix)
        assert set(run.layers) == {f"model.{name}" for name in BATCH_NORMS}
        first = f"{prefix}/" if prefix else ""
        assert run.series["model.bn1", "scale_mean"] is scalars.series[f"{first}model.bn1/scale_mean"]


def test_a_run_with_per_layer_false_is_one_of_the_whole_model(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "run", name="", version="")
    monitor = BatchNormMonitor(every_n_steps=1, per_layer=False)
    trainer(tmp_path, monitor, logger=logger).fit(LitNet(), loader(1))
    run = batch_norm_run("run", read(tmp_path / "run"))
    assert (run.layers, run.whole_model) == (("",), True)
    assert {quantity for _, quantity in run.series} == {"scale_mean", "scale_drift", "shift_drift"}


def test_a_model_that_is_one_batch_norm_layer_has_an_empty_name(tmp_path: Path) -> None:
    keys = [f"revbn/{kind}_{s}" for kind in ("scale", "shift") for s in ("mean", "std", "min", "max", "drift")]
    write_csv(tmp_path, [(0, {**dict.fromkeys(keys, 1.0), "revbn/scale_lr": 0.1})])
    run = batch_norm_run("run", read(tmp_path))
    assert (run.layers, run.whole_model) == (("",), False)
    assert set(run.series) == {("", key.removeprefix("revbn/")) for key in keys}


def test_a_log_without_batch_norm_layers_says_what_to_do(tmp_path: Path) -> None:
    write_csv(tmp_path, [(0, {f"loss_{letter}": 1.0 for letter in "abcdefg"})])
    with pytest.raises(LogError) as error:
        batch_norm_run("version_0", read(tmp_path))
    assert str(error.value) == (
        "the log of version_0 has no keys revbn/... of batch norm layers (it has loss_a, loss_b, loss_c, loss_d, "
        "loss_e, ...): add BatchNormMonitor() to the Trainer's callbacks"
    )
