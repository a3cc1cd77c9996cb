"""Batch norms captured in training mode: their new running statistics are states of the graph."""

import copy

import torch
from torch import nn

import regauge
from regauge.ir.running.interpret import Interpreter


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).train()


def test_running_statistics_are_states_and_the_model_keeps_its_own() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    graph = regauge.capture(model, (x,), train=True)
    torch.testing.assert_close(model.state_dict(), before)
    assert {s.name for s in graph.states} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    interpreter = Interpreter(graph)
    interpreter.run([x])
    model(x)
    for name, value in interpreter.states.items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)


def test_a_pruned_training_graph_trains() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    small = regauge.optimize(regauge.capture(model, (x,), train=True), "prune{ratio=0.5}")
    assert {s.name: tuple(s.after.shape) for s in small.states}["1.running_var"] == (4,)
    module = small.to_torch().train()
    mean = module.state_dict()["1.running_mean"].clone()
    module(x).sum().backward()
    assert not torch.equal(module.state_dict()["1.running_mean"], mean)
    assert all(p.grad is not None for p in module.parameters())
