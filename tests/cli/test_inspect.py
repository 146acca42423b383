from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.layers
import torch
import torchvision
from helpers.lit import LitNet, loader, trainer
from helpers.models import BATCH_NORMS, residual_net
from helpers.scripts import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_revbn import RevisitedBatchNorm
from lightning_revbn.cli.main import main
from lightning_revbn.cli.targets import TargetError, from_state_dict, load_state_dict
from lightning_revbn.core.eps import EPS_KEY


def inspected(target: object, *options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(target), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def refused(target: object, capsys: pytest.CaptureFixture[str]) -> str:
    """Inspect, expect exit code 1, and return the one line it said."""
    assert main(["inspect", str(target)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("lightning-revbn: ")
    return line


def random_net() -> nn.Module:
    model = residual_net()
    model(torch.randn(8, 3, 6, 6))
    for layer in ("stem.1", "bn1"):
        nn.init.normal_(model.get_submodule(layer).weight)
        nn.init.normal_(model.get_submodule(layer).bias)
    return model


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_the_values_of_a_checkpoint_are_those_of_its_tensors(
    key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_net().state_dict()
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "model.pt")
    shown = inspected(tmp_path / "model.pt", capsys=capsys)
    assert [layer["name"] for layer in shown["layers"]] == BATCH_NORMS
    for layer in shown["layers"]:
        assert (layer["verdict"], layer["state"], layer["channels"]) == ("skip", "trained", 6)
        for kind, tensor in (("scale", "weight"), ("shift", "bias")):
            values = state[f"{layer['name']}.{tensor}"].double().numpy()
            expected = {"mean": values.mean(), "std": np.std(values), "min": values.min(), "max": values.max()}
            assert layer[kind] == pytest.approx(expected, rel=1e-12)


def test_a_checkpoint_of_lightning_with_the_callback_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = ModelCheckpoint(tmp_path / "saved", "end")
    run = trainer(tmp_path, RevisitedBatchNorm(monitor=False), save, enable_checkpointing=True, max_epochs=1)
    run.fit(LitNet(), loader(2))
    shown = inspected(tmp_path / "saved" / "end.ckpt", capsys=capsys)
    assert [layer["name"] for layer in shown["layers"]] == [f"model.{name}" for name in BATCH_NORMS]
    assert all(abs(layer["scale"]["mean"] - 0.1) < 0.01 for layer in shown["layers"])


@pytest.mark.parametrize(
    ("target", "build", "zeros"),
    [
        ("torchvision:resnet50", lambda: torchvision.models.resnet50(), 0),
        ("torchvision:fasterrcnn_resnet50_fpn", None, 0),
        ("timm:resnet50", lambda: timm.create_model("resnet50"), 16),
    ],
)
def test_the_models_of_libraries_are_built_without_a_download(
    target: str, build: Any, zeros: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_download(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    shown = inspected(target, capsys=capsys)
    assert shown["counts"] == {"rewrite": 53 - zeros, "skip": zeros, "refuse": 0}
    if build is not None:
        names = [name for name, layer in build().named_modules() if isinstance(layer, nn.BatchNorm2d)]
        assert [layer["name"] for layer in shown["layers"]] == names


def test_a_callable_beside_the_user_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\nclass Nets:\n    small = staticmethod(lambda: nn.Sequential(nn.BatchNorm1d(3)))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert [layer["name"] for layer in inspected("my_nets:Nets.small", capsys=capsys)["layers"]] == ["0"]


def test_the_table_has_a_row_a_layer_and_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(residual_net(zero_init_residual=True).state_dict(), tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path / "model.pt")]) == 0
    header, _, *rows, _, summary = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in header.split("|")][:4] == ["Layer", "Type", "Channels", "Scale"]
    assert [[cell.strip() for cell in row.split("|")] for row in rows][2] == [
        *(
            "bn2",
            "BatchNorm",
            "6",
            "0",
            "0",
            "0",
            "0",
            "0",
            "0",
            "0",
            "0",
            "skip",
            "its scale starts at 0 on purpose",
        ),
    ]
    assert summary == f"{tmp_path / 'model.pt'}: 3 batch norm layers (2 rewrite, 1 skip)"


EPS_NETS = """
from torch import nn
def build(eps=1e-3):
    return nn.Sequential(nn.BatchNorm2d(3, eps=eps), nn.BatchNorm2d(3))
def usual():
    return build(1e-5)
"""


def test_a_column_shows_eps_where_it_is_not_that_of_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eps_nets.py").write_text(EPS_NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["inspect", "eps_nets:build"]) == 0
    header, _, *rows, _, _ = capsys.readouterr().out.splitlines()
    assert [row.split("|")[3].strip() for row in [header, *rows]] == ["eps", "0.001", "1e-05"]
    assert main(["inspect", "eps_nets:usual"]) == 0
    assert "eps" not in capsys.readouterr().out.splitlines()[0]
    assert [layer["eps"] for layer in inspected("eps_nets:build", capsys=capsys)["layers"]] == [1e-3, 1e-5]


def test_the_eps_of_a_checkpoint_is_what_the_callback_wrote_down_and_else_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = residual_net().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    assert [layer["eps"] for layer in inspected(tmp_path / "plain.pt", capsys=capsys)["layers"]] == [None] * 3
    compiled = {key.replace("stem.", "stem._orig_mod."): value for key, value in state.items()}
    callbacks = {"Other": 3, "RevisitedBatchNorm": {EPS_KEY: {"stem.1": 1e-3, "bn1": 1e-3}}}
    torch.save({"state_dict": compiled, "callbacks": callbacks}, tmp_path / "fit.ckpt")
    shown = inspected(tmp_path / "fit.ckpt", capsys=capsys)["layers"]
    assert {layer["name"]: layer["eps"] for layer in shown} == {"stem.1": 1e-3, "bn1": 1e-3, "bn2": None}
    assert main(["inspect", str(tmp_path / "fit.ckpt")]) == 0
    assert [line.split("|")[3].strip() for line in capsys.readouterr().out.splitlines() if "|" in line] == [
        *("eps", "0.001", "0.001", "-")
    ]


def test_a_model_without_batch_norm_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path / "model.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("model.pt: 0 batch norm layers")


@pytest.mark.parametrize(
    ("key", "order"),
    [("model", BATCH_NORMS), ("name", ["bn1", "bn2", "stem.1"]), ("scale_mean", ["bn2", "stem.1", "bn1"])],
)
def test_layers_can_be_sorted(key: str, order: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = residual_net()
    for name, value in zip(["bn2", "stem.1", "bn1"], [3.0, 2.0, 1.5], strict=True):
        nn.init.constant_(model.get_submodule(name).weight, value)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    shown = inspected(tmp_path / "model.pt", "--sort", key, capsys=capsys)
    assert [layer["name"] for layer in shown["layers"]] == order


def test_layers_without_a_scale_sort_last(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    shown = inspected(tmp_path / "model.pt", "--sort", "scale_max", capsys=capsys)
    assert [(layer["name"], layer["scale"] is None) for layer in shown["layers"]] == [("1", False), ("0", True)]


def test_layers_inside_layers_keep_their_names() -> None:
    model = nn.Sequential(timm.layers.SplitBatchNorm2d(4, num_splits=2))
    built = from_state_dict(model.state_dict())
    norms = [name for name, layer in built.named_modules() if isinstance(layer, nn.BatchNorm1d)]
    assert norms == ["0", "0.aux_bn.0"]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_pickled_code_is_refused_and_runs_nothing(
    legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"state_dict": residual_net().state_dict(), "hyper_parameters": Bomb(tmp_path / "ran")}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    assert "holds pickled objects besides tensors; refused, and none of its code was run" in refused(
        tmp_path / "model.ckpt", capsys
    )
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        (tmp_path / "ran").stat()


def truncated(path: Path) -> None:
    torch.save(residual_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_text("not a checkpoint\n" * 50), "is no checkpoint of torch.save, or is damaged"),
        (lambda path: path.write_bytes(b""), "is no checkpoint of torch.save, or is damaged"),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), "is no checkpoint of torch.save, or is damaged"),
        (truncated, "is no checkpoint of torch.save, or is damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is no checkpoint of torch.save, or is damaged"),
        (lambda path: torch.save([1, 2], path), "holds a list, not a model's state_dict"),
        (lambda path: torch.save({"epoch": 1}, path), "holds no model: no tensor by name"),
    ],
    ids=["text", "empty", "bytes", "truncated", "plain pickle", "list", "no tensors"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    write: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "model.pt")
    assert said in refused(tmp_path / "model.pt", capsys)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=300) | st.builds(lambda text: b"\x80\x02" + text, st.binary(max_size=300)))
