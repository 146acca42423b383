"""Trains a small net with every optimizer of many packages, by the update rule and by groups made by hand.

    pip install --no-deps -r benchmarks/optimizer_zoo.txt
    python benchmarks/optimizer_zoo.py --results build/optimizer_zoo.json --page docs/optimizers.md

Each optimizer trains up to six pairs of nets for eight steps from the same seed: with and without weight decay, with a
single group and with two groups, and, in a single group, with shifts that learn ten times faster. Groups by hand give
scales lr / c and no weight decay, and shifts lr * k and weight decay / k.
Each optimizer runs in its own process, so that a crash or a hang costs a single row, and each verdict is written at
once. A second call with the same results file judges only missing optimizers, and packages whose version changed.
Options: `--packages adabound timm`, `--only Muon` (part of a class's qualified name), `--again` (judges known
optimizers too).

Outcomes, best first; the worst of the pairs counts:

    equal        the same values as by hand, to the bit
    as by hand   hand-made groups raise an error, and so does the rule
    group state  the optimizer keeps state in each group, so scales share the state with their group
    refused      `ScaleUpdateRule` raises before any update
    stopped      `ScaleUpdateRule` raises after an update
    cannot run   without the rule, the optimizer does not train this net, or two trainings differ
    raises       the optimizer's own code fails, only under the rule
    differs      silently wrong: the values differ from the values by hand, without a known reason
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes minutes per class and changes no update
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from helpers.models import ResidualNet, images, residual_net, scales, shifts
from lightning import seed_everything
from optimizer_cases import (
    BATCH,
    DIVISOR,
    MODULES,
    MULTIPLIER,
    SCHEDULE,
    construct,
    construct_by_hand,
    optimizers,
    user_groups,
    ways,
)
from optimizer_page import OUTCOMES, Results, Verdict, page, tables
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_revbn import ScaleUpdateRule

DECAY = 0.01
SECONDS = 120
"""Time limit for an optimizer."""
LOOK_SECONDS = 300
"""Limit of the time between two messages of a package, spent on its import or on judging an optimizer."""


@dataclass
class Run:
    """A training: the final parameters or the error, and the keys by which groups differ besides their settings."""

    values: dict[str, Tensor] = field(default_factory=dict)
    group_state: list[str] = field(default_factory=list)
    error: Exception | None = None
    has_moved: bool = False


def train(model: ResidualNet, optimizer: Any, step: Callable[[Any, Callable[..., Tensor]], Any]) -> None:
    """Train on a few random images; a schedule sets the learning rates at every step."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()  # schedule-free optimizers require it
    inputs, targets = images(len(SCHEDULE) * BATCH)
    inputs = inputs.to(model.head.weight.dtype)
    start = [group.get("lr") for group in optimizer.param_groups]
    for factor, x, y in zip(SCHEDULE, inputs.split(BATCH), targets.split(BATCH), strict=True):
        for group, lr in zip(optimizer.param_groups, start, strict=True):
            if lr is not None:
                group["lr"] = lr * factor

        def compute(create_graph: bool = False, x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward(create_graph=create_graph)
            return loss

        step(optimizer, compute)


def run(
    cls: type[Optimizer], way: str, how: str, two: bool = False, decay: float = 0.0, multiplier: float = 1.0
) -> Run:
    """Train from the seed, and return the result.

    Args:
        cls: The optimizer's class.
        way: The way to call `step`.
        how: "plain", "hand" or "rule".
        two: Whether the user has two groups.
        decay: The weight decay.
        multiplier: Factor of the shifts' learning rate, by hand and by the rule.
    """
    result, model = Run(), residual_net()
    if way == "bfloat16":
        model.bfloat16()
    try:
        seed_everything(0, verbose=False)
        groups = user_groups(cls, model, two)
        if how == "hand":
            optimizer = construct_by_hand(cls, model, groups, decay, multiplier)
        else:
            optimizer = construct(cls, model, groups, decay)
        seed_everything(0, verbose=False)  # again, as constructors may have drawn random numbers
        if how == "rule":
            own = {"shifts": shifts(model), "shift_multiplier": multiplier}
            with ScaleUpdateRule(optimizer, scales(model), DIVISOR, scales(model), **own):
                train(model, optimizer, ways(cls)[way])
        else:
            train(model, optimizer, ways(cls)[way])
        settings = {"params", "param_names", "lr", "initial_lr", "weight_decay"}
        first, *others = optimizer.param_groups
        result.group_state = [
            key
            for key in first
            if key not in settings and any(repr(group.get(key)) != repr(first[key]) for group in others)
        ]
        result.values = {name: value.detach().clone() for name, value in model.named_parameters()}
    except Exception as error:  # any error of the optimizer's code is a result
        result.error = error
        started = residual_net().to(model.head.weight.dtype)
        pairs = zip(model.parameters(), started.parameters(), strict=True)
        result.has_moved = not all(torch.equal(now, then) for now, then in pairs)
    return result


def distance(ruled: Run, hand: Run, of: Callable[[str], bool]) -> float:
    """Return the distance between the ends of two trainings, relative to the distance that the second covered."""
    start = residual_net().state_dict()
    names = [name for name in hand.values if of(name)]
    apart = sum(float((ruled.values[name] - hand.values[name]).double().square().sum()) for name in names)
    moved = sum(float((hand.values[name] - start[name]).double().square().sum()) for name in names)
    return (apart / moved) ** 0.5 if moved else (float("inf") if apart else 0.0)


def same(first: Run, second: Run) -> bool:
    return all(
        torch.allclose(first.values[name], second.values[name], rtol=0, atol=0, equal_nan=True) for name in first.values
    )


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:500]


