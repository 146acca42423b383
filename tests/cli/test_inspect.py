from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm.layers
import torch
import torchvision
from helpers.lit import LitNet, loader, trainer
from helpers.models import BATCH_NORMS, residual_net
from helpers.scripts import run_code, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revbn import BatchNormMonitor, InputNorm, OnlineInputNormMixin, RevisitedBatchNorm
from lightning_revbn.cli.checkpoint_layers import from_state_dict
from lightning_revbn.cli.checkpoints import TargetError, load_state_dict
from lightning_revbn.cli.main import main
from lightning_revbn.core.eps import EPS_KEY
from lightning_revbn.core.input_norm import OnlineStandardizer
from lightning_revbn.core.input_state import STATE_KEYS


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
    norms = [name for name, layer in from_state_dict(model.state_dict()).items() if isinstance(layer, nn.BatchNorm1d)]
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
        (lambda path: path.write_text("not a checkpoint\n" * 50), "is not a checkpoint of torch.save, or is damaged"),
        (lambda path: path.write_bytes(b""), "is not a checkpoint of torch.save, or is damaged"),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), "is not a checkpoint of torch.save, or is damaged"),
        (truncated, "is not a checkpoint of torch.save, or is damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is not a checkpoint of torch.save, or is damaged"),
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
    with pytest.raises(TargetError, match=r"is not a checkpoint of torch.save, or is damaged|holds "):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere.ckpt", "'nowhere.ckpt' is not a file; a model is named as torchvision:NAME"),
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


# --- odd layers -------------------------------------------------------------------------------------------------------


def tensors(name: str, channels: int = 4, **other: torch.Tensor) -> dict[str, torch.Tensor]:
    own = nn.BatchNorm1d(channels).state_dict() | other
    return {f"{name}.{key}": value for key, value in own.items()}


ONES = torch.ones(4)
ODD = {
    "conditional": ({"weight": torch.ones(10, 4)}, "its weight has shape (10, 4), its running mean (4,)"),
    "other channels": ({"weight": torch.ones(3)}, "its weight has shape (3,), its running mean (4,)"),
    "other variance": ({"running_var": torch.ones(3)}, "its running variance has shape (3,), its running mean (4,)"),
    "matrix": ({"running_mean": torch.ones(2, 2)}, "its running mean has shape (2, 2), not a value a channel"),
    "scalar": ({"running_mean": torch.ones(())}, "its running mean has shape (), not a value a channel"),
    "sparse": ({"weight": ONES.to_sparse()}, "its weight is not a dense tensor (sparse_coo)"),
    "meta": ({"bias": ONES.to("meta")}, "its bias has no values: it was saved on the meta device"),
    "whole numbers": ({"weight": ONES.long()}, "its weight is int64, no floating-point numbers"),
    "complex": ({"running_var": ONES.cfloat()}, "its running variance is complex64, no floating-point numbers"),
    "many batches": ({"num_batches_tracked": ONES}, "its number of batches has shape (4,), its running mean (4,)"),
}


def test_an_odd_layer_is_a_row_with_its_reason_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tensors("first")
    for name, (own, _) in ODD.items():
        state |= tensors(name, **own)
    torch.save(state | tensors("last"), tmp_path / "odd.pt")
    shown = inspected(tmp_path / "odd.pt", capsys=capsys)
    assert shown["counts"] == {"rewrite": 2, "skip": 0, "refuse": 0, "unknown": len(ODD)}
    assert [layer["name"] for layer in shown["layers"]] == ["first", *ODD, "last"]
    for layer, (_, reason) in zip(shown["layers"][1:-1], ODD.values(), strict=True):
        assert (layer["verdict"], layer["scale"], layer["reason"]) == ("unknown", None, reason)
    for key in ("name", "channels", "verdict", "scale_mean", "shift_std"):
        assert len(inspected(tmp_path / "odd.pt", "--sort", key, capsys=capsys)["layers"]) == len(ODD) + 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch is to lose them
def test_a_quantised_layer_is_a_row_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.quantize_per_tensor(ONES, 0.1, 0, torch.quint8)
    torch.save(tensors("bn", weight=weight) | tensors("last"), tmp_path / "odd.pt")
    odd, last = inspected(tmp_path / "odd.pt", capsys=capsys)["layers"]
    assert odd["reason"] == "its weight is quantised (quint8)"
    assert last["verdict"] == "rewrite"


