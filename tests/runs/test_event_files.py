from __future__ import annotations

from pathlib import Path

from helpers.logs import COUNTING, points, read, read_or_error, write_events


def test_an_event_file_cut_off_anywhere_gives_what_is_before(tmp_path: Path) -> None:
    path = write_events(tmp_path, COUNTING)
    content = path.read_bytes()
    whole = points(read(path))
    lengths = [*range(1, len(content), 5)]
    counts: list[int] = []
    for length in lengths:
        path.write_bytes(content[:length])
        scalars = read_or_error(path)
        if isinstance(scalars, str):
            assert "tfevents" in scalars or "holds no values" in scalars
            counts.append(0)
            continue
        found = points(scalars)
        assert all(found[key].items() <= whole[key].items() for key in found)
        counts.append(sum(map(len, found.values())))
        assert all("is damaged or cut off at byte" in warning for warning in scalars.warnings)
    assert counts == sorted(counts)
    assert set(counts) == set(range(12))


def test_an_event_file_with_damage_inside_gives_what_is_before_and_says_so(tmp_path: Path) -> None:
    path = write_events(tmp_path, COUNTING)
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        scalars = read_or_error(path)
        if isinstance(scalars, str):
            assert len(scalars.splitlines()) == 1
        else:
            assert sum(len(own) for own in points(scalars).values()) <= 12
            assert len(scalars.warnings) <= 1
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(40) + content[middle + 40 :])
    scalars = read(path)
    assert points(scalars)["b"].keys() == {0, 1, 2}
    assert [warning.split(" is ")[1].split(" at ")[0] for warning in scalars.warnings] == ["damaged or cut off"]


def test_a_resumed_run_replaces_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    write_events(tmp_path, [(step, {"a": 1.0, "b": 1.0}) for step in (0, 10, 20, 30)])
    write_events(tmp_path, [(step, {"a": 2.0}) for step in (15, 25)])
    assert points(read(tmp_path)) == {
        "a": {0: 1.0, 10: 1.0, 15: 2.0, 25: 2.0},
        "b": {0: 1.0, 10: 1.0, 20: 1.0, 30: 1.0},
    }