def is_ours(error: Exception) -> bool:
    """Tell whether this package raised an error itself."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return "lightning_revbn" in Path(last).parts


def judge(cls: type[Optimizer], verdict: Verdict) -> Verdict:
    """Judge an optimizer, and fill in its verdict."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = residual_net()
    ids = {id(scale) for scale in scales(model)}
    own = {name for name, parameter in model.named_parameters() if id(parameter) in ids}
    try:
        optimizer = construct(cls, model, user_groups(cls, model, False), 0.0)
        ScaleUpdateRule(optimizer, scales(model), DIVISOR, scales(model)).remove()
    except Exception as error:
        verdict.outcome = "refused" if is_ours(error) else "cannot run"
        verdict.reason = said(error)
        return verdict
    errors: list[Exception] = []
    for way in ways(cls):
        plain = run(cls, way, "plain")
        if plain.error is None:
            verdict.step = way
            break
        errors.append(plain.error)
    else:
        verdict.reason = "; ".join(dict.fromkeys(map(said, errors)))
        return verdict
    start = {name: parameter.to(plain.values[name].dtype) for name, parameter in model.named_parameters()}
    if not all(bool(value.isfinite().all()) for value in plain.values.values()):
        verdict.reason = "diverges"
    elif all(torch.equal(plain.values[name], start[name]) for name in own):
        verdict.reason = "moves no scale"
    elif not same(plain, run(cls, way, "plain")):
        verdict.reason = "two runs from one seed differ"
    if verdict.reason:
        return verdict
    verdict.outcome = "equal"
    accepts_decay = "weight_decay" in inspect.signature(cls).parameters
    takes_groups = run(cls, way, "plain", two=True).error is None
    faster = Verdict(verdict.package, verdict.optimizer, "equal", step=way)
    for decay in (0.0, DECAY) if accepts_decay else (0.0,):
        for two in (False, True) if takes_groups else (False,):
            compare(verdict, run(cls, way, "hand", two, decay), run(cls, way, "rule", two, decay), own)
        hand = run(cls, way, "hand", False, decay, MULTIPLIER)
        compare(faster, hand, run(cls, way, "rule", False, decay, MULTIPLIER), own)
    if faster.outcome != verdict.outcome or faster.scales or faster.others:
        verdict.faster = asdict(faster)
    return verdict


