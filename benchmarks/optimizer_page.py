"""The results of the optimizer zoo: keeps them in a file, and writes them as the tables of a page."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OUTCOMES = ("equal", "as by hand", "group state", "refused", "stopped", "cannot run", "raises", "differs")
FAILURES = ("stopped", "raises", "differs")
EXPLAINED = {
    "differs": "Wrong in silence: the values differ from groups made by hand, and no reason is known.",
    "raises": "The optimizer's own code fails, only under the rule.",
    "stopped": "The rule raises an error, after the first update.",
    "group state": (
        "The optimizer keeps state in each parameter group, and scales share this state with their group. The columns "
        "have the difference of the final values to hand-made groups, divided by the distance that hand-made groups "
        "moved them, over eight steps in which the learning rate rises and falls by half."
    ),
    "refused": (
        "The rule raises an error before the first update, or undoes the first update. The error gives the reason and "
        "the remedy."
    ),
    "as by hand": (
        "The optimizer raises an error with groups made by hand, and with the rule too. The table has the error with "
        "the rule."
    ),
    "cannot run": (
        "The optimizer cannot train this net without the rule either. The net runs on a CPU with the newest torch, "
        "and has convolutions and vectors among its parameters."
    ),
}


@dataclass
class Verdict:
    """The outcome for an optimizer. Differences are relative to the distance that hand-made groups moved parameters."""

    package: str
    optimizer: str
    outcome: str = "cannot run"
    reason: str = ""
    step: str = ""
    scales: float = 0.0
    others: float = 0.0
    faster: dict[str, Any] | None = None
    """The verdict with shifts that learn faster, if it differs."""

    @property
    def is_failure(self) -> bool:
        """Whether the outcome, or the outcome with faster shifts, is one of `FAILURES`."""
        return self.outcome in FAILURES or (self.faster or {}).get("outcome") in FAILURES


@dataclass
class Results:
    """All verdicts, the versions of packages, and the reasons why packages could not be searched ("" if they could)."""

    verdicts: list[Verdict] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Results:
        """Read a file if it exists."""
        if path is None or not path.exists():
            return cls()
        saved = json.loads(path.read_text())
        return cls([Verdict(**each) for each in saved["verdicts"]], saved["versions"], saved["missing"])

    def write(self, path: Path | None) -> None:
        """Write a file and move it into place as a whole: a run may be stopped at any time."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(asdict(self), indent=1))
            unfinished.replace(path)

    def drop(self, package: str, only: str = "") -> None:
        """Forget the verdicts of a package whose names contain a text."""
        self.verdicts = [each for each in self.verdicts if each.package != package or only not in each.optimizer]


def tables(results: Results, packages: Sequence[str]) -> str:
    """Return Markdown: the counts by package, and a row for each optimizer that is not equal to the bit."""
    return f"{_counts(results, packages)}\n{_unequal(results)}\n{_missing(results, packages)}"


def page(results: Results, packages: Sequence[str], torch_version: str) -> str:
    """Return the page of the documentation."""
    judged = [verdict for verdict in results.verdicts if verdict.outcome != "cannot run"]
    count = len({verdict.package for verdict in results.verdicts})
    equal = sum(verdict.outcome == "equal" for verdict in judged)
    silence = "" if any(verdict.is_failure for verdict in judged) else " None is wrong in silence."
    return f"""# Optimizers

<!-- Written by `python benchmarks/optimizer_zoo.py --page docs/optimizers.md`: change it there. -->

Of {len(results.verdicts)} optimizer classes in {count} packages, {len(judged)} can be tried, and {equal} of these
train with the rule as with parameter groups made by hand, to the bit. The tables below list the others, each with its
reason.{silence}

The update rule shows divided parameter groups to an optimizer's `step`. An optimizer of another package may read its
groups in other ways than torch's. So a program tries every optimizer class that these packages define. This page was
measured with torch {torch_version} on a CPU, with `torch.compile` switched off:

```text
pip install --no-deps -r benchmarks/optimizer_zoo.txt
python benchmarks/optimizer_zoo.py --results build/optimizer_zoo.json --page docs/optimizers.md
```

The command trains a net with batch norm for eight steps, with the rule and with groups made by hand. It does so in up
to four pairs: without weight decay and with it, and with one parameter group and two. Scales learn with lr / 100 and
have no weight decay. In two more pairs shifts learn with lr * 10. The command can be stopped at any time; the next call
continues. `make optimizers` makes an environment for the command and runs it.

## Counts

{_counts(results, packages)}
{_unequal(results)}
{_faster(results)}
## Packages that were not tried

{_missing(results, packages)}
## Equal to the bit

{_equal(results, packages)}"""


