"""A decoder larger than the memory: capture, analysis, and pruning on data with repair, stage by stage.

    python benchmarks/big_decoder.py [--width 4096] [--layers 32] [--params 0.8] [--folder DIR]

The model is built from its sizes alone (the layout of Llama, bfloat16), with random weights in a file that is mapped
into memory. Shown are seconds and the peak of anonymous memory of each stage: pages of mapped files are not counted,
since the system drops them when it needs room. At the default size the weights take 13 GB of disk, and the pruned ones
as much again less what was cut. Needs torch, numpy, sympy and networkx.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 32000
MIB = 1 << 20


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.view(batch, length, self.heads, self.size).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.size))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        self.self_attn, self.mlp = Attention(width, heads), MLP(width, hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.size = width // heads
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, hidden, heads) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        rates = 10000.0 ** (-torch.arange(0, self.size, 2, dtype=torch.float32) / self.size)
        angles = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float32), rates)
        both = torch.cat([angles, angles], -1)
        cos, sin = both.cos().to(x.dtype), both.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def fill_matrix(matrix: torch.Tensor, generator: torch.Generator) -> None:
    """A product of rank 64 with a tenth of noise, piece by piece: some features can stand in for others."""
    columns, rank = matrix.shape[1], 64
    right = torch.randn(rank, columns, generator=generator).mul_((0.9 / (rank * columns)) ** 0.5)
    for part in matrix.split(max(1, (1 << 24) // columns)):
        made = torch.randn(part.shape, generator=generator).mul_((0.1 / columns) ** 0.5)
        part.copy_(made.addmm_(torch.randn(len(part), rank, generator=generator), right))


def mapped(model: Decoder, path: Path, *, fill: bool) -> Decoder:
    """The model, built on the meta device, with its parameters in a mapped file; random where it is to be filled."""
    count = sum(parameter.numel() for parameter in model.parameters())
    flat = torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16)
    generator, offset = torch.Generator().manual_seed(0), 0
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        own = flat[offset : offset + parameter.numel()].view(parameter.shape)
        if parameter.dim() == 1:
            own.fill_(1.0)
        elif fill:
            fill_matrix(own, generator)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(own, requires_grad=False))
        offset += parameter.numel()
    return model


def anonymous() -> int:
    """Bytes of memory of this process that no file backs (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print the seconds that the block takes and the peak of anonymous memory in it."""
    peak, over = [anonymous()], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    print(f"{name:32}  {seconds:8.1f} s  {max(peak[0], anonymous()) / MIB:8.0f} MiB anonymous", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--params", type=float, default=0.8)
    parser.add_argument("--analyse-only", action="store_true", help="zero weights: a file with holes takes no disk")
    parser.add_argument("--folder", type=Path, help="where the weights lie (default: the folder for temporary files)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.folder:
            os.environ["TMPDIR"] = tempfile.tempdir = folder
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    import regauge
    from regauge.ir.cost import figures

    hidden = options.width * 11008 // 4096 // 32 * 32
    with stage("build"):
        with torch.device("meta"):
            model = Decoder(options.width, hidden, options.width // 128, options.layers, options.vocabulary)
        model = mapped(model.bfloat16(), folder / "weights", fill=not options.analyse_only).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"width {options.width}, hidden {hidden}, {options.layers} layers: {count / 1e9:.2f} G parameters in bfloat16"
    )
    generator = torch.Generator().manual_seed(1)
    shape = (options.sequences, options.length)
    tokens = torch.randint(0, options.vocabulary, shape, generator=generator)
    with stage("capture"):
        graph = regauge.capture(model, (tokens[:2, :16],), dynamic={0: {0: "batch", 1: "length"}})
    with stage("analysis"):
        groups = [group for group in graph.copy().groups() if group.free]  # a copy has not been analysed yet
    print(f"{len(graph)} nodes, {len(groups)} Dims that can be cut")
    if options.analyse_only:
        return
    with stage(f"prune to {options.params}, repair"):
        small = regauge.optimize(
            graph, f"prune{{params={options.params},compensate=true}}", data=[(row[None],) for row in tokens]
        )
    print(small.report)
    print(f"{figures(small).parameters / count:.3f} of the parameters are left")
    held_out = torch.randint(0, options.vocabulary, (2, options.length), generator=generator)
    with stage("compare on unseen tokens"):
        (before,), (after,) = graph.run(held_out), small.run(held_out)
        error = float((after.float() - before.float()).square().sum() / before.float().square().sum())
    print(f"squared error of the logits {error:.3f} of their square")


if __name__ == "__main__":
    main()