def test_float8_is_read_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors("bn", weight=torch.full((4,), 0.5).to(torch.float8_e4m3fn)), tmp_path / "model.pt")
    (layer,) = inspected(tmp_path / "model.pt", capsys=capsys)["layers"]
    assert layer["scale"] == {"mean": 0.5, "std": 0.0, "min": 0.5, "max": 0.5}


def test_what_an_expanded_tensor_repeats_is_not_materialised(tmp_path: Path) -> None:
    # In a process of its own, whose memory is measured: the numbers of one such tensor take 400 MB.
    state = {key: value.expand(10**8) for key, value in nn.BatchNorm1d(1).state_dict().items() if value.dim()}
    torch.save({f"bn{number}.{key}": value for number in range(5) for key, value in state.items()}, tmp_path / "big.pt")
    assert (tmp_path / "big.pt").stat().st_size < 10_000
    code = (
        "import torch, resource; from lightning_revbn.cli.main import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"assert main(['inspect', {str(tmp_path / 'big.pt')!r}]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    *table, grown = run_code(code).splitlines()
    assert [cell.strip() for cell in table[2].split("|")][:5] == ["bn0", "BatchNorm", "100000000", "1", "0"]
    assert int(grown) < 150_000  # kB, of which the modules that are imported take most


@pytest.mark.parametrize("name", ["type", "train", "a..b", "", ".", ".".join("x" * 5000), "two\nlines\x1b[31m", "[/x]"])
def test_layers_may_have_every_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors(name) | tensors("other"), tmp_path / "model.pt")
    shown = inspected(tmp_path / "model.pt", capsys=capsys)
    assert [layer["name"] for layer in shown["layers"]] == [name, "other"]
    assert main(["inspect", str(tmp_path / "model.pt")]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 6
    assert "\x1b" not in output


ODD_NETS = r"""
import torch
from torch import nn
def sparse():
    odd = nn.BatchNorm1d(3)
    odd.weight = nn.Parameter(torch.ones(3).to_sparse())
    return nn.Sequential(nn.BatchNorm1d(2), odd, nn.LazyBatchNorm1d(), nn.BatchNorm1d(4, device="meta"))
class Wordy(nn.BatchNorm1d):
    @property
    def weight(self):
        raise RuntimeError(f"no weight:\n  {self.words}")
    @weight.setter
    def weight(self, value): pass
    def reset_parameters(self): pass
def wordy():
    net = nn.Sequential(Wordy(2), Wordy(2))
    net[0].words, net[1].words = "a b", "word " * 5000 + "the end"
    return net
def deep():
    net = nn.Sequential(nn.BatchNorm1d(2))
    for _ in range(5000):
        net = nn.Sequential(net)
    return net
def chatty():
    print("hello")
    return nn.BatchNorm1d(2)
instance = nn.BatchNorm1d(2)
def leave():
    raise SystemExit("bye\nbye" * 500)
def fail():
    raise RuntimeError("\x1b[2J" * 5000)
"""


@pytest.fixture
def odd_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "odd_nets.py").write_text(ODD_NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "odd_nets", raising=False)
    return "odd_nets"


def test_an_odd_layer_of_a_model_is_a_row_too(odd_nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    layers = inspected(f"{odd_nets}:sparse", capsys=capsys)["layers"]
    assert [layer["name"] for layer in layers] == ["0", "1", "2", "3"]
    assert [layer["verdict"] for layer in layers] == ["rewrite", "unknown", "rewrite", "refuse"]
    assert [layer["scale"] is None for layer in layers] == [False, True, True, True]


def test_a_long_reason_says_where_it_was_cut(odd_nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (layer["reason"] for layer in inspected(f"{odd_nets}:wordy", capsys=capsys)["layers"])
    assert short == "RuntimeError: no weight: a b"
    assert long.startswith("RuntimeError: no weight: word word")
    assert "..." in long
    assert long.endswith("word the end")
    assert len(long) < 250


def test_a_model_may_have_thousands_of_levels(odd_nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    (layer,) = inspected(f"{odd_nets}:deep", capsys=capsys)["layers"]
    assert layer["name"] == ".".join("0" * 5001)
    assert layer["verdict"] == "rewrite"


def test_what_code_of_others_prints_is_no_json(odd_nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("chatty", "instance"):
        assert len(inspected(f"{odd_nets}:{name}", capsys=capsys)["layers"]) == 1


@pytest.mark.parametrize("name", ["leave", "fail"])
def test_what_code_of_others_raises_is_one_short_line(
    name: str, odd_nets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(f"{odd_nets}:{name}", capsys)
    assert f"odd_nets:{name} failed with" in said
    assert said.isprintable()
    assert len(said) < 500


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("x" * 300, "' is not a file; a model is named as"),
        ("x" * 300 + ".ckpt", "' is not a file; a model is named as"),
        (f"{'x' * 300}:{'y' * 300}", "failed with "),
        ("s3://bucket/x.ckpt", "'s3://bucket/x.ckpt' is an address, and only local files are read: download it"),
        ("https://x.org/x.ckpt", "'https://x.org/x.ckpt' is an address, and only local files are read"),
        ("file:/x.ckpt", "'file:/x.ckpt' is an address"),
        (r"C:\x.ckpt", r"the file 'C:\x.ckpt' does not exist"),
        ("C:/x.ckpt", "the file 'C:/x.ckpt' does not exist"),
        ("nets.py:Net", "'nets.py:Net' names a script: name its module, as in an import: 'nets:Net'"),
        ("./my/nets.py:Net", "name its module, as in an import: 'my.nets:Net'"),
        ("runs/step:3.ckpt", "'runs/step:3.ckpt' is not a file"),
        (".", "'.' is a directory: name a checkpoint file in it"),
        ("/dev/null", "'/dev/null' is not a regular file"),
        ("timm:resnet50.no_such_tag", "timm:resnet50.no_such_tag failed with RuntimeError"),
        ("", "'' is not a file"),
    ],
)
def test_a_target_that_is_meant_otherwise_gets_the_right_message(
    target: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = refused(target, capsys)
    assert said in line
    assert len(line) < 500


# --- did it work? -----------------------------------------------------------------------------------------------------


class Images(OnlineInputNormMixin, L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__(input_norm=InputNorm(num_features=3))

    def train_dataloader(self) -> Any:
        return loader(2)


def run_of(path: Path, *callbacks: Any, net: LitNet | None = None) -> dict[str, Any]:
    """Train for an epoch, and return the values at the start by the names of the checkpoint."""
    net = net or LitNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    save = ModelCheckpoint(path / "saved", "end")
    run = trainer(path, *callbacks, save, enable_checkpointing=True, max_epochs=1, logger=CSVLogger(path))
    run.fit(net, Images())
    return before


def test_a_checkpoint_of_a_revisited_run_says_what_became_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = LitNet(model=residual_net(zero_init_residual=True))
    before = run_of(tmp_path, RevisitedBatchNorm(scale=0.2, exclude=["*.stem.*"]), net=net)
    capsys.readouterr()
    shown = inspected(tmp_path / "saved" / "end.ckpt", capsys=capsys)
    after = torch.load(tmp_path / "saved" / "end.ckpt", weights_only=True)["state_dict"]
    starts = {"model.stem.1": 1.0, "model.bn1": 0.2, "model.bn2": 0.0}
    squares: list[float] = []
    for layer in shown["layers"]:
        name = layer["name"]
        scale, shift = (after[f"{name}.{part}"].double().numpy() for part in ("weight", "bias"))
        start = np.full_like(scale, np.float32(starts[name]))
        assert layer["run"]["start"] == {"min": start[0], "max": start[0]}
        assert layer["run"]["scale_drift"] == pytest.approx(np.sqrt(np.mean((scale - start) ** 2)), rel=1e-9)
        moved = shift - before[f"{name}.bias"].double().numpy()
        assert layer["run"]["shift_drift"] == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-9)
        squares += [*((scale - start) ** 2)]
    assert [layer["run"]["outcome"] for layer in shown["layers"]] == ["left out", "revisited", "kept at 0"]
    run = shown["run"]
    assert (run["epoch"], run["global_step"]) == (0, 2)
    assert run["scale_drift"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-9)
    (settings,) = run["callbacks"]
    assert (settings["scale"], settings["scale_lr_divisor"], settings["exclude"]) == (0.2, 100.0, ["*.stem.*"])
    data = torch.cat([batch[0] for batch in loader(2)]).double()
    assert run["input_statistics"]["Images"]["mean"] == pytest.approx(data.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert run["input_statistics"]["Images"]["samples"] == len(data)


def test_the_table_of_a_revisited_run_says_it_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path, RevisitedBatchNorm())
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "saved" / "end.ckpt")]) == 0
    output = capsys.readouterr().out
    assert "end.ckpt: 3 batch norm layers (3 revisited)" in output
    assert "skip" not in output
    assert "\nSaved in epoch 0, step 2 (epochs count from 0)\nRevisitedBatchNorm(scale=0.1, " in output
    assert "\nDrift from the start, root mean square over channels: scales " in output
    assert "\nInput of Images: mean " in output


@pytest.mark.parametrize(
    ("make", "outcome", "said"),
    [
        (lambda: RevisitedBatchNorm(monitor=False), "start unknown", "no monitor has noted where its scale started"),
        (BatchNormMonitor, "baseline", "No RevisitedBatchNorm has left its state here"),
        (lambda: RevisitedBatchNorm(enabled=False), None, "No RevisitedBatchNorm has left its state here"),
    ],
    ids=["no monitor", "baseline", "switched off"],
)
def test_a_run_of_which_less_is_known_says_so(
    make: Any, outcome: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, make())
    capsys.readouterr()
    for layer in inspected(tmp_path / "saved" / "end.ckpt", capsys=capsys)["layers"]:
        assert (layer["run"] and layer["run"]["outcome"]) == outcome
    assert main(["inspect", str(tmp_path / "saved" / "end.ckpt")]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:RevisitedBatchNorm")  # warns that no scale is rewritten
def test_trained_layers_that_kept_their_scales_were_not_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, RevisitedBatchNorm(), net=LitNet(model=random_net()))
    capsys.readouterr()
    layers = inspected(tmp_path / "saved" / "end.ckpt", capsys=capsys)["layers"]
    assert {layer["run"]["outcome"] for layer in layers} == {"not rewritten"}


BOMB: Any = [0.1]
for _ in range(9):
    BOMB = [BOMB] * 10


@pytest.mark.parametrize(
    "callbacks",
    [
        3,
        {"RevisitedBatchNorm": 3},
        {"RevisitedBatchNorm": {"scale": "big", "scale_lr_divisor": 100.0}},
        {"RevisitedBatchNorm": {"scale": BOMB, "scale_lr_divisor": 100.0}},
        {"RevisitedBatchNorm": {"scale": 0.1, "scale_lr_divisor": BOMB}},
        {"RevisitedBatchNorm": {"scale": 0.1, "scale_lr_divisor": 100.0, "zero_kept": 7}},
        {"RevisitedBatchNorm": {"scale": 0.1, "scale_lr_divisor": 100.0, EPS_KEY: {"bn": "x", 3: 1e-3}}},
        {"M": {"start": {"scale": {"layers": ["bn"], "channels": [3], "values": torch.ones(1).expand(10**8)}}}},
        {"M": {"start": {"scale": {"layers": ["bn"], "channels": [-3], "values": torch.ones(4)}}}},
    ],
    ids=range(9),
)
def test_a_checkpoint_may_hold_anything_where_callbacks_keep_their_state(
    callbacks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"epoch": -1, "global_step": "x", "Data": {"input_norm": dict.fromkeys(STATE_KEYS, 3)}}
    torch.save({"state_dict": tensors("bn"), "callbacks": callbacks, **state}, tmp_path / "model.ckpt")
    shown = inspected(tmp_path / "model.ckpt", capsys=capsys)
    assert [layer["name"] for layer in shown["layers"]] == ["bn"]
    assert (shown["run"]["epoch"], shown["run"]["global_step"]) == (None, None)
    assert "the input statistics of Data in it cannot be read" in shown["run"]["problems"]
    assert main(["inspect", str(tmp_path / "model.ckpt")]) == 0
    assert all(len(line) < 1000 for line in capsys.readouterr().out.splitlines())


def test_the_constants_of_a_fixed_input_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    standardizer = OnlineStandardizer(InputNorm(num_features=2, mode="fixed", mean=[0.25, 0.5], std=[0.5, 2.0]))
    content = {"state_dict": tensors("bn"), "callbacks": {}, "Data": {"input_norm": standardizer.state_dict()}}
    torch.save(content, tmp_path / "model.ckpt")
    statistics = inspected(tmp_path / "model.ckpt", capsys=capsys)["run"]["input_statistics"]["Data"]
    assert (statistics["mean"], statistics["std"]) == ([0.25, 0.5], [0.5, 2.0])


def test_json_of_a_run_that_diverged_is_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors("bn", weight=torch.tensor([1.0, torch.nan, torch.inf, 0.0])), tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path / "model.pt"), "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["layers"]
    assert layer["scale"]["mean"] is None