def test_no_bytes_whatever_make_it_fail_in_another_way(content: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    path.write_bytes(content)
    with pytest.raises(TargetError, match=r"is no checkpoint of torch.save, or is damaged|holds "):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere.ckpt", "'nowhere.ckpt' is no file; a model is named as torchvision:NAME"),
        ("torchvision:resnet5", "torchvision has no model 'resnet5'; the nearest names are resnet50"),
        ("timm:resnet5", "timm has no model 'resnet5'; the nearest names are resnet"),
        ("no_such_module:make", "no_such_module:make failed with ModuleNotFoundError"),
        ("os:nothing", "os:nothing failed with AttributeError"),
        ("os:getcwd", "os:getcwd returned a str, not a torch.nn.Module"),
    ],
)
def test_a_target_that_does_not_exist_is_refused_in_one_line(
    target: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert said in refused(target, capsys)


def test_a_missing_library_is_named_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm models need timm: pip install timm" in refused("timm:resnet50", capsys)


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["inspect"], ["inspect", "timm:resnet10t", "--sort", "size"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "usage: lightning-revbn" in capsys.readouterr().err


def test_the_installed_command_runs() -> None:
    done = run_python("-m", "lightning_revbn", "inspect", "torchvision:mnasnet0_5")
    assert done.stdout.splitlines()[-1].startswith("torchvision:mnasnet0_5: 52 batch norm layers")
