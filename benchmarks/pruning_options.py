"""Every option of ``prune``, ``sparsify`` and ``depth`` on every model of the coverage list.

    python benchmarks/pruning_options.py --results FILE            the 66 models; what FILE holds is not run again
    python benchmarks/pruning_options.py --results FILE --models hf:bert --only score=taylor
    python benchmarks/pruning_options.py --results FILE --write    also put the table into docs/benchmarks.md

Each model is captured once, in float64 with redrawn weights, in a process of its own; calibration is on two batches of
drawn inputs. Models of more than 500,000 parameters are first made eight times as narrow (by ``prune``). Not all
combinations are run, but every score, reduction, normalisation, scope, budget, compensation, pattern, method and unit
at least once per model. What is only removed must be its masked original (benchmarks/mask_oracle.py); everything else
must be finite and emitted as a module that gives what the graph gives. Budgets must be met within 1 %, or the report
must say that single indices are too coarse.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.isolated import Unfinished, isolated
from benchmarks.mask_oracle import masked_error, relative_error
from benchmarks.model_case import Case, float64_reference, redraw
from benchmarks.report import append_table, environment
from benchmarks.zoo import build, names

EXACT = 1e-6
CLOSE = 0.01
LIMIT = 60.0  # seconds of the processor that one pipeline may take
LARGE = 500_000  # parameters; models with more are first made narrower
NARROW = "prune{ratio=0.875,score=random,compensate=false,minimum=2,round_to=8}"
SEEDS = (1, 2)  # of the batches that are calibrated on


@dataclass(frozen=True)
class Trial:
    """One pipeline; ``masked``: nothing is refitted, the result is the masked original. ``data``: it is calibrated."""

    text: str
    data: bool = True
    masked: bool = False


def _removed(options: str) -> Trial:
    return Trial(f"prune{{{options},compensate=false}}", masked=True)


REMOVED = (
    "score=distortion,ratio=0.5", "score=l1,params=0.6", "score=l2,macs=0.6,scope=global,reduce=mean",
    "score=bn,ratio=0.5,scope=isomorphic", "score=fpgm,bytes=0.6,scope=isomorphic,reduce=max",
    "score=lamp,params=0.6,scope=global", "score=random,ratio=0.5,scope=global",
    "score=activation,params=0.6,scope=isomorphic,normalise=sum",
    "score=activation-norm,macs=0.7,params=0.8,normalise=none", "score=wanda,macs=0.6,scope=knapsack",
    "score=taylor,ratio=0.5,scope=knapsack,reduce=prod", "score=taylor-element,macs=0.6,scope=isomorphic,normalise=max",
    "score=taylor-squared,params=0.6,scope=global,normalise=minmax", "score=fisher,macs=0.6",
    "score=mask-gradient,params=0.6,scope=knapsack", "score=obd,ratio=0.5,scope=isomorphic,normalise=zscore",
    "score=snip,bytes=0.6,scope=global,reduce=first", "score=grasp,ratio=0.5,normalise=mean",
    "score=crop,peak=0.9,scope=global", "score=hesso,macs=0.6,scope=global",
    "score=l2,ratio=0.5,round_to=8", "score=l2,latency=0.8,measure=false,device=cpu",
    "score=l2,ratio=0.5,minimum=4,round_to=device,device=gpu",
)  # fmt: skip
TRIALS = (
    *map(_removed, REMOVED),
    Trial("prune{score=l2,ratio=0.5,preserve=true}"),
    Trial("prune{ratio=0.5}"), Trial("prune{macs=0.6}"), Trial("prune{macs=0.6,scope=global}"),
    Trial("prune{params=0.6,scope=dp}"), Trial("prune{score=l2,ratio=0.5,reestimate=true}"),
    Trial("prune{ratio=0.5,examples=8,steps=2}", data=False), Trial("prune{ratio=0.5,compensate=udfc}", data=False),
    Trial("prune{macs=0.6,compensate=moments}", data=False),
    Trial("prune{score=l2,ratio=0.5,compensate=false,reestimate=true,examples=8,steps=2}", data=False),
    Trial("sparsify", data=False), Trial("sparsify"), Trial("sparsify{pattern=unstructured}"),
    Trial("sparsify{pattern=block}"), Trial("sparsify{pattern=4:8,transposable=true}"),
    Trial("sparsify{pattern=1:4,method=wanda,refine=means,update=off}"),
    Trial("sparsify{pattern=unstructured,ratio=0.7,method=obs,update=columns,allocation=uniform}"),
    Trial("sparsify{method=magnitude,permute=true}"), Trial("sparsify{pattern=block,block=8x1}", data=False),
    Trial("depth{blocks=1}"), Trial("depth{ratio=0.3}", data=False), Trial("depth{params=0.9}"),
    Trial("depth{macs=0.9,score=macro,iterative=false}"), Trial("depth{blocks=1,unit=branch,score=similarity}"),
)  # fmt: skip


@dataclass
class Row:
    """What one pipeline made of one model; ``error`` against the masked original, else against its own graph."""

    model: str
    trial: str
    data: bool
    verdict: str = ""
    error: float | None = None
    note: str = ""
    seconds: float = 0.0  # of the processor
    peak: int = 0  # MiB, of the process so far


class Slow(BaseException):
    """A pipeline did not end within its time; no Exception, which the interpreter would wrap."""


def _interrupt(*_: Any) -> None:
    raise Slow


class Subject:
    """A model of the list, captured in float64, with what passes are calibrated on."""

    def __init__(self, name: str) -> None:
        import regauge

        case = build(name)
        if sum(weight.numel() for weight in case.model.parameters()) > LARGE:
            wide = regauge.capture(case.model, case.args, case.kwargs, verify=False)
            case.model = regauge.optimize(wide, NARROW).to_torch().eval()
        self.case: Case = case.double()
        redraw(self.case.model)  # in float64: random float32 values are not unique
        self.graph = regauge.capture(self.case.model, self.case.args, self.case.kwargs, verify=False)
        order = [value.name for value in self.graph.inputs]
        self.data = [self.case.drawn(seed, order) for seed in SEEDS]

    def run(self, trial: Trial, limit: float) -> Row:
        row = Row(self.case.name, trial.text, trial.data)
        start = time.process_time()
        signal.signal(signal.SIGPROF, _interrupt)
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            self._judge(row, trial)
        except Slow:
            row.verdict, row.note = "slow", f"no end in {limit:.0f} s"
        except Exception as reason:
            row.verdict, row.note = _failure(reason)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        row.seconds = time.process_time() - start
        row.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return row

    def _judge(self, row: Row, trial: Trial) -> None:
        import regauge

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", RuntimeWarning)  # of numpy: what is not finite on the way
            small = regauge.optimize(self.graph, trial.text, data=self.data if trial.data else None)
        report = small.report.passes[0]
        row.error, strange = self._error(small, trial.masked)
        told = [note for note in report.notes if "failed" in note or "single indices" in note]
        told += [str(each.message) for each in heard if issubclass(each.category, RuntimeWarning)]
        unmet = "" if any("single indices" in note for note in told) else _unmet(self.graph, small, trial.text)
        if strange:
            row.verdict, row.note = "WRONG", f"no box: {', '.join(strange[:3])}"
        elif not row.error <= EXACT:
            row.verdict, row.note = "WRONG", f"error {row.error:.1e}"
        elif unmet or any("failed" in note for note in told):
            row.verdict, row.note = "unmet", unmet or "; ".join(told)
        elif not report.changed:
            row.verdict, row.note = "unchanged", "; ".join(f"{count} x {why}" for why, count in report.left.items())
        else:
            row.verdict, row.note = "ok", "; ".join(told)

    def _error(self, small: Any, masked: bool) -> tuple[float, list[str]]:
        """Of the emitted module against the masked original, or against its own graph; inf where it is not finite."""
        module = small.to_torch().eval()
        if masked:
            return masked_error(float64_reference(self.case.model), module, self.case.call)
        return self._against_graph(small, module), []

    def _against_graph(self, graph: Any, module: torch.nn.Module) -> float:
        from torch.utils import _pytree

        with torch.no_grad():
            given = module(*self.case.args, **self.case.kwargs)
        leaves = [x for x in _pytree.tree_leaves((self.case.args, self.case.kwargs)) if isinstance(x, torch.Tensor)]
        expected = [y for y in graph.run(tuple(leaves)) if isinstance(y, torch.Tensor)]
        return relative_error([y for y in _pytree.tree_leaves(given) if isinstance(y, torch.Tensor)], expected)


def _failure(reason: Exception) -> tuple[str, str]:
    from regauge.ir.errors import RegaugeError

    verdict = "refused" if isinstance(reason, RegaugeError) else "error"
    return verdict, f"{type(reason).__name__}: {' / '.join(str(reason).splitlines())}"


def _unmet(before: Any, after: Any, text: str) -> str:
    """The budgets of ``prune`` where one is exceeded, or all are used to less than 99 %."""
    from regauge.ir.cost import cost, figures
    from regauge.ir.memory.activations import PeakMemory

    if not text.startswith("prune"):
        return ""
    old, new = figures(before), figures(after)
    shares: dict[str, tuple[float, float]] = {
        "params": (new.parameters, old.parameters),
        "macs": (new.macs, old.macs),
        "bytes": (new.bytes, old.bytes),
    }
    asked = {name: float(share) for name, share in re.findall(r"(params|macs|bytes|peak)=([0-9.]+)", text)}
    if "peak" in asked:
        shares["peak"] = (PeakMemory(cost(after)).total, PeakMemory(cost(before)).total)
    used = {name: shares[name][0] / (share * shares[name][1]) for name, share in asked.items()}
    if not used or 1 - CLOSE <= max(used.values()) <= 1 + 1e-9:
        return ""
    return ", ".join(f"{name} used to {share:.1%}" for name, share in used.items())


def _models(path: Path, models: Sequence[str], only: str) -> dict[str, list[Trial]]:
    """The trials of each model that the file does not hold yet."""
    held = {(row.model, row.trial, row.data) for row in read(path)}
    wanted = [trial for trial in TRIALS if only in trial.text]
    left = {name: [trial for trial in wanted if (name, trial.text, trial.data) not in held] for name in models}
    return {name: trials for name, trials in left.items() if trials}


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    print(f"{row.model:40s} {row.verdict:9s} {row.seconds:6.1f} s {row.peak:6d} MiB  {row.trial}"
          f"{'' if row.data else ' without data'}  {row.note}", flush=True)  # fmt: skip


def rows_of(name: str, trials: Sequence[Trial], limit: float = LIMIT) -> Iterator[Row]:
    """The trials of one model, in this process, on one thread."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    subject = Subject(name)
    for trial in trials:
        yield subject.run(trial, limit)


