"""Makes every row of the table in docs/how_it_works.md: which eps the layers have, and what is said."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.eps import EPS, TORCHS, Evaluated, eps_of
from helpers.lit import loader, quiet, trainer
from helpers.models import residual_net
from helpers.scripts import ROOT, run_ranks
from torch import nn

OTHER = 1e-2
PAGE = (ROOT / "docs" / "how_it_works.md").read_text()
ROWS = {
    way: (eps, said)
    for way, eps, said in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE.partition("\n## eps\n")[2], re.MULTILINE)
    if way != "way"
}


@dataclass
class Runs:
    """Makes runs and checkpoints in a folder, and collects which eps layers have had and what was said."""

    folder: Path
    log: pytest.LogCaptureFixture

    def module(self, eps: float = TORCHS, kind: type[Evaluated] = Evaluated) -> Evaluated:
        module = kind(model=residual_net())
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = eps
        return module

    def fitted(self, *callbacks: L.Callback) -> Evaluated:
        module = self.module()
        trainer(self.folder, *callbacks, max_epochs=1).fit(module, loader())
        module.seen.clear()
        return module

    def saved(self, *callbacks: L.Callback, **options: Any) -> Path:
        run = trainer(self.folder, *callbacks, max_epochs=1)
        run.fit(self.module(), loader())
        run.save_checkpoint(self.folder / "run.ckpt", **options)
        return self.folder / "run.ckpt"

    def told(
        self,
        stages: Sequence[str],
        *callbacks: L.Callback,
        module: Callable[[], Evaluated] | None = None,
        checkpoint: Path | None = None,
    ) -> list[tuple[set[float], str]]:
        """Run stages, each with a module of its own, and return of each which eps it has had and what was said."""
        found: list[tuple[set[float], str]] = []
        for stage in stages:
            own = (module or self.module)()
            run = trainer(self.folder, *copy.deepcopy(callbacks), max_epochs=2)
            self.log.clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                getattr(run, stage)(own, loader(), ckpt_path=checkpoint)
            texts = [str(warning.message) for warning in caught]
            texts += [self.log.text] if "No state_dict" in self.log.text and checkpoint is None else []
            found.append((set(own.seen[stage]), "\n".join(text for text in texts if "eps" in text or "ckpt" in text)))
        return found


class Saving(L.Callback):
    """Saves weights alone in the middle of a fit, as ModelCheckpoint(save_weights_only=True) does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=True)


class Copying(L.Callback):
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.copy = copy.deepcopy(pl_module)


EVALUATIONS = ["validate", "test", "predict"]
ALL = [*EVALUATIONS, "fit"]
Found = list[tuple[set[float], str]]


def on_two_ranks(runs: Runs) -> Found:
    told = run_ranks("eps_ranks.py", runs.folder)
    assert told.count("batch norm layers start from a new scale") == 2  # one for each fit
    return [(set(torch.load(runs.folder / f"rank{rank}.pt")), "report") for rank in range(2)]


def exported(runs: Runs) -> Found:
    network, inputs = runs.fitted(quiet(eps=EPS)).model.eval(), torch.randn(2, 3, 6, 6)
    program = torch.export.export(network, (inputs,))
    calls = [node for node in program.run_decompositions({}).graph.nodes if "batch_norm" in str(node.target)]
    assert len(calls) == 3
    return [({float(node.args[-1 if "no_training" in str(node.target) else -2]) for node in calls}, "")]


def copies(runs: Runs) -> Found:
    first, last = Copying(), Copying()
    trainer(runs.folder, first, quiet(eps=EPS), last, max_epochs=1).fit(runs.module(), loader())
    return [({*eps_of(first.copy), *eps_of(last.copy)}, "")]


def weights_saved_in_a_fit(runs: Runs) -> Found:
    runs.fitted(quiet(eps=EPS), Saving(runs.folder / "weights.ckpt"))
    return runs.told(EVALUATIONS, quiet(eps=EPS), checkpoint=runs.folder / "weights.ckpt")


def weights_that_tell_nothing(runs: Runs) -> Found:
    found: Found = []
    for callback in (quiet(eps=EPS), quiet()):
        saved = runs.saved(callback, weights_only=True)
        found += runs.told(EVALUATIONS, quiet(eps=EPS), checkpoint=saved)
    return found


def loaded_in_setup(runs: Runs) -> Found:
    weights = torch.load(runs.saved(), weights_only=True)["state_dict"]

    class Loading(Evaluated):
        def setup(self, stage: str) -> None:
            self.load_state_dict(weights)

    return runs.told(["fit"], quiet(eps=EPS), module=lambda: runs.module(kind=Loading))


def left_alone(runs: Runs) -> Found:
    return [*reset(runs, quiet()), *reset(runs, quiet(enabled=False))]


