from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from helpers.idx_files import write_fashion_mnist
from hypothesis import HealthCheck, settings

# Doctests are collected by importing, and some of these scripts need what is not installed.
collect_ignore = ["processes/scripts"]

# On a busy machine an example may take any time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The nets are tiny: more threads only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _caplog_sees_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `caplog` see the messages of Lightning's logger, which does not propagate, and which examples silence."""
    log = logging.getLogger(lightning.pytorch.__name__)
    monkeypatch.setattr(log, "propagate", True)
    log.setLevel(logging.INFO)


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files of the format and names of Fashion-MNIST; tests only read it."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    write_fashion_mnist(folder)
    return folder
