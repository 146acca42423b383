"""Where the host waits for the device: nowhere in a training step, once at a logging step.

On a CPU torch imitates CUDA tensors without values: every read of a value and every copy between devices is seen. On a
GPU torch itself refuses a step that waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import host_waits as host_waits_helper
from helpers.devices import DEVICES, GPU
from helpers.host_waits import host_waits, of_package
from helpers.models import ResidualNet, residual_net, scales, shifts
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_revbn import InputNorm, ScaleUpdateRule, find_batch_norms
from lightning_revbn.core.affine_parameters import AffineParameters
from lightning_revbn.core.input_checks import InputPart
from lightning_revbn.core.input_masks import valid_values
from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.moments import Kind

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "AdamW, capturable": lambda params: torch.optim.AdamW(params, 0.1, capturable=True),
    "AdamW, tensor": lambda params: torch.optim.AdamW(params, torch.tensor(0.1, device="cuda"), capturable=True),
}
FUSED: dict[str, Callable[[Any], Optimizer]] = {  # torch cannot imitate these kernels
    "SGD, fused": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, fused=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, torch.tensor(0.1, device="cuda"), fused=True),
}
ON_A_GPU = [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in (*OPTIMIZERS, *FUSED)]


@contextlib.contextmanager
def cuda_of(device: str) -> Iterator[None]:
    """Have CUDA tensors: of a GPU, or imitated ones."""
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def waiting(device: str) -> Iterator[Callable[[Callable[[], object]], list[str]]]:
    """Yield a function that returns the waits of the package while something runs on CUDA tensors."""
    with cuda_of(device), host_waits("cuda" if device == "cuda" else "imitated") as places:

        def waits_in(action: Callable[[], object]) -> list[str]:
            start = len(places)
            action()
            return of_package(places[start:])

        yield waits_in


def without_values(device: str, read: Callable[[], object], lacks_values: Any) -> Callable[[], None]:
    """Return a function that reads a device; `lacks_values` expects the error of imitated tensors, behind the copy."""

    def reading() -> None:
        with lacks_values if device == "cpu" else contextlib.nullcontext():
            read()

    return reading


def network() -> ResidualNet:
    """Return a network that was made on the device: imitated tensors cannot be moved."""
    with torch.device("cuda"):
        return ResidualNet()


def standardizer(settings: InputNorm, kind: Kind) -> OnlineStandardizer:
    """Return a standardiser that knows what the data are made of, as after its first batch."""
    made = OnlineStandardizer(settings)
    made.learner.learned = dataclasses.replace(made.learner.learned, kind=kind)
    made.learner.move_to(torch.device("cuda", 0))
    return made


def batch_of(kind: Kind) -> Tensor:
    if kind is Kind.UINT8:
        return torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device="cuda")
    return torch.zeros(4, 3, 8, 8, device="cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Kind.UINT8, Kind.FLOAT])
@pytest.mark.parametrize("mode", ["batch", "running", "ema"])
def test_a_training_batch_is_normalised_without_a_wait(mode: Any, kind: Kind, device: str) -> None:
    with waiting(device) as waits_in:
        online = standardizer(InputNorm(3, mode=mode), kind)
        values = batch_of(kind)
        online.train(values, ranks=1)
        assert waits_in(lambda: online.train(values, ranks=1)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Kind.UINT8, Kind.FLOAT])
@pytest.mark.parametrize("settings", [{"channels": [0, 2]}, {"channels": [0, 2], "clip": 3.0}, {"fill": 0.5}], ids=str)
def test_settings_of_channels_and_results_wait_for_nothing(settings: Any, kind: Kind, device: str) -> None:
    with waiting(device) as waits_in:
        online = standardizer(InputNorm(3, **settings), kind)
        values = batch_of(kind)
        assert waits_in(lambda: online.train(values, ranks=1)) == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_number_for_missing_values_is_compared_without_a_wait(device: str) -> None:
    with waiting(device) as waits_in:
        values = batch_of(Kind.UINT8)
        assert waits_in(lambda: valid_values(values, None, [3.0, 7.0])) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Kind.UINT8, Kind.FLOAT])
def test_a_limit_of_samples_is_counted_without_a_wait(kind: Kind, device: str) -> None:
    with waiting(device) as waits_in:
        online = standardizer(InputNorm(3, freeze_after=12), kind)
        online.learner.freeze._samples = 4  # which the host has read once, after the first batch
        values = batch_of(kind)
        assert waits_in(lambda: online.train(values, ranks=1)) == []
        assert not online.is_frozen
        assert waits_in(lambda: online.train(values, ranks=1)) == []
        assert online.is_frozen


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_two_views_is_normalised_without_a_wait(device: str) -> None:
    with waiting(device) as waits_in:
        learner = standardizer(InputNorm(3), Kind.UINT8).learner
        views = [InputPart(batch_of(Kind.UINT8), None)] * 2
        assert waits_in(lambda: learner.add(learner.measure(views).alone())) == []


@pytest.mark.parametrize(("name", "device"), [*product(OPTIMIZERS, ["cpu"]), *ON_A_GPU])
def test_a_step_of_an_optimizer_with_the_rule_waits_for_nothing(name: str, device: str) -> None:
    with waiting(device) as waits_in:
        model = network()
        optimizer = {**OPTIMIZERS, **FUSED}[name](list(model.parameters()))
        with ScaleUpdateRule(optimizer, scales(model), shifts=shifts(model), shift_multiplier=10.0):
            for parameter in model.parameters():  # imitated tensors have no backward pass
                parameter.grad = torch.zeros_like(parameter)
            first = waits_in(optimizer.step)  # which finds out whether the optimizer reads the rates
            assert all("update_watch.py" in place for place in first)
            waits_in(optimizer.step)
            assert waits_in(optimizer.step) == []


@pytest.mark.parametrize("device", DEVICES)
def test_scales_and_shifts_of_all_layers_are_measured_with_one_copy(device: str) -> None:
    with waiting(device) as waits_in:
        parameters = AffineParameters(find_batch_norms(network()))
        no_array = pytest.raises(RuntimeError, match=r"numpy\(\)")
        (place,) = waits_in(without_values(device, parameters.read, no_array))
    assert place.endswith("self._values.copy_(torch.cat(parameters).cpu())")


@pytest.mark.parametrize("device", DEVICES)
def test_the_statistics_of_an_input_are_read_with_one_copy(device: str) -> None:
    with waiting(device) as waits_in:
        online = standardizer(InputNorm(3), Kind.UINT8)
        (place,) = waits_in(online.statistics)
    assert "torch.cat([self._faults, total.mean, total.std, total.count]).cpu()" in place


@pytest.mark.parametrize("device", DEVICES)
def test_a_logging_step_reads_faults_and_statistics_with_one_copy(device: str) -> None:
    with waiting(device) as waits_in:
        online = standardizer(InputNorm(3), Kind.UINT8)
        no_number = pytest.raises(DataDependentOutputException)
        (place,) = waits_in(without_values(device, lambda: online.learner.statistics(checked=True), no_number))
    assert "torch.cat([self._faults, total.mean, total.std, total.count]).cpu()" in place


@pytest.mark.parametrize("device", DEVICES)
def test_the_faults_of_batches_are_read_with_one_copy(device: str) -> None:
    with waiting(device) as waits_in:
        online = standardizer(InputNorm(3), Kind.UINT8)
        no_number = pytest.raises(DataDependentOutputException)
        (place,) = waits_in(without_values(device, online.check, no_number))
    assert "self._faults.cpu()" in place


@pytest.mark.parametrize("name", ["torch/functional.py", "torch/optim/sgd.py", "torch_geometric/data.py"])
def test_only_files_of_torch_itself_are_internal_wherever_torch_is_installed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = Path("/opt/torch/.venv/lib/python3.12/site-packages")  # in an environment that is called torch too
    monkeypatch.setattr(host_waits_helper, "TORCH", packages / "torch")
    told: dict[str, Any] = {"place_of": host_waits_helper._place}
    exec(compile("place = place_of()", str(packages / name), "exec"), told)
    assert (name in told["place"]) == (name != "torch/functional.py")


@pytest.mark.parametrize("device", DEVICES)
def test_a_wait_is_seen_and_told_by_its_line(device: str) -> None:
    with waiting(device) as waits_in:
        online = standardizer(InputNorm(3), Kind.UINT8)
        (place,) = waits_in(lambda: online.samples)
    assert place.startswith("lightning_revbn/core/input_norm.py:")
    assert place.endswith("return int(self.learner.learned.samples)")


@pytest.mark.parametrize("device", [GPU])
def test_torch_refuses_no_training_step_as_one_that_waits(device: str) -> None:
    model = residual_net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    online = OnlineStandardizer(InputNorm(3))
    images = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8, device=device)
    targets = torch.randint(0, 5, (8,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(online.train(images, ranks=1)), targets).backward()
        optimizer.step()

    with ScaleUpdateRule(optimizer, scales(model)):
        for _ in range(3):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