def compare(verdict: Verdict, hand: Run, ruled: Run, own: set[str]) -> None:
    """Update a verdict with another pair of trainings; a verdict describes the worst pair."""
    apart = (0.0, 0.0)
    if ruled.error is not None:
        if is_ours(ruled.error):
            outcome = "stopped" if ruled.has_moved else "refused"
        else:
            outcome = "as by hand" if hand.error is not None else "raises"
        reason = said(ruled.error)
    elif hand.error is not None:
        outcome, reason = "cannot run", f"by hand: {said(hand.error)}"
    elif same(hand, ruled):
        outcome, reason = "equal", ""
    else:
        apart = distance(ruled, hand, own.__contains__), distance(ruled, hand, lambda name: name not in own)
        outcome = "group state" if hand.group_state else "differs"
        reason = f"in each group: {', '.join(hand.group_state)}" if hand.group_state else "unknown"
    worse = (OUTCOMES.index(outcome), *apart) > (OUTCOMES.index(verdict.outcome), verdict.scales, verdict.others)
    if worse:
        verdict.outcome, verdict.reason, (verdict.scales, verdict.others) = outcome, reason, apart


def in_child(function: Callable[[Connection], None], seconds: float) -> Iterator[Any]:
    """Run a function in a forked process, and yield the values that it sends until it ends or crashes."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(sender,))
    process.start()
    sender.close()
    try:
        while receiver.poll(seconds):
            yield receiver.recv()
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()


def judge_package(package: str, only: str, known: list[str], sender: Connection) -> None:
    """Send a verdict for each unknown optimizer of a package, each from its own process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        try:
            found = optimizers(MODULES[package])
        except Exception as error:
            sender.send(said(error))
            return
        sender.send("")
        for name, cls in sorted(found.items()):
            if only in name and name not in known:
                verdict = Verdict(package, name)
                answers = in_child(lambda own, cls=cls, verdict=verdict: own.send(judge(cls, verdict)), SECONDS)
                lost = Verdict(package, name, reason=f"crashed, or took more than {SECONDS} s")
                sender.send(next(answers, lost))
                answers.close()


def judged(package: str, only: str, known: list[str], results: Results) -> Iterator[Verdict]:
    """Judge the optimizers of a package that its results lack, and record the reason if it cannot be searched."""
    results.missing[package] = "its import ends the process, or takes too long"
    for answer in in_child(lambda sender: judge_package(package, only, known, sender), LOOK_SECONDS):
        if isinstance(answer, Verdict):
            yield answer
        else:
            results.missing[package] = answer


def version_of(package: str) -> str:
    """Return the version of a package; "" if it is not installed under its name on PyPI."""
    try:
        return version(package.partition(" ")[0])
    except PackageNotFoundError:
        return ""


def main() -> int:
    """Judge the optimizers and print the tables; fail if any optimizer stops, raises or differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packages", nargs="*", choices=MODULES, default=list(MODULES), metavar="NAME")
    parser.add_argument("--only", default="", help="only classes whose qualified name contains this")
    parser.add_argument("--results", type=Path, help="a JSON file to read verdicts from, and to write all of them into")
    parser.add_argument("--again", action="store_true", help="judge what is in the results too")
    parser.add_argument("--page", type=Path, help="a Markdown file to write the tables into")
    arguments = parser.parse_args()
    results = Results.read(arguments.results)
    for package in arguments.packages:
        current = version_of(package)
        if arguments.again or results.versions.get(package, current) != current:
            results.drop(package, arguments.only)
        results.versions[package] = current
        known = [verdict.optimizer for verdict in results.verdicts if verdict.package == package]
        for verdict in judged(package, arguments.only, known, results):
            results.verdicts.append(verdict)
            results.write(arguments.results)
            print(f"{verdict.optimizer}: {verdict.outcome}", file=sys.stderr)
        results.write(arguments.results)
    print(tables(results, list(MODULES)))
    if arguments.page:
        arguments.page.write_text(page(results, list(MODULES), torch.__version__))
    return int(any(verdict.is_failure for verdict in results.verdicts))


if __name__ == "__main__":
    sys.exit(main())
