from __future__ import annotations

import contextlib
import csv
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import digits
import lightning as L
import matplotlib.image
import numpy as np
import paired_report
import pytest
import torch
from rich.console import Console
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_revbn import find_batch_norms, paired_t_test

SEEDS = 2


@pytest.fixture(scope="module", autouse=True)
def _leave_no_global_seed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything writes into goes with it
        yield


@dataclass
class Demo:
    """What one run of the program left behind."""

    output_dir: Path
    printed: str
    logged: list[str]

    def log_dir(self, arm: str, seed: int) -> Path:
        return self.output_dir / arm / f"seed_{seed:02}"

    def rows(self, arm: str, seed: int) -> list[dict[str, str]]:
        with (self.log_dir(arm, seed) / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def accuracies(self, arm: str) -> list[float]:
        """The test accuracies in the logs, in %."""
        found: list[float] = []
        for seed in range(1, SEEDS + 1):
            (accuracy,) = (float(row["test_acc"]) for row in self.rows(arm, seed) if row["test_acc"])
            found.append(100 * accuracy)
        return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    output_dir, printed, logged = tmp_path_factory.mktemp("demo"), io.StringIO(), list[str]()
    (output_dir / "baseline" / "seed_07").mkdir(parents=True)  # of an earlier demo with more seeds
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    digits.LIGHTNING_LOG.addHandler(handler)
    try:
        with digits.log_level(logging.INFO), contextlib.redirect_stdout(printed):
            digits.main(["--seeds", str(SEEDS), "--epochs", "1", "--output-dir", str(output_dir)])
    finally:
        digits.LIGHTNING_LOG.removeHandler(handler)
    return Demo(output_dir, printed.getvalue(), logged)


def test_every_run_has_csv_and_tensorboard_logs(demo: Demo) -> None:
    layers = [record.name for record in find_batch_norms(digits.DigitsResNet())]
    for arm in digits.ARMS:
        for seed in range(1, SEEDS + 1):
            columns = set(demo.rows(arm, seed)[0])
            assert {"train_loss", "val_acc", "test_acc", "revbn/scale_lr"} <= columns
            assert {f"revbn/{layer}/scale_mean" for layer in layers} <= columns
            assert list(demo.log_dir(arm, seed).glob("events.out.tfevents.*"))


def test_a_demo_replaces_the_logs_of_an_earlier_one(demo: Demo) -> None:
    for arm in digits.ARMS:
        assert sorted(path.name for path in (demo.output_dir / arm).iterdir()) == ["seed_01", "seed_02"]


def test_the_logs_show_where_scales_started_and_what_they_learn_with(demo: Demo) -> None:
    for arm, scale, lr in (("baseline", 1.0, 0.1), ("revisited", 0.1, 0.001)):
        curves = paired_report.read_scale_means(demo.log_dir(arm, 1) / "metrics.csv", ["stem.1", "blocks.2.bn2"])
        assert curves == {layer: ([0], [pytest.approx(scale)]) for layer in ("stem.1", "blocks.2.bn2")}
        (logged,) = (float(row["revbn/scale_lr"]) for row in demo.rows(arm, 1) if row["revbn/scale_lr"])
        assert logged == pytest.approx(lr)


def test_the_table_shows_the_logged_accuracies_of_both_arms(demo: Demo) -> None:
    assert all(arm.capitalize() in demo.printed for arm in digits.ARMS)
    rows = re.findall(r"│ +(\d+) │ +([\d.]+) │ +([\d.]+) │ +([+-][\d.]+) │", demo.printed)
    before, after = demo.accuracies("baseline"), demo.accuracies("revisited")
    assert rows == [
        (str(seed), f"{b:.2f}", f"{a:.2f}", f"{a - b:+.2f}")
        for seed, (b, a) in enumerate(zip(before, after, strict=True), start=1)
    ]


def test_the_printed_p_value_is_that_of_scipy(demo: Demo) -> None:
    reference: Any = stats.ttest_rel(demo.accuracies("revisited"), demo.accuracies("baseline"), alternative="greater")
    (printed,) = re.findall(r"p = (\S+)", demo.printed)
    assert printed == f"{reference.pvalue:.3g}"


def test_the_observations_are_means_of_what_was_logged(demo: Demo) -> None:
    def mean(arm: str, key: str) -> float:
        return np.mean([float(row[key]) for seed in (1, 2) for row in demo.rows(arm, seed) if row[key]], dtype=float)

    lines = [line.split("│") for line in demo.printed.splitlines() if line.count("│") == 6]
    shown = {cells[1].strip(): [cell.strip() for cell in cells[2:6]] for cells in lines}
    # One epoch has one event, the first and the last.
    for name, key, scale, digits_ in (
        ("Mean scale", "revbn/scale_mean", 1, 3),
        ("Greatest |x_hat|", "revbn/normalized_absmax", 1, 2),
        ("|x_hat| > 3 (%)", "revbn/normalized_over_3", 100, 2),
    ):
        baseline, revisited = (f"{scale * mean(arm, key):.{digits_}f}" for arm in digits.ARMS)
        assert shown[name] == [baseline, baseline, revisited, revisited]


def test_the_picture_is_there_and_small(demo: Demo) -> None:
    picture = demo.output_dir / "digits.png"
    assert str(picture) in demo.printed
    assert picture.stat().st_size < 300_000
    assert np.ptp(matplotlib.image.imread(picture)) == 1  # from black to white


def test_progress_summary_and_the_table_of_the_callback_are_shown_and_shown_once(demo: Demo) -> None:
    assert "Epoch 0" in demo.printed
    # Lightning prints the summary, or logs it in older versions.
    assert "\n".join([demo.printed, *demo.logged]).count("Trainable params") == 1
    assert sum("batch norm layers start from a new scale" in message for message in demo.logged) == 1
    assert not [message for message in demo.logged if "Tip" in message or "GPU" in message]


@pytest.mark.parametrize(("seed", "derived"), [(0, 4186399962), (1, 1869972635), (15, 529477619)])
def test_seeds_are_derived_as_in_the_paper(seed: int, derived: int) -> None:
    assert digits.derive_seed(seed) == derived


class Recorder(digits.DigitsResNet):
    """Keeps the weights before and after training, and the labels that training_step saw."""

    made: list[Recorder]

    def on_train_start(self) -> None:
        self.made.append(self)
        self.start = {name: value.clone() for name, value in self.state_dict().items()}
        self.labels: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.labels.append(batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.end = {name: value.clone() for name, value in self.state_dict().items()}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The networks that `digits.train` trains."""
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr(digits, "DigitsResNet", Recorder)
    return Recorder.made


def test_both_arms_start_from_the_same_weights_but_the_scales_and_see_the_same_batches(
    made: list[Recorder], tmp_path: Path
) -> None:
    run = digits.Run("baseline", 1, 1, 1, scale=0.1, divisor=100.0, head_init="paper", log_dir=tmp_path / "baseline")
    digits.train(run)
    digits.train(replace(run, arm="revisited", log_dir=tmp_path / "revisited"))
    baseline, revisited = made
    scales = {f"{record.name}.weight" for record in find_batch_norms(baseline)}
    assert baseline.start.keys() == revisited.start.keys()
    for name, value in baseline.start.items():
        if name in scales:
            assert (value == 1).all()
            assert (revisited.start[name] == torch.tensor(0.1)).all()
        else:
            assert torch.equal(value, revisited.start[name]), name
    assert torch.equal(torch.cat(baseline.labels), torch.cat(revisited.labels))


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm has no effect. no scale was rewritten:UserWarning")
def test_a_scale_and_divisor_of_1_train_the_baseline_to_the_bit(made: list[Recorder], tmp_path: Path) -> None:
    run = digits.Run("baseline", 1, 1, 1, scale=1.0, divisor=1.0, head_init="torch", log_dir=tmp_path / "baseline")
    first = digits.train(run)
    second = digits.train(replace(run, arm="revisited", log_dir=tmp_path / "revisited"))
    assert first == second
    for name, value in made[0].end.items():
        assert torch.equal(value, made[1].end[name]), name


def test_another_seed_gives_other_weights_and_batches() -> None:
    first, second = digits.build(1), digits.build(2)
    assert not torch.equal(first[0].stem[0].weight, second[0].stem[0].weight)
    assert not torch.equal(next(order(first[1])), next(order(second[1])))
    assert torch.equal(next(order(first[1])), next(order(digits.build(1)[1])))


def order(data: digits.Digits) -> Iterator[Tensor]:
    data.setup("fit")
    return (labels for _, labels in data.train_dataloader())


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    data = digits.Digits()
    data.setup("fit")
    return data


def test_the_splits_are_disjoint_and_complete(data: digits.Digits) -> None:
    splits = (data.train_set, data.val_set, data.test_set)
    assert [len(split) for split in splits] == [808, 90, 899]
    images = torch.cat([split.tensors[0] for split in splits]).flatten(1)
    assert 0 == images.min() < images.max() == 1
    labelled = torch.column_stack([16 * images, torch.cat([split.tensors[1] for split in splits])])
    pixels, labels = load_digits(return_X_y=True)
    # The same rows as often as in the whole: with equal numbers of images, none is in two splits.
    assert sorted(labelled.tolist()) == sorted(np.column_stack([pixels, labels]).tolist())


def test_the_splits_are_stratified(data: digits.Digits) -> None:
    def counts(*splits: Any) -> Tensor:
        return torch.bincount(torch.cat([split.tensors[1] for split in splits]), minlength=10).double()

    whole, development = counts(data.train_set, data.val_set, data.test_set), counts(data.train_set, data.val_set)
    assert (counts(data.test_set) - whole * 899 / 1797).abs().max() < 1
    assert (counts(data.val_set) - development * 90 / 898).abs().max() < 1


def test_the_splits_are_the_same_for_every_seed(data: digits.Digits) -> None:
    other = digits.Digits(shuffle_seed=5)
    other.setup("fit")
    for name in ("train_set", "val_set", "test_set"):
        assert torch.equal(getattr(data, name).tensors[0], getattr(other, name).tensors[0])


def test_what_is_logged_by_steps_is_logged_once_an_epoch(data: digits.Digits) -> None:
    assert len(data.train_dataloader()) == digits.STEPS_PER_EPOCH


def test_weight_decay_is_on_convolutions_and_linear_layers_alone_and_the_cosine_ends_near_0() -> None:
    network = digits.DigitsResNet()
    network.trainer = L.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    configured: Any = network.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, others = ([names.pop(id(parameter)) for parameter in g["params"]] for g in optimizer.param_groups)
    assert not names  # and pop found none of them twice
    assert decayed == [
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    assert len(others) == 2 * len(find_batch_norms(network)) + 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0]
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-8, 1e-8])


def test_convolutions_start_kaiming_normal_over_the_fan_in_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    network = digits.DigitsResNet()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            # The standard deviation of n draws has a relative error of 1 / sqrt(2 n).
            tolerance = 5 / (2 * module.weight.numel()) ** 0.5
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=tolerance)
    assert all((value == 0).all() for name, value in network.named_parameters() if name.endswith("bias"))


def test_the_option_keeps_torchs_start_of_the_last_layer() -> None:
    (paper, _), (torchs, _) = digits.build(1), digits.build(1, head_init="torch")
    for name, value in paper.named_parameters():
        same = torch.equal(value, torchs.get_parameter(name))
        assert same == (name != "head.2.weight"), name
    assert torchs.head[2].weight.abs().max() <= 32**-0.5 < paper.head[2].weight.abs().max() <= (6 / 32) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], r"--seeds must be at least 1, got 0"),
        (["--seeds", "many"], r"argument --seeds: invalid int value: 'many'"),
        (["--epochs", "-1"], r"--epochs must be at least 1, got -1"),
        (["--scale", "0"], r"scale=0\.0 must be finite and positive"),
        (["--scale", "nan"], r"scale=nan must be finite and positive"),
        (["--divisor", "0"], r"the divisor .* must be finite and positive, got 0\.0"),
        (["--divisor", "inf"], r"the divisor .* must be finite and positive, got inf"),
        (["--head-init", "small"], r"argument --head-init: invalid choice: 'small'"),
        (["--output-dir", __file__], r"File exists: .*test_digits\.py"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        digits.main(arguments)
    assert ended.value.code == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", error)
    assert usage[0].startswith("usage: ")


@pytest.mark.parametrize(
    ("revisited", "sentence"),
    [
        ([97.8, 98.1, 97.9, 98.0], r"0\.80 points better on average over 4 seeds, a gain .* \(p <= 0\.05\)"),
        ([98.8, 97.0, 97.3, 98.0], r"0\.62 points better on average, but 4 seeds cannot tell .* \(p > 0\.05\)"),
        ([96.1, 97.0, 97.5, 97.3], r"did not help: it is 0\.18 points worse"),
        ([90.1, 91.0, 90.5, 90.3], r"did not help: it is clearly 6\.68 points worse"),
    ],
)
def test_the_conclusion_says_what_the_numbers_say(revisited: list[float], sentence: str) -> None:
    baseline = [97.0, 97.1, 97.2, 97.3]
    assert re.search(sentence, paired_report.conclude(paired_t_test(revisited, baseline)))


def test_the_conclusion_says_so_when_all_differences_are_equal() -> None:
    with pytest.warns(UserWarning, match="all differences are equal"):
        result = paired_t_test([97.0, 98.0], [97.0, 98.0])
    assert "All 2 differences are equal" in paired_report.conclude(result)


def test_one_seed_gives_a_table_without_a_test() -> None:
    printed = io.StringIO()
    paired_report.print_table([97.2], [97.8], Console(file=printed))
    assert "+0.60" in printed.getvalue()
    assert "One pair tells nothing about chance" in printed.getvalue()
    assert "p =" not in printed.getvalue()


def test_the_picture_can_show_a_scale_below_zero(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("revbn/bn/scale_mean,step,val_acc\n0.1,0,\n,6,0.5\n-0.02,7,\n")
    assert paired_report.read_scale_means(log, ["bn"]) == {"bn": ([0, 7], [0.1, -0.02])}
    paired_report.draw_picture(tmp_path / "out.png", [97.0], [97.0], scale_logs=[log, log], layers=["bn"])
    assert (tmp_path / "out.png").stat().st_size > 0
