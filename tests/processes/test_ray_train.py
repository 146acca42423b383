"""Ray Train with two CPU workers, by `RayDDPStrategy`, against one process with the joined batch.

`make test-ray` runs them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.joined_raw import assert_learned_the_same, assert_logged_the_same
from helpers.scripts import run_ranks

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_ranks("ray_train.py", "alone", folder)
    return folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    # Ray would report its use to its makers.
    # Its workers have a low priority unless they are told, and hardly run on a busy machine.
    run_ranks("ray_train.py", "ray", folder, env={"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"})
    return folder


def test_two_workers_learn_and_log_what_one_process_does_with_the_joined_batch(
    workers: Path, one_process: Path
) -> None:
    assert_learned_the_same(workers / "whole", one_process, ranks=2)
    assert_logged_the_same(workers / "whole", one_process)
    values = torch.load(workers / "whole" / "rank0.pt", weights_only=True)["values"]
    assert 0 < (values["model.bn1.weight"] - 0.1).abs().max() < 0.01


def test_a_run_that_is_resumed_from_a_checkpoint_of_ray_ends_the_same(workers: Path, one_process: Path) -> None:
    assert_learned_the_same(workers / "resumed", one_process, ranks=2)


def test_the_variable_in_the_environment_of_the_workers_switches_the_callback_on(
    workers: Path, one_process: Path
) -> None:
    assert_learned_the_same(workers / "variable", one_process, ranks=2)


def test_a_worker_without_the_variable_is_refused_by_number(workers: Path) -> None:
    error = (workers / "variable on one worker" / "error.txt").read_text()
    assert "ranks have different settings: rank 1 has no RevisitedBatchNorm, rank 0 has" in error
