"""Runs that end too early, by a kill or with a rank, and go on: as if nothing had been, on other devices too."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.joined_batch import JoinedNet
from helpers.lit import trainer
from helpers.scripts import run_ranks

from lightning_revbn import RevisitedBatchNorm


def test_runs_that_are_killed_and_resumed_end_as_the_undisturbed_one() -> None:
    run_ranks("kill_and_resume.py", "--trials", 6)  # `make kill-and-resume` runs 200


def test_a_run_may_be_resumed_on_another_number_of_devices(tmp_path: Path) -> None:
    run_ranks("other_devices.py", "resume", tmp_path)
    learned = torch.load(tmp_path / "learned.pt", weights_only=True)
    assert learned.keys() == {"undisturbed", "1 then 2", "2 then 1"}
    for name, state in learned.items():
        for key, value in learned["undisturbed"].items():
            torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-14, msg=f"{name}: {key}")


def test_when_a_rank_dies_the_other_ends_and_its_checkpoint_resumes(tmp_path: Path) -> None:
    run_ranks("other_devices.py", "die", tmp_path)
    assert (tmp_path / "error.txt").read_text()  # written once nothing was found left behind
    saved = tmp_path / "step=2.ckpt"
    assert len(torch.load(saved, weights_only=True)["optimizer_states"][0]["param_groups"]) == 1

    undisturbed, resumed = JoinedNet(), JoinedNet()
    options = {"use_distributed_sampler": False}
    trainer(tmp_path, RevisitedBatchNorm(monitor=False), **options).fit(undisturbed)
    trainer(tmp_path, RevisitedBatchNorm(monitor=False), **options).fit(resumed, ckpt_path=saved)
    for key, value in undisturbed.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-10, atol=1e-14, msg=key)
