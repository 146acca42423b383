"""The page of Markdown that tells what was run on which device, what came of it, and what was not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.parts import PARTS

__all__ = ["page"]


def page(results: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        results: What the file of JSON holds.

    Returns:
        Markdown.
    """
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    device = results["device"]
    versions = ", ".join(f"{name} {device[name]}" for name in ("python", "torch", "lightning", "timm") if device[name])
    yield "# What one GPU says"
    yield ""
    if device["kind"] == "cuda":
        memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
        yield f"Device: {device['name']}, {memory}, compute capability {device['capability']}, CUDA {device['cuda']}."
    else:
        yield f"**Nothing here was run on a GPU.** The device is a CPU ({device['name']})."
    if results["small"]:
        yield "The inputs are small: this run tries the code, and its figures say nothing about speed."
    yield f"{versions}. {results['seconds']:.0f} s in all."
    yield ""
    yield "| part | outcome | seconds | run on a GPU |"
    yield "|---|---|---|---|"
    for part in PARTS:
        found = results["parts"].get(part.name)
        if found is None:
            yield f"| {part.title} | not asked for | | no |"
            continue
        on_gpu = "yes" if device["kind"] == "cuda" and found["outcome"] != "skipped" else "no"
        yield f"| {part.title} | {found['outcome']} | {found['seconds']:.0f} | {on_gpu} |"
    for part in PARTS:
        if part.name in results["parts"]:
            yield from _section(part.title, results["parts"][part.name], is_gpu=device["kind"] == "cuda")


def _section(title: str, found: Mapping[str, Any], *, is_gpu: bool) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    if found["reason"]:
        yield from (f"{found['outcome'].capitalize()}:", "", "```", found["reason"], "```", "")
    if found["figures"]:
        yield "| figure | median (quartiles) | limit on a GPU | within the limit |"
        yield "|---|---|---|---|"
        yield from (_row(figure, is_gpu=is_gpu) for figure in found["figures"])
        yield ""
    for note in found["notes"]:
        yield from (note, "")
    if "passed" in found:
        counts = [f"{len(found[kind])} {kind}" for kind in ("passed", "failed", "skipped")]
        yield from (f"{', '.join(counts)}.", "")
    for entry in found.get("failed", ()):
        yield from (f"Failed: `{entry['test']}`", "", "```", entry["reason"], "```", "")
    for warning in found.get("warnings", ()):
        yield f"- Warned: {warning}"
    for entry in found["skipped"]:
        yield f"- Not run: {entry['what']} ({entry['reason']})"


def _row(figure: Mapping[str, Any], *, is_gpu: bool) -> str:
    value, limit = f"{figure['value']:.3f}", figure["limit"]
    if "low" in figure:
        value += f" ({figure['low']:.3f} to {figure['high']:.3f})"
    verdict = "" if limit is None else "not run" if not is_gpu else "yes" if figure["value"] <= limit else "**no**"
    more = f"; {figure['detail']}" if figure.get("detail") else ""
    return f"| {figure['name']}{more} | {value} | {'' if limit is None else f'{limit:g}'} | {verdict} |"
