"""Ray Train with two CPU workers, by its strategies for DDP and FSDP1, against one process with the joined batch.

`make test-ray` runs them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.joined_raw import STEPS, assert_learned_the_same, assert_logged_the_same
from helpers.logs import logged_in
from helpers.scripts import run_ranks

pytestmark = pytest.mark.ray

STRATEGIES = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_ranks("ray_train.py", "alone", folder)
    return folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    # Ray would report its use to its makers.
    # Its workers have a low priority unless they are told, and hardly run on a busy machine. Where they are not up
    # within a minute, Ray starts them again.
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    }
    run_ranks("ray_train.py", "ray", folder, env=variables)
    return folder


@STRATEGIES
def test_two_workers_learn_and_log_what_one_process_does_with_the_joined_batch(
    strategy: str, workers: Path, one_process: Path
) -> None:
    assert_learned_the_same(workers / strategy, one_process, ranks=2)
    assert_logged_the_same(workers / strategy, one_process)
    values = torch.load(workers / strategy / "rank0.pt", weights_only=True)["values"]
    assert 0 < (values["model.bn1.weight"] - 0.1).abs().max() < 0.01


@STRATEGIES
@pytest.mark.parametrize("case", ["resumed", "a worker dies"])
def test_a_run_that_is_resumed_from_a_checkpoint_of_ray_ends_the_same(
    strategy: str, case: str, workers: Path, one_process: Path
) -> None:
    run = workers / f"{strategy}, {case}"
    assert_learned_the_same(run, one_process, ranks=2)
    *_, last = sorted(run.glob("version_*"))
    assert [row["step"] for row in logged_in(last)] == [str(step) for step in range(STEPS // 2, STEPS)]


@STRATEGIES
def test_the_variable_in_the_environment_of_the_workers_switches_the_callback_on(
    strategy: str, workers: Path, one_process: Path
) -> None:
    assert_learned_the_same(workers / f"{strategy}, variable", one_process, ranks=2)


@STRATEGIES
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("variable on one worker", "rank 1 has no RevisitedBatchNorm, rank 0 has"),
        ("other settings", "RevisitedBatchNorm: scale=0.1 on rank 0, scale=0.2 on rank 1"),
    ],
)
def test_workers_with_other_settings_are_refused_by_number(strategy: str, case: str, said: str, workers: Path) -> None:
    error = (workers / f"{strategy}, {case}" / "error.txt").read_text()
    assert f"ranks have different settings: {said}" in error


@pytest.mark.parametrize("case", ["fsdp without a device", "fsdp without a device or callback"])
def test_fsdp_itself_refuses_to_train_on_cpus_unless_it_is_told_the_device(case: str, workers: Path) -> None:
    run = workers / case
    assert "FSDP needs a non-CPU accelerator device" in (run / "error.txt").read_text()
    assert not list(run.glob("rank*.pt"))
