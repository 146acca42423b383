"""Settings of ranks, compared through a store: threads take the place of processes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_revbn.core import rank_settings
from lightning_revbn.core.rank_settings import RankSettings, describe_differences


def hash_store(folder: Path) -> dist.Store:
    return dist.HashStore()


def file_store(folder: Path) -> dist.Store:
    return dist.FileStore(str(folder / "store"), 3)


def tcp_store(folder: Path) -> dist.Store:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(params=[hash_store, file_store, tcp_store])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> dist.Store:
    return request.param(tmp_path)


def client_of(store: dist.Store) -> dist.Store:
    """Return what another rank has: one client of a TCPStore makes one request after the other."""
    return dist.TCPStore("localhost", store.port, is_master=False) if isinstance(store, dist.TCPStore) else store


def compare(store: dist.Store, *settings: Any) -> list[list[str]]:
    """Compare the settings of ranks, of which those with None take no part, and return what each has found."""
    comparisons = {
        rank: RankSettings("test", client_of(store), rank, len(settings))
        for rank, parts in enumerate(settings)
        if parts is not None
    }
    for rank, comparison in comparisons.items():
        comparison.post(settings[rank])
    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(RankSettings.differences, comparisons.values()))


def test_ranks_that_agree_find_nothing_again_and_again(store: dist.Store) -> None:
    for scale in (0.1, 0.2):
        assert compare(store, *[{"Callback": {"scale": scale}}] * 3) == [[], [], []]


def test_every_rank_that_takes_part_finds_what_differs(store: dist.Store) -> None:
    found = compare(store, {"Callback": {"scale": 0.1, "c": 4}}, {"Callback": {"scale": 0.2, "c": 4}}, None)
    assert (
        found
        == [
            ["rank 2 has no Callback, ranks 0-1 have", "Callback: scale=0.1 on rank 0, scale=0.2 on rank 1"],
        ]
        * 2
    )


def test_what_an_earlier_comparison_has_left_is_not_read(store: dist.Store) -> None:
    compare(store, {"Callback": {}}, {"Callback": {}})
    assert compare(store, {"Callback": {}}, None) == [["rank 1 has no Callback, rank 0 has"]]


def test_the_order_of_patterns_is_a_difference() -> None:
    assert compare(
        dist.HashStore(),
        *({"Callback": {"scale": dict(order)}} for order in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)])),
    )[0] == ["Callback: scale={'a': 1, 'b': 2} on rank 0, scale={'b': 2, 'a': 1} on rank 1"]


def test_waiting_ends_when_the_last_rank_has_posted_and_at_the_timeout_of_the_store(store: dist.Store) -> None:
    store.set_timeout(timedelta(seconds=60))
    first, second = RankSettings("test", store, 0, 2), RankSettings("test", client_of(store), 1, 2)
    first.post({"Callback": {"scale": 0.1}})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.wait)
        time.sleep(0.2)
        assert not waiting.done()
        second.post({"Callback": {"scale": 0.1}})
        waiting.result(timeout=30)
    assert first.differences() == []
    store.set_timeout(timedelta(seconds=1))
    alone = RankSettings("test", store, 0, 2)
    alone.post({"Callback": {}})
    alone.wait()
    assert alone.differences() == ["rank 1 has no Callback, rank 0 has"]


def test_a_rank_that_ends_before_it_has_read_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_settings, "_PATIENCE", timedelta(seconds=0.5))
    store = dist.HashStore()
    first, second = (RankSettings("test", store, rank, 2) for rank in range(2))
    first.post({"Callback": {"scale": 0.1}})
    second.post({"Callback": {"scale": 0.2}})
    assert first.differences() == ["Callback: scale=0.1 on rank 0, scale=0.2 on rank 1"]


def test_ranks_are_named_in_runs_and_settings_compared_among_the_ranks_that_have_them() -> None:
    on, off = {"A": {"enabled": True, "scale": 0.1}, "B": {}}, {"A": {"enabled": False}}
    assert describe_differences([on, on, on, off, on, None, None]) == [
        "ranks 5-6 have no A, ranks 0-4 have",
        "A: enabled=True on ranks 0-2, 4, enabled=False on rank 3",
        "ranks 3, 5-6 have no B, ranks 0-2, 4 have",
    ]
