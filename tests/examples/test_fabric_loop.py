"""The loop of Fabric against a loop without Fabric, hand-made parameter groups and a hand-made average over ranks."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digits
import fabric_loop
import lightning as L
import pytest
import torch
from helpers.models import scales
from helpers.scripts import run_script
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

EPOCHS, LR = 2, 0.1


@pytest.fixture(autouse=True)
def _leave_no_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything writes into goes with it


def run(checkpoint: Path, *options: str) -> None:
    fabric_loop.main(["--accelerator", "cpu", "--epochs", str(EPOCHS), "--checkpoint", str(checkpoint), *options])


def saved(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True)


def by_hand(ranks: int) -> nn.Module:
    """Train the same network with permanent groups, one replica a rank."""
    network, data = digits.build(1)
    data.setup("fit")
    for scale in scales(network):
        nn.init.constant_(scale, 0.1)
    own = {id(scale) for scale in scales(network)}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in own]
    groups = [{"params": rest, "weight_decay": 1e-4}, {"params": scales(network)}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    for (lr, momentum), shares in zip(settings(), batches(data, ranks), strict=True):
        for group, divisor in zip(optimizer.param_groups, (1, 100), strict=True):
            group["lr"], group["momentum"] = lr / divisor, momentum
        replicas = [network, *(copy.deepcopy(network) for _ in shares[1:])]
        for replica, (images, labels) in zip(replicas, shares, strict=True):
            replica.zero_grad()
            (cross_entropy(replica(images), labels) / ranks).backward()
        for parameter, *others in zip(*(replica.parameters() for replica in replicas), strict=True):
            for other in others:
                parameter.grad += other.grad
        optimizer.step()
    return network


def settings() -> Iterator[tuple[float, float]]:
    """Return learning rate and momentum of every step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR, momentum=0.9)
    steps = EPOCHS * digits.STEPS_PER_EPOCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        optimizer.step()
        schedule.step()


def batches(data: digits.Digits, ranks: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Return what every rank sees, step by step: every so manieth image."""
    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(digits.derive_seed(1) + epoch)
        order = torch.randperm(len(data.train_set), generator=generator)
        shares = [order[rank::ranks].split(128 // ranks) for rank in range(ranks)]
        for indices in zip(*shares, strict=True):
            yield [data.train_set[share] for share in indices]


def assert_is(checkpoint: Path, network: nn.Module) -> None:
    values = saved(checkpoint)["model"]
    expected = network.state_dict()
    assert values.keys() == expected.keys()
    assert not [name for name in values if not torch.equal(values[name], expected[name])]


def test_the_loop_equals_hand_made_groups_in_a_loop_without_fabric(tmp_path: Path) -> None:
    run(tmp_path / "run.ckpt")
    assert_is(tmp_path / "run.ckpt", by_hand(ranks=1))
    assert len(saved(tmp_path / "run.ckpt")["optimizer"]["param_groups"]) == 1


def test_two_ranks_equal_hand_made_groups_and_averages(tmp_path: Path) -> None:
    options = f"--accelerator cpu --devices 2 --strategy ddp --epochs {EPOCHS} --checkpoint {tmp_path / 'run.ckpt'}"
    printed = run_script("examples/fabric_loop.py", *options.split()).stdout
    assert_is(tmp_path / "run.ckpt", by_hand(ranks=2))
    assert printed.count("9 of 9 batch norm layers start from a new scale") == 1


def test_a_run_that_is_stopped_goes_on_from_its_checkpoint_and_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "undisturbed.ckpt")
    backward, steps = L.Fabric.backward, iter(range(digits.STEPS_PER_EPOCH + 3))

    def stop(fabric: L.Fabric, loss: Tensor) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        backward(fabric, loss)

    with monkeypatch.context() as patched:
        patched.setattr(L.Fabric, "backward", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped.ckpt")
    assert saved(tmp_path / "stopped.ckpt")["epoch"] == 1
    run(tmp_path / "stopped.ckpt")
    assert "Goes on after epoch 1" in capsys.readouterr().out
    undisturbed, resumed = saved(tmp_path / "undisturbed.ckpt"), saved(tmp_path / "stopped.ckpt")
    for name in ("model", "optimizer"):
        torch.testing.assert_close(resumed[name], undisturbed[name], rtol=0, atol=0)
    assert resumed["schedule"] == undisturbed["schedule"]


def test_it_tells_what_was_rewritten_and_the_accuracy_of_the_saved_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run.ckpt", "--precision", "bf16-mixed")
    printed = capsys.readouterr().out
    assert "9 of 9 batch norm layers start from a new scale" in printed
    network, data = digits.build(1)
    network.load_state_dict(saved(tmp_path / "run.ckpt")["model"])
    data.setup("fit")
    images, labels = data.test_set.tensors
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right = network.eval()(images).argmax(1) == labels
    assert f"Test accuracy: {100 * right.double().mean():.2f} %" in printed
    assert re.findall(r"(\S+): the mean scale is ([\d.]+)", printed) == [
        (name, f"{layer.weight.mean():.4f}")
        for name, layer in network.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]