def _counts(results: Results, packages: Iterable[str]) -> str:
    outcomes = [each for each in OUTCOMES if any(verdict.outcome == each for verdict in results.verdicts)]
    lines = ["| package | version | " + " | ".join(outcomes) + " |", "|---|---|" + "--:|" * len(outcomes)]
    counted = {name: Counter(each.outcome for each in results.verdicts if each.package == name) for name in packages}
    everything = Counter(verdict.outcome for verdict in results.verdicts)
    for name, count in [*counted.items(), ("all", everything)]:
        if count:
            version = results.versions.get(name, "")
            lines.append(f"| {name} | {version} | " + " | ".join(str(count[each] or "") for each in outcomes) + " |")
    return "\n".join(lines) + "\n"


def _unequal(results: Results) -> str:
    text = ""
    for outcome, explanation in EXPLAINED.items():
        found = [verdict for verdict in results.verdicts if verdict.outcome == outcome]
        if not found:
            continue
        text += f"## {outcome.capitalize()}: {len(found)}\n\n{explanation}\n\n"
        has_size = outcome in ("group state", "differs")
        text += _sizes(found) if has_size else _reasons(found)
        text += "\n"
    return text


def _sizes(verdicts: Iterable[Verdict]) -> str:
    ordered = sorted(verdicts, key=lambda each: (-each.scales, each.optimizer.lower()))
    rows = [
        f"| `{each.optimizer}` | {each.scales:.2g} | {each.others:.2g} | {_cell(each.reason)} |" for each in ordered
    ]
    return "\n".join(["| optimizer | scales | others | reason |", "|---|--:|--:|---|", *rows]) + "\n"


def _reasons(verdicts: Iterable[Verdict]) -> str:
    """Return a row for each reason with its optimizers; an optimizer's own name is left out of the reason."""
    found: dict[str, list[str]] = {}
    for each in verdicts:
        name = each.optimizer.rpartition(".")[2]
        found.setdefault(re.sub(rf"\b{re.escape(name)}\b", "…", each.reason), []).append(f"`{each.optimizer}`")
    lines = ["| reason | optimizers |", "|---|---|"]
    for reason, names in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {_cell(reason)} | {', '.join(sorted(names, key=str.lower))} |")
    return "\n".join(lines) + "\n"


def _faster(results: Results) -> str:
    found = [Verdict(**each.faster) for each in results.verdicts if each.faster]
    if not found:
        return ""
    text = (
        "## Other outcomes if shifts learn faster\n\nWith `shift_lr_multiplier=10` these optimizers have other "
        "outcomes than in the tables above.\n"
    )
    for outcome in OUTCOMES:
        own = [each for each in found if each.outcome == outcome]
        if own:
            has_size = any(each.scales or each.others for each in own)
            text += f"\n{outcome.capitalize()}:\n\n{_sizes(own) if has_size else _reasons(own)}"
    return text


def _missing(results: Results, packages: Iterable[str]) -> str:
    tried = {verdict.package for verdict in results.verdicts}
    known = {
        name: reason or ("" if name in tried else "no optimizer class") for name, reason in results.missing.items()
    }
    rows = [(name, known.get(name, "not tried")) for name in packages]
    return "".join(f"- {name}: {_cell(reason)}\n" for name, reason in rows if reason) or "Every package was tried.\n"


def _equal(results: Results, packages: Iterable[str]) -> str:
    text = ""
    for name in packages:
        equal = {each.optimizer for each in results.verdicts if (each.package, each.outcome) == (name, "equal")}
        if equal:
            text += f"- {name}: {', '.join(sorted({each.rpartition('.')[2] for each in equal}, key=str.lower))}\n"
    return text


def _cell(text: str) -> str:
    text = re.sub(r" \(/[^)]*\)", "", text)  # removes paths of the machine
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
