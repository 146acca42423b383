from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.made_runs import AFFINE, RESNET_18, RESNET_152, SMALL_NET, make_run, pair
from PIL import Image

from lightning_revbn.plots.layers_figure import draw
from lightning_revbn.plots.output import HEAT_MAP, save


@pytest.mark.parametrize("layers", [RESNET_18, RESNET_152])
def test_pictures_are_small_files(layers: list[str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def noisy(layer: str, quantity: str, values: np.ndarray) -> np.ndarray:
        return values * random.uniform(0.9, 1.1, len(values))

    save(draw(pair(layers, quantities=AFFINE, steps=range(100), change=noisy)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 300_000


def test_letters_that_no_font_has_are_boxes_and_no_warnings(tmp_path: Path) -> None:
    save(draw([make_run(["中", "文"], label="运行", quantities=["scale_mean"])]), tmp_path / "figure.png")
    Image.open(tmp_path / "figure.png").verify()


@pytest.mark.parametrize("style", ["lines", "heatmap"])
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_runs_give_the_same_bytes(suffix: str, style: Any, tmp_path: Path) -> None:
    contents: list[bytes] = []
    for name in ("one", "other"):
        save(draw([make_run(["a", "b"], quantities=["shift_mean"])], style), tmp_path / f"{name}{suffix}")
        contents.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert contents[0] == contents[1]
    assert b"Date" not in contents[0]
    if suffix == ".png":
        picture = Image.open(tmp_path / "one.png")
        assert round(picture.info["dpi"][0]) == 150
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    elif suffix == ".svg":
        assert ElementTree.fromstring(contents[0]).tag.endswith("svg")
    else:
        assert contents[0].startswith(b"%PDF-")
        assert contents[0].rstrip().endswith(b"%%EOF")


def test_a_reduced_picture_keeps_the_colours_of_its_heat_maps(tmp_path: Path) -> None:
    figure = draw([make_run(RESNET_152, quantities=["scale_mean", "shift_mean"], steps=range(64))])
    save(figure, tmp_path / "figure.png")
    colours = {colour for _, colour in Image.open(tmp_path / "figure.png").convert("RGB").getcolors(256)}
    meshes = [mesh for panel in figure.axes for mesh in panel.collections if mesh.get_label() == HEAT_MAP]
    assert len(meshes) == 2
    for cmap in {mesh.get_cmap().name: mesh.get_cmap() for mesh in meshes}.values():
        shades = {tuple(round(255 * part) for part in cmap(i)[:3]) for i in range(cmap.N)}
        assert len(shades - colours) <= 2


def test_the_settings_of_the_user_change_nothing(tmp_path: Path) -> None:
    import matplotlib as mpl

    runs = pair(SMALL_NET, quantities=["shift_drift"])
    save(draw(runs), tmp_path / "one.png")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": True, "savefig.facecolor": "red"}):
        before = dict(mpl.rcParams)
        save(draw(runs), tmp_path / "other.png")
        assert dict(mpl.rcParams) == before
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_a_disk_that_fills_up_leaves_the_old_picture_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:4096])
        raise OSError(28, "No space left on device")

    figure = draw([make_run(["a"], quantities=["scale_mean"])])
    file = tmp_path / "figure.png"
    file.write_bytes(b"the old one")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            save(figure, file)
    assert file.read_bytes() == b"the old one"
    assert [*tmp_path.iterdir()] == [file]
    file.chmod(0o640)
    link = tmp_path / "link.png"
    link.symlink_to(file)
    save(figure, link)
    assert link.is_symlink()
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [file, link]


def test_a_pipe_stays_one_and_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    figure = draw([make_run(SMALL_NET)])
    os.mkfifo(tmp_path / "pipe.svg")
    reader = threading.Thread(target=(tmp_path / "pipe.svg").read_bytes, daemon=True)
    reader.start()
    save(figure, tmp_path / "pipe.svg")
    reader.join(timeout=60)
    assert (tmp_path / "pipe.svg").is_fifo()
    longest = tmp_path / f"{'é' * 125}.svg"
    save(figure, longest)
    assert longest.stat().st_size > 1000
