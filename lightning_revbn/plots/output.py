"""Writes a figure to a file, the same bytes for the same figure, whatever matplotlib's settings are."""

# pyright: reportUnknownMemberType=false
# Matplotlib and numpy leave the arguments of some of their functions untyped.

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
"""Label of a mesh whose colours a reduced picture keeps."""

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
    "text.parse_math": False,  # names of runs and layers are no formulas
    "svg.hashsalt": "lightning-revbn",  # the same file from the same logs
    "pdf.fonttype": 42,  # text of a PDF stays text
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same figure.

    Args:
        figure: The figure.
        path: Its suffix says which format.
    """
    kind = path.suffix.lower()[1:]
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    content = io.BytesIO()
    with settings():
        figure.savefig(content, format=kind, dpi=150, metadata=undated.get(kind))
    meshes = [mesh for panel in figure.axes for mesh in panel.collections if mesh.get_label() == HEAT_MAP]
    maps = {mesh.get_cmap().name: mesh.get_cmap() for mesh in meshes}
    _replace(path, _with_palette(content, [*maps.values()]) if kind == "png" else content.getvalue())


def _replace(path: Path, content: bytes) -> None:
    """Put a whole file in the place of another: a full disk, or the end of the process, leaves the old one."""
    target = path.resolve()  # a link stays a link
    if target.exists() and not target.is_file():
        path.write_bytes(content)  # a pipe or a device: a file in its place would be no help to who reads it
        return
    new = target.with_name(f".figure.{os.getpid()}")  # a name beside one of 255 bytes has no room for that one
    try:
        new.write_bytes(content)
        if target.exists():
            new.chmod(target.stat().st_mode & 0o777)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def settings() -> Generator[None, None, None]:
    """Draw with matplotlib's own settings and ours, whatever the user's are.

    Yields:
        Nothing; draw inside.
    """
    with style.context(["default", _SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)  # a box stands for it
        yield


def _with_palette(png: io.BytesIO, maps: Sequence[Colormap]) -> bytes:
    """Return a picture in 256 colours, which takes a third of the space and looks the same.

    Args:
        png: The picture.
        maps: Colour maps whose colours must stay as they are, however few cells have them.
    """
    picture = Image.open(png)
    rgb = picture.convert("RGB")
    reduced = _nearest(rgb, maps) if maps else rgb.quantize(256, dither=Image.Dither.NONE)
    content = io.BytesIO()
    reduced.save(content, "png", optimize=True, dpi=picture.info["dpi"])
    return content.getvalue()


def _nearest(picture: Image.Image, maps: Sequence[Colormap]) -> Image.Image:
    """Return a picture in the colours of maps, and greys for the text."""
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
