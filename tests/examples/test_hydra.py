"""The tree of Hydra configurations: its script in a process, and what the group makes of the types of OmegaConf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits
import lightning as L
import pytest
import torch
from helpers.lit import LitNet, loader, trainer
from helpers.logs import rows
from helpers.scripts import ROOT, run_script
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate

from lightning_revbn import BatchNormMonitor, RevisitedBatchNorm

EXAMPLE = ROOT / "examples" / "hydra"


def train(folder: Path, *options: str) -> None:
    run_script("examples/hydra/train.py", *options, "trainer.max_epochs=2", f"hydra.sweep.dir={folder}")


def weights(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("*.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]


def in_a_script(path: Path, *callbacks: L.Callback) -> dict[str, Any]:
    """Train the same network as the tree's in a script, to the same step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the example: sums depend on it
    network, data = digits.build(1)
    data.shuffle_seed = 1
    run = trainer(path, *callbacks)
    run.fit(network, data)
    torch.set_num_threads(threads)
    return network.state_dict()


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    assert not [key for key in left if not torch.equal(left[key], right[key])]


def from_tree(*overrides: str) -> Any:
    with initialize_config_dir(str(EXAMPLE / "conf"), version_base="1.3"):
        return instantiate(compose("config", overrides=["revbn=default", *overrides]).revbn)


@pytest.fixture(autouse=True)
def _leave_no_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything writes into goes with it


def test_a_sweep_over_the_group_trains_as_scripts_without_and_with_the_callback_do(tmp_path: Path) -> None:
    train(tmp_path, "-m", "revbn=off,default,monitor")
    jobs = [tmp_path / f"revbn={choice},trainer.max_epochs=2" for choice in ("off", "default", "monitor")]
    assert_equal(weights(jobs[0]), in_a_script(tmp_path / "script"))
    assert_equal(weights(jobs[1]), in_a_script(tmp_path / "script", RevisitedBatchNorm(monitor=False)))
    assert_equal(weights(jobs[2]), weights(jobs[0]))
    off, on, seen = ({key for row in rows(job) for key in row if key.startswith("revbn/")} for job in jobs)
    assert not off
    assert {"revbn/scale_mean", "revbn/blocks.0.bn1/scale_drift"} <= on == seen


def test_a_sweep_over_scales_starts_every_run_from_its_own(tmp_path: Path) -> None:
    train(tmp_path, "-m", "revbn=default", "revbn.scale=0.1,0.25", "revbn.monitor.every_n_steps=1")
    starts = [
        next(row["revbn/scale_mean"] for row in rows(job) if "revbn/scale_mean" in row)
        for job in (next(tmp_path.glob(f"*revbn.scale={scale},*")) for scale in ("0.1", "0.25"))
    ]
    assert [float(start) for start in starts] == pytest.approx([0.1, 0.25])


def test_the_group_has_the_arguments_and_defaults_of_the_callback() -> None:
    configured, default = from_tree(), RevisitedBatchNorm()
    assert configured.state_dict() == default.state_dict()
    for name in ("include", "exclude", "zero_scale", "trained"):
        assert getattr(configured, name) == getattr(default, name)
    assert vars(configured.monitor) == vars(BatchNormMonitor())  # asked for, unlike the default


def test_containers_of_omegaconf_train_as_plain_ones_and_reach_no_checkpoint(tmp_path: Path) -> None:
    configured = from_tree(
        "revbn.scale={*.bn1:0.5,*:0.25}", "revbn.exclude=[*.stem.*]", "revbn.include=[model.*]", "revbn.monitor=false"
    )
    plain = RevisitedBatchNorm({"*.bn1": 0.5, "*": 0.25}, include=["model.*"], exclude=["*.stem.*"], monitor=False)
    assert configured.state_dict() == plain.state_dict()
    assert type(configured.scale) is dict
    nets = LitNet(), LitNet()
    for net, callback in zip(nets, (configured, plain), strict=True):
        run = trainer(tmp_path, callback)
        run.fit(net, loader())
        run.save_checkpoint(tmp_path / "run.ckpt")
        torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert_equal(nets[0].state_dict(), nets[1].state_dict())


def test_an_unknown_key_is_refused_while_the_configuration_is_composed() -> None:
    with pytest.raises(ConfigCompositionException, match=r"revbn\.scal'"):
        from_tree("revbn.scal=0.25")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("revbn.scale=0", "scale=0 must be finite and positive"),
        ("+revbn.scal=0.25", "unexpected keyword argument 'scal'"),
        ("revbn.scale=big", "scale must be a number above 0"),
        ("~revbn.monitor._target_", "_target_: lightning_revbn.BatchNormMonitor"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_wrong(override: str, said: str) -> None:
    with pytest.raises(InstantiationException, match=said):
        from_tree(override)
