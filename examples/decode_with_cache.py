"""Write greedily with a cache: a causal decoder that computes all positions becomes one that computes the new ones."""

import torch
import torch.nn.functional as F
from torch import nn

import regauge


class Decoder(nn.Module):
    """One block with a table of places, over 32 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(32, 64), nn.Embedding(48, 64)
        self.qkv, self.out, self.head = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.characters(tokens) + self.places(torch.arange(tokens.shape[1]))
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


def greedy(steps: regauge.Steps, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest tokens behind a prompt [batch, length], one after the other."""
    found = [prompt]
    for _ in range(count):
        (logits,) = steps(found[-1])  # the whole prompt first, then one token at a time
        found.append(logits[:, -1:].argmax(-1))
    return torch.cat(found, 1)


torch.manual_seed(0)
model = Decoder().eval()
prompt = torch.randint(0, 32, (2, 8))
graph = regauge.capture(model, (prompt,), dynamic={0: {0: "batch", 1: ("length", 1, 48)}})

wanted = prompt
for _ in range(16):  # every step computes all positions anew
    wanted = torch.cat([wanted, model(wanted)[:, -1:].argmax(-1)], 1)

cached = regauge.optimize(graph, "kv-cache")
print(cached.report)
print("the same text:", torch.equal(greedy(regauge.Steps(cached), prompt, 16), wanted))

texts = torch.randint(0, 32, (64, 48))
small = regauge.optimize(graph, "kv-quantize{bits=4},kv-cache", data=[texts])
print(small.report)  # bytes of the cache for each position, before and after
same = greedy(regauge.Steps(small), prompt, 16) == wanted
print(f"with a cache of 4 bits {float(same[:, 8:].float().mean()):.0%} of the characters are the same")
