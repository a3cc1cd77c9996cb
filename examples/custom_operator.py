"""A custom operator with its axis rule: one line says what pruning may do with it, and pruning goes through it."""

import torch

import regauge


@torch.library.custom_op("example::gated_mix", mutates_args=())
def gated_mix(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Per channel, sigmoid(gate) says how much of a mix of all tokens takes the place of x."""
    return torch.lerp(x, weight @ x, torch.sigmoid(gate))


@gated_mix.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def semantics(x, gate, weight):  # type: ignore[no-untyped-def]
    return torch.lerp(x, weight @ x, torch.sigmoid(gate))


# All tokens s are mixed, so they stay; channels c are carried along, and may be cut together with their gates.
regauge.register_operator(
    regauge.Operator(
        name="gated_mix",
        evaluate=semantics,
        rule="... s c, c, s s -> ... s c ; whole s",
        aten={"example::gated_mix": None},
        macs=lambda call: call.out() * call.size(2, 1),
        samples=lambda: [regauge.sample(torch.randn(2, 5, 4), torch.randn(4), torch.randn(5, 5))],
    )
)
regauge.check_operator("gated_mix")  # does the operator do what its rule says? A wrong rule raises here, by its samples


class Mixer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 32), torch.nn.Linear(32, 4)
        self.gate, self.mix = torch.nn.Parameter(torch.randn(32)), torch.nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.ops.example.gated_mix(torch.relu(self.first(x)), self.gate, self.mix)
        return self.last(mixed)


tokens = torch.randn(2, 6, 8)
graph = regauge.capture(Mixer(), (tokens,))
small = regauge.optimize(graph, "prune{ratio=0.5}")
print(graph.explain("mix:0"))
print(small.report)
print({name: tuple(p.shape) for name, p in small.to_torch().named_parameters()})
