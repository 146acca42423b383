"""The protocol's script on small grids, and what it does when it is interrupted."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import curves
import data_sets
import networks
import paper_protocol
import pytest
import torch
from helpers.devices import DEVICES
from helpers.scripts import run_script

PROTOCOL = "research/paper_protocol.py"
GRID = ["digits", "--seeds", "2", "--epochs", "1", "--arms", "baseline", "scale=0.5", "--jobs", "2"]


def test_an_interrupted_grid_trains_what_is_missing_and_ends_with_the_same_csv(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = run_script(PROTOCOL, *GRID, "--output-dir", whole)
    assert "Accuracy in %, digits, 1 epochs" in done.stdout
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


def test_a_grid_that_runs_out_of_time_says_how_much_is_left_and_goes_on_when_called_again(tmp_path: Path) -> None:
    options = [*GRID, "--precision", "bf16-mixed", "--output-dir", tmp_path]
    done = run_script(PROTOCOL, *options, "--minutes", "0")
    assert done.returncode == 0
    assert "4 of 4 runs are left: the same command trains them" in done.stdout
    assert not list(tmp_path.rglob("result.json"))
    done = run_script(PROTOCOL, *options, "--minutes", "30")
    assert "are left" not in done.stdout
    header, *rows = (tmp_path / "results.csv").read_text().splitlines()
    assert len(rows) == 4
    assert all(dict(zip(header.split(","), row.split(","), strict=True))["precision"] == "bf16-mixed" for row in rows)


def test_a_gpu_trains_in_half_precision_unless_it_is_told_otherwise() -> None:
    settings = paper_protocol.grid(paper_protocol.parse_arguments(["digits", "--device", "cuda"]))[0].settings
    assert (settings.accelerator, settings.precision, settings.holds_data_on_gpu) == ("gpu", "bf16-mixed", True)
    settings = paper_protocol.grid(
        paper_protocol.parse_arguments(["digits", "--device", "cuda", "--precision", "32-true"])
    )[0].settings
    assert (settings.accelerator, settings.precision, settings.compile) == ("gpu", "32-true", False)
    settings = paper_protocol.grid(paper_protocol.parse_arguments(["digits"]))[0].settings
    assert (settings.accelerator, settings.precision, settings.holds_data_on_gpu) == ("cpu", "32-true", False)


def test_a_run_from_before_a_setting_has_the_default_of_it(tmp_path: Path) -> None:
    parsed = paper_protocol.parse_arguments(["digits", "--epochs", "1"])
    run = paper_protocol.grid(parsed)[0]
    result = paper_protocol.train(run, tmp_path / "run")
    file = tmp_path / "run" / "result.json"
    for name in paper_protocol.SETTINGS_SINCE:
        del result["settings"][name]
    file.write_text(json.dumps(result))
    assert paper_protocol.finished(run, tmp_path / "run") is not None
    parsed.precision = "bf16-mixed"
    with pytest.raises(ValueError, match="was made with precision='32-true', and now it is 'bf16-mixed'"):
        paper_protocol.finished(paper_protocol.grid(parsed)[0], tmp_path / "run")


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_network_in_bf16_learns_from_samples_that_the_device_holds(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # a kernel of a CPU takes a minute to compile
        monkeypatch.setattr(
            torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager")
        )
    arms = ["--arms", "baseline", "scale=0.5,input_norm=batch", "input_norm=batch"]
    options = ["--device", device, "--precision", "bf16-mixed", "--compile", "--epochs", "1", "--seeds", "1", *arms]
    runs = paper_protocol.grid(paper_protocol.parse_arguments(["digits", *options]))
    for run in runs[:2]:
        result = paper_protocol.train(run, tmp_path / run.name)
        assert result["settings"]["compile"] is True
        assert 0 < result["test_acc"] < 100


def test_a_run_that_fails_is_named_and_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "scale_0.5").mkdir()
    (tmp_path / "scale_0.5" / "seed_01").write_text("in the way of the run's directory")
    done = run_script(PROTOCOL, *GRID, "--output-dir", tmp_path, check=False)
    assert done.returncode == 1
    assert "1 of 4 runs failed" in done.stderr
    assert f"{tmp_path / 'scale_0.5' / 'seed_01'} failed: FileExistsError" in done.stdout
    assert len(list(tmp_path.rglob("result.json"))) == 3


def test_every_data_set_is_split_alike_and_a_tenth_validates(idx_folder: Path) -> None:
    splits = data_sets.load("fashion-mnist", str(idx_folder), 200)
    assert [len(labels) for _, labels in splits] == [180, 20, 500]
    assert all(images.dtype == torch.uint8 for images, _ in splits)
    data_sets.load.cache_clear()
    again = data_sets.load("fashion-mnist", str(idx_folder), 200)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(splits, again, strict=True))


def test_mnist1d_is_generated_alike_and_as_hard_as_published() -> None:
    (signals, labels), (_, val_labels), (test, test_labels) = data_sets.load("mnist1d", "", None)
    assert [len(part) for part in (labels, val_labels, test_labels)] == [3600, 400, 4000]
    assert signals.shape[1:] == test.shape[1:] == (1, 40)
    classes = torch.bincount(test_labels, minlength=10)
    assert classes.min() > 300
    # The signals are shifted and noisy: the nearest class mean is right in some 30 %, far from all and above chance.
    means = torch.stack([signals[labels == label].mean(0).flatten() for label in range(10)])
    right = (torch.cdist(test.flatten(1), means).argmin(1) == test_labels).double().mean()
    assert 0.15 < right < 0.5


def test_every_input_of_a_seed_is_normalised_as_it_says(idx_folder: Path, tmp_path: Path) -> None:
    arms = ["baseline", "scale=0.25", "input_norm=batch", "scale=0.25,input_norm=true", "input_norm=dataset"]
    options = ["--train-images", "150", "--seeds", "1", "--epochs", "1", "--arms", *arms]
    parsed = paper_protocol.parse_arguments(["fashion-mnist", "--data-dir", str(idx_folder), *options])
    runs = paper_protocol.grid(parsed)
    results = [paper_protocol.train(run, tmp_path / run.name) for run in runs]
    assert [result["name"] for result in results] == [
        "baseline",
        "scale_0.25",
        "input_batch_baseline",
        "input_batch_scale_0.25",
        "input_dataset_baseline",
    ]
    for result in results:
        (row,) = curves.read_rows(tmp_path / result["name"] / "metrics.csv")
        assert (row["epoch"], row["step"]) == (1, 2)
        assert 100 * row["test_acc"] == pytest.approx(result["test_acc"], abs=1e-3)
        assert 100 * row["val_acc"] == pytest.approx(result["val_acc"], abs=1e-3)
        assert min(row["train_loss"], row["val_loss"], row["test_loss"]) > 0


def test_constants_of_the_data_set_standardise_the_training_data() -> None:
    splits = data_sets.load("digits", "", None)
    data = data_sets.make_data(splits, "dataset", batch_size=808, seed=0)
    (images, _), (test, _) = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()[1]))
    assert images.mean().item() == pytest.approx(0, abs=1e-6)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    raw = splits[0][0]
    expected = (splits[2][0][: len(test)] - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(test, expected)


def test_batches_are_all_samples_once_in_an_order_of_every_epochs_own() -> None:
    split = (torch.arange(10.0).view(10, 1), torch.arange(10))
    batches = data_sets.Batches(split, 4, torch.Generator().manual_seed(3))
    first, second = (torch.cat([labels for _, labels in batches]) for _ in range(2))
    assert len(batches) == 3
    assert sorted(first.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    assert [labels.tolist() for _, labels in data_sets.Batches(split, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--train-images", "5"], "--train-images is for fashion-mnist and cifar10"),
        (["cifar10"], "--network cnn is for grey images"),
        (["mnist1d", "--network", "resnet18"], "--network resnet is for images"),
        (["digits", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["digits", "--arms", "baseline", "gamma=1"], "'gamma=1' is no setting"),
        (["digits", "--arms", "scale=0.1"], "--arms has no baseline for scale_0.1"),
    ],
)
def test_wrong_settings_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper_protocol.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_the_stem_of_torchvisions_networks_keeps_the_size_of_small_images() -> None:
    network = networks.CifarResNet("resnet18", channels=3)
    sizes = []
    network.network.layer1.register_forward_hook(lambda layer, inputs, output: sizes.append(output.shape[-2:]))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(32, 32)]