def run_model(name: str, trials: Sequence[Trial], path: Path, limit: float) -> None:
    """The trials of one model, each row into the file as it comes."""
    for row in rows_of(name, trials, limit):
        write(path, row)


def run_models(path: Path, models: Sequence[str], only: str, limit: float) -> None:
    """All that is left to run; where a process ends of itself, its next trial is to blame and the others go on."""
    for name in models:
        while todo := _models(path, [name], only).get(name):
            try:
                isolated(run_model, name, todo, path, limit, limit=limit * len(todo) + 120)
            except Unfinished as problem:
                blamed = _models(path, [name], only)[name][0]
                write(path, Row(name, blamed.text, blamed.data, "error", note=str(problem)))


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A row per model: how many pipelines of each pass were ok, and what was not, shortly."""
    lines = []
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        cells = [name]
        for kind in ("prune", "sparsify", "depth"):
            part = [row for row in own if row.trial.startswith(kind)]
            cells.append(f"{sum(row.verdict == 'ok' for row in part)} of {len(part)}")
        others = Counter(f"{row.verdict}: {row.note}"[:120] for row in own if row.verdict != "ok")
        cells.append("; ".join(f"{count} {text}" for text, count in others.items()))
        lines.append(cells)
    return lines


HEADS = ["model", "prune ok", "sparsify ok", "depth ok", "else"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file with a row of JSON per model and pipeline")
    parser.add_argument("--models", nargs="*", help="models to run (default: the 66 of the list)")
    parser.add_argument("--only", default="", help="pipelines whose text holds this")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds of the processor for one pipeline on one model"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    run_models(options.results, options.models or names(), options.only, options.limit)
    tried = {(trial.text, trial.data) for trial in TRIALS}
    rows = [row for row in read(options.results) if (row.trial, row.data) in tried]
    for line in table(rows):
        print("  ".join(line))
    if options.write:
        append_table("Options of pruning on the coverage list", HEADS, table(rows), __doc__.split("\n\n")[2])
    print(environment())


if __name__ == "__main__":
    main()
