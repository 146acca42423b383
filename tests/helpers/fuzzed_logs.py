"""Damages directories of logs at random, and runs the commands on them: `python tests/helpers/fuzzed_logs.py 500`.

Each directory must give a result, or an error of a single printable line.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lightning_revbn.cli.main import main

_TOKENS = [
    *(b"nan", b"inf", b"1e308", b"-1", b"9" * 5000, b"step,step", b"\x00" * 9, b"\xff\xfe", b'"', b"\n", b"\r\n,,,"),
    *(
        b"revbn/scale: [",
        b"seed: true\n",
        b"&a [*a, *a]\n",
        b"!!python/object:os.system {}\n",
        b"2026-13-99",
    ),
]


def damaged_logs(sources: Path, folder: Path, count: int, seed: int = 0) -> Iterator[Path]:
    """Yield randomly damaged directories, each with logs of a single kind; each is deleted before the next."""
    chance = random.Random(seed)
    kinds = sorted(source for source in sources.iterdir() if source.is_dir())
    for number in range(count):
        logs = folder / f"logs_{number}"
        shutil.copytree(chance.choice(kinds), logs, symlinks=True)
        for _ in range(chance.randint(1, 4)):
            _damage(logs, chance)
        yield logs
        shutil.rmtree(logs)


def _damage(logs: Path, chance: random.Random) -> None:
    files = sorted(path for path in logs.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    action = chance.randrange(9)
    if action == 0:
        del content[chance.randrange(len(content) + 1) :]
    elif action == 1:
        for _ in range(chance.randint(1, 20)):
            if content:
                content[chance.randrange(len(content))] = chance.randrange(256)
    elif action in (2, 3):
        at = chance.randrange(len(content) + 1)
        content[at:at] = chance.choice(_TOKENS)
    elif action == 4:
        at = chance.randrange(len(content) + 1)
        del content[at : at + chance.randint(1, 200)]
    elif action == 5:
        content = bytearray(chance.randbytes(chance.randint(0, 3000)))
    file.unlink()
    if action == 6:
        file.mkdir()
    elif action == 7:
        file.symlink_to(file.name if chance.random() < 0.5 else "/nowhere")
    elif action == 8:
        (file.parent / f"{file.stem[:50]}\x1b[31m\n{file.suffix}").write_bytes(content)
    else:
        file.write_bytes(content)


def ending(logs: Path, number: int) -> str:
    """Run a command on a directory and describe its end; `"wrong: ..."` if it gave no result and no printable line."""
    figure = str(logs.parent / "figure.png")
    command = [
        ["compare", str(logs), "--metric", "test_acc"],
        ["compare", str(logs), "--metric", "test_acc", "--any-length", "--seed-pattern", r"(?:-)(\d+)"],
        ["compare", str(logs), "--curves", "val_loss", "-o", figure],
        ["plot", str(logs), "-o", figure],
    ][number % 4]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would print more than the error's line
            code = main(command)
    except BaseException:
        return f"wrong: {' '.join(command)}\n{traceback.format_exc()}"
    said = err.getvalue()
    if code == 0 and out.getvalue():
        return "result"
    if code == 1 and not out.getvalue() and said.count("\n") == 1 and said[:-1].isprintable() and len(said) < 3000:
        return "one line"
    return f"wrong: {' '.join(command)} gave {code}\n{out.getvalue()}\n{said}"


def _main(count: int) -> int:
    from helpers.experiment import write_experiment

    os.environ["WANDB_SILENT"] = os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        write_experiment(Path(folder) / "sources")
        logs = damaged_logs(Path(folder) / "sources", Path(folder), count)
        endings = [ending(path, number) for number, path in enumerate(logs)]
    wrong = [text for text in endings if text.startswith("wrong")]
    print(*wrong, sep="\n")  # noqa: T201
    print(count, "directories:", dict(Counter(text.partition(":")[0] for text in endings)))  # noqa: T201
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]) if len(sys.argv) > 1 else 500))
