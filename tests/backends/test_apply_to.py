"""In-place surgery on small modules of every kind: what works, what is searched, what is refused and restored."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regauge.backends.apply_to import apply_to
from regauge.frontends.capture import capture
from regauge.ir.dims.resize import resize
from regauge.ir.errors import EmitError
from regauge.ir.running.interpret import run
from regauge.optimize import optimize


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.group_norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = self.up(self.group_norm(self.deep(x)))
        return self.head(x.mean((2, 3)))


class Heads(nn.Module):
    """Attention that bakes its sizes in as attributes."""

    def __init__(self, width=24, heads=4):
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.inner = width
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).split(self.inner, dim=-1)
        shape = (batch, length, self.num_heads, self.head_dim)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.inner))


class Fixed(nn.Module):
    """A size written into forward: no attribute can express another."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).reshape(-1, 8))


def _cut(graph, name=None):
    chosen = [g for g in graph.groups() if g.free and (name is None or g.dim.name.startswith(name))]
    assert chosen
    return resize(graph, {g.dim: range(max(1, g.dim.size // 2)) for g in chosen})


def _same(graph, model, *inputs):
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), run(graph, list(inputs))[0], rtol=1e-4, atol=1e-5)


def test_layers_of_every_kind_get_their_sizes():
    model, x = ConvNet(), torch.randn(2, 3, 6, 6)
    cut = _cut(capture(model, (x,)))
    assert apply_to(cut, model) is model
    _same(cut, model, x)
    assert model.first.out_channels == model.norm.num_features == model.first.weight.shape[0] < 16
    assert model.deep.groups == model.deep.in_channels == model.first.out_channels
    assert model.group_norm.num_channels == model.first.out_channels
    assert model.head.in_features == model.up.out_channels
    model.train()(torch.randn(2, 3, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_integer_attributes_are_found():
    model, x = Heads(), torch.randn(2, 5, 24)
    graph = capture(model, (x,))
    heads = next(g for g in graph.groups() if g.free and g.dim.size == 4)
    cut = resize(graph, {heads.dim: [0, 2]})
    apply_to(cut, model)
    assert (model.num_heads, model.inner, model.head_dim) == (2, 12, 6)
    _same(cut, model, x)


def test_a_refusal_restores_the_model_and_says_why():
    model, x = Fixed(), torch.randn(2, 6)
    before = {name: parameter for name, parameter in model.named_parameters()}
    expected = model(x)
    model.train()
    cut = _cut(capture(model, (x,), verify=False), "a.weight")
    with pytest.raises(EmitError, match=r"Fixed cannot express.*in the model itself \(Fixed\).*to_torch\(\)"):
        apply_to(cut, model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.a.out_features == 8 and model.training
    torch.testing.assert_close(model(x), expected)


class Joined(Heads):
    """Attention whose heads, taken together, must be as wide as its input."""

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        shape = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = Joined(), nn.LayerNorm(24)

    def forward(self, x):
        return x + self.attention(self.norm(x))


def test_a_refusal_names_the_module_its_dims_and_what_to_exclude():
    model, x = nn.Sequential(nn.Linear(6, 24), Block(), Block(), nn.Linear(24, 2)), torch.randn(2, 5, 6)
    graph = capture(model, (x,))
    with pytest.raises(EmitError) as caught:
        apply_to(optimize(graph, "prune{ratio=0.5,exclude=0.weight}"), model)
    message = str(caught.value)
    assert "in 1.attention (Joined), where 1.attention.qkv.weight:0.0: 4 -> 2; 1.attention.qkv.weight:0.1: 6" in message
    option = re.search(r"exclude=(\[.*?\])", message)[1]
    assert option == "[" + ",".join(f'"*.attention.qkv.weight:0.{place}"' for place in (0, 1, 5)) + "]"
    small = optimize(graph, f'prune{{ratio=0.5,exclude={option[:-1]},"0.weight"]}}')
    apply_to(small, model)
    _same(small, model, x)


def test_a_copy_leaves_the_model_alone():
    model, x = ConvNet(), torch.randn(2, 3, 6, 6)
    cut = _cut(capture(model, (x,)))
    copied = apply_to(cut, model, inplace=False)
    assert copied is not model and model.first.out_channels == 16
    _same(cut, copied, x)


def test_unchanged_parameters_stay_the_same_objects():
    model, x = ConvNet(), torch.randn(2, 3, 6, 6)
    head = model.head.bias
    apply_to(_cut(capture(model, (x,)), "first"), model)
    assert model.head.bias is head


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)))

    model, ids = Tied(), torch.tensor([[1, 2, 10]])
    cut = _cut(capture(model, (ids,)), "embed")
    apply_to(cut, model)
    assert model.head.weight is model.embed.weight and model.embed.embedding_dim == 4
    _same(cut, model, ids)


def test_recurrent_layers_get_their_sizes():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 8, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model, x = Recurrent(), torch.randn(2, 4, 5)
    graph = capture(model, (x,))
    cut = _cut(graph)
    apply_to(cut, model)
    _same(cut, model, x)


def test_a_model_without_the_graphs_tensors_is_refused():
    graph = capture(Fixed(), (torch.randn(2, 6),))
    with pytest.raises(EmitError, match="has no tensor 'a.weight'"):
        apply_to(graph, ConvNet())


def test_removed_blocks_are_named() -> None:
    """The message spoke of sizes that the code could not express, of a graph that was cut as well."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    graph = optimize(capture(model, (torch.randn(2, 3, 8),)), "prune{ratio=0.5,score=l2},depth{blocks=1}")
    with pytest.raises(EmitError, match=r"it still has layers\.\d, and the graph does not"):
        graph.apply_to(model)


@pytest.mark.parametrize("bias", [True, False])
def test_rewritten_graphs_are_refused_in_words(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()).eval()
    nn.init.uniform_(model[1].running_mean)
    graph = optimize(capture(model, (torch.randn(1, 3, 8, 8),)), "simplify")
    with pytest.raises(EmitError, match="as simplify"):
        graph.apply_to(model)
