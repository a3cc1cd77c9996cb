"""Speed on a CPU: emitted ONNX files beside onnxruntime on the originals, emitted modules beside torch's own ways.

    python benchmarks/cpu.py                              all networks; minutes, most of them torch's compiler
    python benchmarks/cpu.py --networks bert_4x256 --no-torch --threads 2
    python benchmarks/cpu.py --write                      also put the tables into docs/benchmarks.md

Files: what ``simplify`` writes, against what torch's exporter writes (optimised, ``dynamo``, or not, ``raw``),
both with all of onnxruntime's optimisations. Modules: captured, simplified and emitted, plain or with the kernels of
oneDNN, against the network in eager mode and compiled by inductor. One thread, processor time, the least of
runs in turns, as ratios: above 1 is faster. The median of several openings, with the least and the most of them.
Files may also be run with more ``--threads``, by the clock on the wall then, which wants a machine with nothing else;
these do not spin while they wait, for they would take cores from those of the other file.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import regauge
from benchmarks.model_case import import_torchvision
from benchmarks.onnx_exports import IMAGE, TOKENS, Network, Positional, export, timm_network
from benchmarks.report import append_table, environment
from regauge.backends.run_onnxruntime import Session

OPENINGS = 7  # of what is run
SECONDS, FEWEST, MOST = 7.0, 8, 1500  # of all runs in turns together; turns of an opening at least, of all at most
Run = Callable[[], Any]


def _hidden(result: Any) -> torch.Tensor:
    return result[0]


def _bert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    ids = torch.randint(0, 1000, (1, 64))
    model = BertModel(config, add_pooling_layer=False)
    return Positional(model, ["input_ids", "attention_mask"], _hidden), (ids, torch.ones(1, 64, dtype=torch.int64))


def _llama() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=688, use_cache=False,
    )  # fmt: skip
    return Positional(LlamaModel(config), ["inputs_embeds"], _hidden), (torch.randn(1, 32, 256),)


NETWORKS = [
    Network("bert_4x256", _bert, TOKENS),
    Network("llama_4x256", _llama, TOKENS),
    *(Network(f"{name}_{size}", timm_network(name, size), IMAGE) for name, size in [
        ("vit_tiny_patch16_224", 224), ("mobilenetv3_small_100", 160), ("resnet18", 160), ("efficientnet_b0", 160),
        ("convnext_atto", 160), ("regnety_002", 160),
    ]),
]  # fmt: skip
"""The sizes of the first four are those for which torch's and onnxruntime's figures were known before."""


# -- what is timed -----------------------------------------------------------------------------------------------------


def in_turns(
    open_runs: Callable[[bool], Mapping[str, Run]], clock: Callable[[], float] = time.thread_time
) -> dict[str, list[float]]:
    """Least milliseconds of each run by a clock, in turns: entry i of all are of one opening.

    What is run is opened several times, in one order and the other: where memory happens to lie is worth 2 %. The least
    of an opening is what a busy machine leaves alone.
    """
    found: dict[str, list[float]] = {}
    for opening in range(OPENINGS):
        runs = open_runs(opening % 2 == 1)
        times: dict[str, list[float]] = {name: [] for name in runs}
        start = 0.0
        for turn in range(-3, MOST // OPENINGS):
            start = time.perf_counter() if turn == 0 else start
            for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
                before = clock()
                run()
                times[name].append((clock() - before) * 1e3)
            if turn >= FEWEST and time.perf_counter() - start > SECONDS / OPENINGS:
                break
        for name, own in times.items():
            found.setdefault(name, []).append(min(own[3:]))
    return found


def faster(times: Mapping[str, list[float]], name: str, than: str) -> str:
    """How many times faster one is: the median of the openings, and the least and the most of them."""
    ratios = sorted(b / a for a, b in zip(times[name], times[than], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})"


def files(network: Network, flavour: str, folder: Path, inputs: tuple[torch.Tensor, ...]) -> dict[str, Path] | None:
    """A file as it was exported and as it is simplified; raises where the two give different results."""
    source = export(network, flavour)
    if source is None:
        return None
    target = folder / source.name
    regauge.optimize(regauge.load(source), "simplify").to_onnx(target)
    found = {"original": source, "emitted": target}
    results = [Session(path, threads=1).run(inputs) for path in found.values()]
    for wanted, given in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    return found


def file_runs(
    paths: Mapping[str, Path], inputs: tuple[torch.Tensor, ...], threads: int, turned: bool
) -> dict[str, Run]:
    names = list(paths)[:: -1 if turned else 1]
    sessions = {name: Session(paths[name], threads=threads, spin=False) for name in names}
    return {name: partial(session.milliseconds, session.feeds(inputs)) for name, session in sessions.items()}


def module_runs(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, Run]:
    """A network as it is, compiled, and as it is emitted."""
    graph = regauge.optimize(regauge.capture(network, inputs), "simplify")
    modules: dict[str, Any] = {
        "eager": network,
        "inductor": torch.compile(network),
        "emitted": graph.to_torch(),
        "onednn": graph.to_torch(kernels="onednn"),
    }
    wanted = network(*inputs)
    for module in modules.values():
        torch.testing.assert_close(module(*inputs), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    return {name: partial(module, *inputs) for name, module in modules.items()}


# -- tables ------------------------------------------------------------------------------------------------------------


def file_rows(networks: list[Network], threads: int) -> Iterator[list[str]]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    for network in networks:
        inputs = network.make()[1]
        for flavour in ("dynamo", "raw"):
            with tempfile.TemporaryDirectory() as folder:
                paths = files(network, flavour, Path(folder), inputs)
                if paths is not None:
                    times = in_turns(partial(file_runs, paths, inputs, threads), clock)
                    yield [
                        network.name,
                        flavour,
                        f"{statistics.median(times['original']):.3g}",
                        faster(times, "emitted", "original"),
                    ]


def module_rows(networks: list[Network]) -> Iterator[list[str]]:
    for network in networks:
        torch.manual_seed(0)
        model, inputs = network.make()
        torch._dynamo.reset()
        runs = module_runs(model.eval(), inputs)
        times = in_turns(partial(lambda found, _: found, runs))
        ratios = [faster(times, name, "eager") for name in times if name != "eager"]
        yield [network.name, f"{statistics.median(times['eager']):.3g}", *ratios, faster(times, "onednn", "inductor")]


FILES = ["network", "export", "original, ms", "emitted, times as fast (least, most)"]
MODULES = ["network", "eager, ms", "inductor", "emitted", "emitted, onednn", "onednn beside inductor"]


def shown(rows: Iterator[list[str]]) -> list[list[str]]:
    found = []
    for row in rows:
        print(" | ".join(row), flush=True)
        found.append(row)
    return found


def overall(rows: list[list[str]], place: int) -> str:
    return f"{math.exp(statistics.fmean(math.log(float(row[place].split()[0])) for row in rows)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*")
    parser.add_argument("--no-files", action="store_true")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_torchvision()
    warnings.simplefilter("ignore")
    networks = [network for network in NETWORKS if not options.networks or network.name in options.networks]
    print(environment())
    with torch.no_grad():
        if not options.no_files:
            rows = shown(file_rows(networks, options.threads))
            print("geometric mean", overall(rows, 3))
            if options.write:
                threads = f", {options.threads} threads" if options.threads > 1 else ""
                append_table(f"Emitted ONNX files on a CPU{threads}", FILES, rows)
        if not options.no_torch:
            rows = shown(module_rows(networks))
            if options.write:
                append_table("Emitted modules on a CPU", MODULES, rows)


if __name__ == "__main__":
    main()
