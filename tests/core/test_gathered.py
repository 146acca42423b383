"""gathered: which models are looked through, and what the engines are asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from typing_extensions import override

from lightning_revbn.core.gathered import gathered


class Walked(nn.Sequential):
    """Counts the walks over itself."""

    walks = 0

    @override
    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        self.walks += 1
        return super().modules()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_of_one_process_is_not_walked_though_the_engines_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    asked: list[nn.Module] = []
    monkeypatch.setattr(FullyShardedDataParallel, "fsdp_modules", lambda model: asked.append(model) or [])
    model = Walked(nn.BatchNorm1d(4))
    with gathered(model):
        pass
    assert model.walks == 0
    assert not asked


@pytest.mark.usefixtures("group")
def test_with_a_process_group_fsdp_is_asked_for_its_wrapped_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(FullyShardedDataParallel, "fsdp_modules", lambda model: asked.append(model) or [])
    model = Walked(nn.BatchNorm1d(4))
    with gathered(model, fsdp=False):
        assert not asked
    with gathered(model):
        assert asked == [model]


def test_parameters_that_deepspeed_has_partitioned_are_gathered_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gatherings: list[tuple[list[nn.Parameter], int | None]] = []

    def gather(parameters: list[nn.Parameter], modifier_rank: int | None) -> AbstractContextManager[Any]:
        gatherings.append((parameters, modifier_rank))
        return nullcontext()

    engine = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather))
    monkeypatch.setitem(sys.modules, "deepspeed", engine)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for parameter in (model[0].weight, model[1].weight):
        parameter.ds_id = 0
    with gathered(model, write=True):
        pass
    with gathered(nn.BatchNorm1d(4)):
        pass
    ((parameters, modifier),) = gatherings
    assert [id(parameter) for parameter in parameters] == [id(model[1].weight)]
    assert modifier == 0
