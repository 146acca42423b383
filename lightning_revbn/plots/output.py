"""Writes a figure to a file: the same bytes for the same figure, whatever the user's settings of matplotlib are."""

# pyright: reportUnknownMemberType=false
# Some functions of matplotlib and numpy have untyped arguments.

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

__all__ = ["HEAT_MAP", "NORMAL", "SMALL", "save", "settings"]

SMALL, NORMAL = 8, 9
"""Sizes of text, in points."""

HEAT_MAP = "heat map"
"""Label of a mesh whose colours are kept when a picture is reduced to 256 colours."""

_SETTINGS: dict[str, Any] = {
    "font.size": SMALL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": SMALL,
    "figure.labelsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.parse_math": False,  # a $ in the name of a run or layer is not a formula
    "svg.hashsalt": "lightning-revbn",  # ids are random otherwise, and the same logs would give different files
    "pdf.fonttype": 42,  # keeps text in a PDF as text
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same figure.

    Args:
        figure: The figure.
        path: The file; its suffix names the format.
    """
    kind = path.suffix.lower()[1:]
    # With the date of writing, the same figure would give different bytes.
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    content = io.BytesIO()
    with settings():
        figure.savefig(content, format=kind, dpi=150, metadata=undated.get(kind))
    meshes = [mesh for panel in figure.axes for mesh in panel.collections if mesh.get_label() == HEAT_MAP]
    maps = {mesh.get_cmap().name: mesh.get_cmap() for mesh in meshes}
    _replace(path, _with_palette(content, [*maps.values()]) if kind == "png" else content.getvalue())


def _replace(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a full disk, or the end of the process, leaves the old file intact."""
    target = path.resolve()  # a link stays a link
    if target.exists() and not target.is_file():
        path.write_bytes(content)  # a pipe or a device: its reader would never see a file that replaced it
        return
    new = target.with_name(f".figure.{os.getpid()}")  # not the target's name: it may have 255 bytes already
    try:
        new.write_bytes(content)
        if target.exists():
            new.chmod(target.stat().st_mode & 0o777)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def settings() -> Generator[None, None, None]:
    """Draw with matplotlib's defaults and this module's settings, whatever the user's settings are.

    Yields:
        Nothing; draw inside the block.
    """
    with style.context(["default", _SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)  # a box replaces the glyph
        yield


def _with_palette(png: io.BytesIO, maps: Sequence[Colormap]) -> bytes:
    """Return a picture reduced to 256 colours, which look the same in a third of the file size.

    Args:
        png: The picture.
        maps: Colour maps whose colours stay exact, even if few cells have them.
    """
    picture = Image.open(png)
    rgb = picture.convert("RGB")
    reduced = _nearest(rgb, maps) if maps else rgb.quantize(256, dither=Image.Dither.NONE)
    content = io.BytesIO()
    reduced.save(content, "png", optimize=True, dpi=picture.info["dpi"])
    return content.getvalue()


def _nearest(picture: Image.Image, maps: Sequence[Colormap]) -> Image.Image:
    """Return a picture reduced to the colours of the maps, and greys for the text."""
    greys = np.repeat(np.arange(0, 256, 5)[:, None], 3, axis=1)
    shades = [np.asarray([*own(np.arange(own.N)), own.get_bad()], dtype=np.float64)[:, :3] for own in maps]
    exact: NDArray[np.int64] = np.rint(255 * np.concatenate(shades)).astype(np.int64)
    palette = np.concatenate([exact, greys])
    pixels = np.asarray(picture).astype(int)
    codes, where = np.unique(pixels @ (65536, 256, 1), return_inverse=True)
    used = np.stack([codes // 65536, codes // 256 % 256, codes % 256], axis=1)
    nearest = np.array([int(((palette - colour) ** 2).sum(1).argmin()) for colour in used])
    reduced = Image.fromarray(nearest[where].reshape(pixels.shape[:2]).astype(np.uint8))
    reduced.putpalette(palette.astype(np.uint8).tobytes())
    return reduced
