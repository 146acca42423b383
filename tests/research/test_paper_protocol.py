"""The protocol's script on small grids, and what it does when it is interrupted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import paper_protocol
import pytest
import torch
from helpers.scripts import run_script

PROTOCOL = "research/paper_protocol.py"
GRID = ["digits", "--seeds", "2", "--epochs", "1", "--scales", "0.5", "--workers", "2"]


def test_an_interrupted_grid_trains_what_is_missing_and_ends_with_the_same_csv(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = run_script(PROTOCOL, *GRID, "--output-dir", whole)
    assert "Chosen on validation data: scale_0.5" in done.stdout
    (whole / "scale_0.5" / "seed_02").rename(tmp_path / "taken")
    whole.rename(parted)
    unfinished = parted / "scale_0.5" / "seed_02"
    unfinished.mkdir()
    (unfinished / "metrics.csv").write_text("torn")
    expected = (parted / "results.csv").read_bytes()
    (parted / "results.csv").unlink()
    times = {file: file.stat().st_mtime_ns for file in parted.rglob("result.json")}
    assert len(times) == 3

    done = run_script(PROTOCOL, *GRID, "--output-dir", parted)
    assert "3 of 4 runs are finished already" in done.stdout
    assert (parted / "results.csv").read_bytes() == expected
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    fresh, earlier = (json.loads((place / "result.json").read_text()) for place in (unfinished, tmp_path / "taken"))
    assert {**fresh, "seconds": 0} == {**earlier, "seconds": 0}

    other = run_script(PROTOCOL, *GRID, "--epochs", "2", "--output-dir", parted, check=False)
    assert other.returncode == 1
    assert "was made with epochs=1, and now it is 2: give every grid an --output-dir of its own" in other.stderr


def test_every_data_set_is_split_alike_and_a_tenth_validates(idx_folder: Path) -> None:
    arguments = ["fashion-mnist", "--data-dir", str(idx_folder), "--train-images", "200"]
    settings = paper_protocol.grid(paper_protocol.parse_arguments(arguments))[0].settings
    splits = paper_protocol.load(settings)
    assert [len(labels) for _, labels in splits] == [180, 20, 500]
    assert all(images.dtype == torch.uint8 for images, _ in splits)
    again = paper_protocol.load(settings)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(splits, again, strict=True))
    digits = paper_protocol.grid(paper_protocol.parse_arguments(["digits"]))[0].settings
    assert [len(labels) for _, labels in paper_protocol.load(digits)] == [808, 90, 899]


def test_every_arm_of_a_seed_starts_alike_and_raw_bytes_are_normalised(idx_folder: Path, tmp_path: Path) -> None:
    options = ["--train-images", "150", "--seeds", "1", "--epochs", "1", "--scales", "0.25", "--input-norm", "both"]
    parsed = paper_protocol.parse_arguments(["fashion-mnist", "--data-dir", str(idx_folder), *options])
    results = [paper_protocol.train(run, tmp_path / run.arm) for run in paper_protocol.grid(parsed)]
    assert [result["arm"] for result in results] == ["baseline", "scale_0.25", "input_baseline", "input_scale_0.25"]
    rows = {}
    for result in results:
        with (tmp_path / result["arm"] / "metrics.csv").open() as file:
            rows[result["arm"]] = list(csv.DictReader(file))
        assert 0 <= result["test_acc"] <= 100
    assert {"revbn/input/mean", "revbn/scale_mean"} <= rows["input_scale_0.25"][0].keys()
    assert not any(key.startswith("revbn/") for key in rows["baseline"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--train-images", "5"], "--train-images is for fashion-mnist and cifar10"),
        (["cifar10"], "--network cnn is for grey images"),
        (["digits", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper_protocol.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_the_stem_of_torchvisions_networks_keeps_the_size_of_small_images() -> None:
    network = paper_protocol.CifarResNet("resnet18", channels=3)
    sizes = []
    network.network.layer1.register_forward_hook(lambda layer, inputs, output: sizes.append(output.shape[-2:]))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(32, 32)]