def of_several_callbacks(runs: Runs) -> Found:
    saved = runs.saved(quiet(include=["*.stem.*"], eps=EPS), quiet(include=["*.bn?"], eps=OTHER))
    found = runs.told(ALL, quiet(include=["*.stem.*"], eps=EPS), checkpoint=saved)
    assert all("were trained with eps=0.01 and " in said for _, said in found)
    assert [eps for eps, _ in found] == [{EPS, OTHER}] * 4
    return []


def loaded(runs: Runs, *callbacks: L.Callback) -> Found:
    saved = runs.saved(quiet(eps=EPS))

    def module() -> Evaluated:
        return Evaluated.load_from_checkpoint(saved)

    return runs.told(ALL, *callbacks, module=module) if callbacks else [(set(eps_of(module())), "")]


def reset(runs: Runs, *callbacks: L.Callback) -> Found:
    def module() -> Evaluated:
        initial = runs.module().state_dict()
        fitted = runs.fitted(quiet(eps=EPS))
        fitted.load_state_dict(initial)
        return fitted

    return runs.told(["fit"], *callbacks, module=module)


def evaluated(*callbacks: L.Callback, of: dict[str, Any]) -> Callable[[Runs], Found]:
    return lambda runs: runs.told(EVALUATIONS, *callbacks, checkpoint=runs.saved(quiet(**of)))


def resumed(*callbacks: L.Callback, of: dict[str, Any]) -> Callable[[Runs], Found]:
    return lambda runs: runs.told(["fit"], *callbacks, checkpoint=runs.saved(quiet(**of)))


TEST = "`test(ckpt_path=...)`"
WITH: dict[str, Any] = {"eps": EPS}
WAYS: dict[str, Callable[[Runs], Found]] = {
    "fit": lambda runs: runs.told(["fit"], quiet(eps=EPS)),
    "fit and resume on two ranks (DDP)": on_two_ranks,
    "validate, test, predict after the fit": lambda runs: runs.told(
        EVALUATIONS, quiet(eps=EPS), module=lambda: runs.fitted(quiet(eps=EPS))
    ),
    "`torch.export` after the fit": exported,
    "averages and copies that other callbacks make in their `setup`": copies,
    f"{TEST}, the callback has the same eps": evaluated(quiet(eps=EPS), of=WITH),
    f"{TEST}, the callback has 1e-2": evaluated(quiet(eps=OTHER), of=WITH),
    f"{TEST}, the callback has no eps": evaluated(quiet(), of=WITH),
    f"{TEST}, no callback": evaluated(of=WITH),
    f"{TEST} of a run without eps, the callback has 1e-3": evaluated(quiet(eps=EPS), of={}),
    f"{TEST} of weights alone, saved in a fit": weights_saved_in_a_fit,
    f"{TEST} of weights alone, saved later or by a run without eps": weights_that_tell_nothing,
    "resume, the callback has the same eps": resumed(quiet(eps=EPS), of=WITH),
    "resume, the callback has 1e-2": resumed(quiet(eps=OTHER), of=WITH),
    "resume, the callback has no eps": resumed(quiet(), of=WITH),
    "resume, no callback": resumed(of=WITH),
    "resume of a run without eps, the callback has 1e-3": resumed(quiet(eps=EPS), of={}),
    "weights that the module loads in its `setup`, the callback has 1e-3": loaded_in_setup,
    "test or resume from a checkpoint of several callbacks, or for other layers": of_several_callbacks,
    "test or resume, 1e-3 is in the model's code since": lambda runs: runs.told(
        ALL, quiet(), module=lambda: runs.module(EPS), checkpoint=runs.saved(quiet(eps=EPS))
    ),
    "`load_from_checkpoint`": loaded,
    "`load_from_checkpoint`, then test or fit with the callback": lambda runs: loaded(runs, quiet(eps=EPS)),
    "a fit, then test or fit with a callback of 1e-2": lambda runs: runs.told(
        ALL, quiet(eps=OTHER), module=lambda: runs.fitted(quiet(eps=EPS))
    ),
    "a fit, a reset by `load_state_dict`, then a fit whose callback has no eps or `enabled=False`": left_alone,
    "the same, then a fit without the callback": reset,
}


def test_the_table_has_a_row_for_every_way() -> None:
    assert list(ROWS) == list(WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_the_eps_of_its_row_and_says_what_the_row_says(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    eps, said = ROWS[way]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*half of the method")
        found = WAYS[way](Runs(tmp_path, caplog))
    assert bool(found) == eps.startswith("1e-"), "a row without a number is checked by its way"
    for seen, told in found:
        assert seen == {float(eps.split()[0])}
        assert all(text in told for text in re.findall(r"`(.+?)`", said))
        assert bool(told) == (not said.startswith("nothing"))
