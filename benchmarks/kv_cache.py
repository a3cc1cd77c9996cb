"""What caches of decoders take for each position, and the perplexity that is left, without training.

    python benchmarks/kv_cache.py [--only NAME ...] [--examples 128] [--steps] [--time] [--write]

char_gpt      a table of places, six heads of keys and values to six of queries (benchmarks/char_gpt.py)
char_llama    rotary positions, two heads of keys and values to six of queries (benchmarks/char_llama.py)

`--steps` also compares what the graphs with caches give step by step with what the whole sequence gives at once.
`--time` measures one step at the last position of a window in place of this, beside all positions at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import char_gpt, char_llama
from benchmarks.report import append_table, environment
from regauge.backends.latency import measure
from regauge.ir.states import Steps
from regauge.passes.decoding.cache_bytes import cache_bytes

HEADS = ["network", "passes", "bytes per position", "perplexity", "change"]
QUANTIZED = [
    "kv-quantize{bits=8}",
    "kv-quantize{bits=4}",
    "kv-quantize{bits=2}",
    "kv-quantize{bits=2,method=rotated}",
    "kv-quantize{bits=2,predict=true}",
    "kv-quantize{bits=4,method=coupled}",
    "kv-quantize{bits=2,method=coupled}",
    "kv-quantize{bits=1,method=coupled}",
    "kv-quantize{bytes=0.14}",
    "kv-quantize{bytes=0.06,method=coupled}",
    "kv-quantize{bits=2,method=kivi}",
    "kv-quantize{bits=2,method=gear}",
    "kv-quantize{bits=16,bytes=0.2,method=cskv}",
    "kv-quantize{bytes=0.11,method=cskv}",
    "kv-quantize{bytes=0.0625,method=cskv}",
    "kv-quantize{bits=2,bytes=0.0625,method=cskv}",
]
LATENTS = [f"kv-latent{{bytes={share}{way}}}" for share in (0.5, 0.25) for way in ("", ",joint=false,widths=2")]
LATENTS += [f"kv-latent{{bytes={share},method={way}}}" for share in (0.5, 0.25) for way in ("elitekv", "matryoshka")]
LATENTS += [f"kv-latent{{bytes={share},method=xkv,layers={layers}}}" for share in (0.5, 0.25) for layers in (2, 4)]
PASSES = {
    "char_gpt": [
        "kv-latent{bytes=0.75}",
        *LATENTS,
        *(f"kv-latent{{bytes={share},joint=true,group={group}}}" for share in (0.5, 0.25) for group in (2, 3)),
        *QUANTIZED,
        "kv-latent{bytes=0.75},kv-quantize{bits=4}",
    ],
    "char_llama": [
        "kv-latent{bytes=0.75}",
        *LATENTS,
        "kv-latent{bytes=0.5,joint=false}",
        "kv-latent{bytes=0.5,joint=true,group=1}",
        *QUANTIZED,
        "kv-latent{bytes=0.75},kv-quantize{bits=4}",
    ],
}

TIME_HEADS = ["network", "passes", "positions a run", "torch, ms", "onnxruntime, ms"]
TIMED = {
    "char_gpt": ["kv-latent{bytes=0.5}", "kv-quantize{bits=8}", "kv-quantize{bits=4}"],
    "char_llama": ["kv-latent{bytes=0.5,joint=false}", "kv-latent{bytes=0.5}", "kv-quantize{bits=8}"],
}


def captured(name: str, windows: torch.Tensor) -> tuple[Any, Any]:
    """The trained model and its graph."""
    model = {"char_gpt": char_gpt, "char_llama": char_llama}[name].trained()
    dynamic = {0: {0: "batch", 1: ("length", 1, char_gpt.CONTEXT)}}
    return model, regauge.capture(model, (windows[:2],), dynamic=dynamic)


def rows(name: str, specs: list[str], examples: int, steps: bool) -> Iterator[list[str]]:
    windows = char_gpt.calibration_windows(examples)
    model, graph = captured(name, windows)
    whole = char_gpt.perplexity(model)
    before = cache_bytes(regauge.optimize(graph, "kv-cache"))
    yield [name, "kv-cache", f"{before:.0f}", f"{whole:.3f}", ""]
    for passes in specs:
        found = regauge.optimize(graph, passes, data=[(part,) for part in windows.split(32)])
        cached = regauge.optimize(found, "kv-cache")
        left, after = char_gpt.perplexity(found.to_torch().eval()), cache_bytes(cached)
        size = f"{after:.0f} ({after / before:.0%})"
        yield [name, f"{passes},kv-cache", size, f"{left:.3f}", f"{left / whole - 1:+.1%}"]
        if steps:
            print(
                f"greatest difference of logits step by step: {difference(found, cached, windows[:4]):.1e}", flush=True
            )


def difference(whole: Any, cached: Any, windows: torch.Tensor) -> float:
    """Of logits, where the first 100 positions are computed at once and the others one by one."""
    (wanted,), run = whole.run(windows), Steps(cached)
    counts = [100, *(1 for _ in range(windows.shape[1] - 100))]
    found = torch.cat([run(part)[0] for part in windows.split(counts, 1)], 1)
    return float((wanted - found).abs().max())


def times(name: str, examples: int) -> Iterator[list[str]]:
    """Of all positions of one window at once, and of the last one with the others in caches."""
    windows = char_gpt.calibration_windows(examples)
    _, graph = captured(name, windows)
    window = windows[:1]
    yield [name, "", str(window.shape[1]), *milliseconds(graph, [window])]
    for passes in ("", *TIMED[name]):
        spec = f"{passes},kv-cache" if passes else "kv-cache"
        run = Steps(regauge.optimize(graph, spec, data=[(part,) for part in windows.split(32)]))
        run(window[:, :-1])
        yield [name, spec, "1", *milliseconds(run.graph, [window[:, -1:], *(run.states or [])])]


def milliseconds(graph: Any, inputs: list[torch.Tensor]) -> list[str]:
    """In torch and in onnxruntime, processor time of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = regauge.load(graph.to_onnx(Path(folder) / "graph.onnx"))
        return [f"{measure([own], inputs)[0].milliseconds:.2f}" for own in (graph, loaded)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PASSES), help="names of networks")
    parser.add_argument("--passes", nargs="*", help="instead of those above")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for name in options.only:
        for row in (
            times(name, options.examples)
            if options.time
            else rows(name, options.passes or PASSES[name], options.examples, options.steps)
        ):
            print("  ".join(row), flush=True)
            found.append(row)
    print(environment())
    if options.write and options.time:
        note = "`python benchmarks/kv_cache.py --time`: processor time of one thread, one sequence, median of runs."
        append_table("Time of a decoding step", TIME_HEADS, found, note)
    elif options.write:
        note = (
            f"`python benchmarks/kv_cache.py`: {options.examples} windows of text; float32 where nothing else is said."
        )
        append_table("Caches of keys and values, no fine-tuning", HEADS, found, note)


if __name__ == "__main__":
    main()
