"""Emission of captured modules: modes, dynamic sizes, structured results, layers that are none."""

import pytest
import torch
from torch import nn

from regauge.backends.to_torch import to_torch
from regauge.backends.torch_module.runtime import source_of
from regauge.frontends.capture import capture
from regauge.optimize import optimize


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.drop = torch.nn.Dropout(0.5)
        self.rnn = torch.nn.GRU(4, 5, batch_first=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, scale):
        self.calls += 1
        x = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        x, state = self.rnn(x)
        return {"x": x * scale[0], "rest": (state, [scale[1]["shift"] + x.mean()])}


@pytest.mark.parametrize("train", [False, True])
def test_captured_module_switches_modes_and_keeps_its_form(train):
    model = Normed().train(train)
    inputs, scale = torch.randn(2, 3, 6, 6), [torch.tensor(2.0), {"shift": torch.ones(3)}]
    graph = capture(model, (inputs,), {"scale": scale}, train=train, verify=False)
    module = to_torch(graph)
    assert module.training is train
    assert set(module.state_dict()) == set(model.state_dict())
    source = source_of(module)
    assert "nn.BatchNorm2d(4)" in source and "nn.GRU(4, 5, batch_first=True)" in source
    for mode in (True, False):
        module.train(mode), model.train(mode)
        torch.manual_seed(1)
        actual = module(inputs, scale=scale)
        torch.manual_seed(1)
        expected = model(inputs, scale=scale)
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dict(module.named_buffers()), dict(model.named_buffers()))


def test_dynamic_batch_survives_emission():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Unflatten(1, (2, 3)), torch.nn.Flatten()
    )
    graph = capture(model, (torch.randn(3, 4),), dynamic={"input": {0: "batch"}})
    module = to_torch(graph)
    other = torch.randn(7, 4)
    torch.testing.assert_close(module(other), model(other))
    again = capture(module, (torch.randn(3, 4),), dynamic={"input": {0: "batch"}})
    torch.testing.assert_close(to_torch(again)(other), model(other))


class _Ordered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 8)

    def forward(self, x):
        return self.linear(x).max(1), self.linear(x).sort(1), x.flatten()[: min(x.shape)]


def test_struct_sequences_are_returned_as_what_they_were():
    model = _Ordered()
    module = to_torch(capture(model, (torch.randn(3, 4),), dynamic={"x": {0: "batch"}}))
    x = torch.randn(5, 4)
    expected, actual = model(x), module(x)
    assert type(actual[0]) is torch.return_types.max and type(actual[1]) is torch.return_types.sort
    torch.testing.assert_close(tuple(actual[0]), tuple(expected[0]))
    torch.testing.assert_close(actual[1].values, expected[1].values)


class _ComputedBias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)

    def forward(self, x):
        one, two = torch.cat([self.first.bias, self.second.bias]).split([8, 8])
        linear = torch.nn.functional.linear
        return linear(x, self.first.weight, one) * linear(x, self.second.weight, two)


def test_a_layer_whose_bias_is_computed_is_no_layer():
    model, x = _ComputedBias(), torch.randn(3, 4)
    module = to_torch(capture(model, (x,)))
    torch.testing.assert_close(module(x), model(x))
    assert list(module.state_dict()) == list(model.state_dict())


class _Pair(torch.nn.Module):
    def forward(self, fixed, moving):
        return (torch.cos(fixed) - 2 * moving.sum(0)).expand(moving.shape[0], 6) - moving


class _OfPair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = _Pair()

    def forward(self, x, fixed):
        return self.pair(torch.relu(fixed), torch.tanh(x))


def test_arguments_keep_their_order_where_a_later_one_shows_a_dynamic_size():
    model = _OfPair()
    module = to_torch(capture(model, (torch.randn(3, 6), torch.randn(6)), dynamic={"x": {0: "batch"}}))
    inputs = torch.randn(6, 6), torch.randn(6)
    torch.testing.assert_close(module(*inputs), model(*inputs))


class _Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(attended.transpose(1, 2).reshape(batch, length, width))


class _Tied(nn.Module):
    """Layers that run before the head, which is defined last and tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(11, 16)
        self.pos = nn.Parameter(torch.randn(8, 16))
        self.layers = nn.ModuleList([_Attention(16, 2), _Attention(16, 2)])
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        x = self.tok(ids) + self.pos[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def _tied():
    model, ids = _Tied().eval(), torch.randint(0, 11, (2, 6))
    return model, capture(model, (ids,), dynamic={0: {1: "length"}})


def test_modules_stand_in_the_order_of_the_state_dict_with_tied_weights_too():
    model, graph = _tied()
    module = to_torch(graph)
    assert list(module.state_dict()) == list(model.state_dict())
    assert list(dict(module.named_children())) == ["tok", "layers", "head"]
    source = source_of(module)
    assert "self.pos[:ids.shape[1]]" in source and "# scale" not in source


def test_a_frozen_scale_is_explained_and_heads_are_called_so():
    _, graph = _tied()
    source = source_of(to_torch(optimize(graph, "prune{ratio=0.5,exclude=[layers.1.*]}")))
    assert source.count("# scale: 1/sqrt(8), of the head size before the cut\n") == 1
    assert "def __init__(self, out_features, heads, head_dim):" in source
    assert "self.heads, self.head_dim)" in source


class _Standardised(torch.nn.Conv2d):
    """Weights standardised by a batch norm in training mode, as BiT does it."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = torch.nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0)
        return torch.nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_a_cut_that_leaves_a_batch_norm_one_value_per_channel_is_an_error_of_ours():
    from regauge.frontends.capture import capture
    from regauge.ir.errors import EmitError
    from regauge.optimize import optimize

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), _Standardised(8, 8, 1), torch.nn.Conv2d(8, 2, 1))
    graph = capture(model, (torch.randn(2, 3, 5, 5),))
    optimize(graph, "prune{ratio=0.97, minimum=2}").to_torch()
    with pytest.raises(EmitError, match=r"batch_norm in 1 cannot run on the sizes it has: .*minimum="):
        optimize(graph, "prune{ratio=0.97}").to_torch()


class Computed(nn.Module):
    def forward(self, x):
        batch, length = x.shape[:2]
        x = x * (length / 2) / length**0.5 + length * 1.5 - 1 / batch
        return x.clamp(max=length / 4 + 1) + torch.full((1,), length / 2) + (batch / length - 0.25)


def test_numbers_computed_from_dynamic_sizes_keep_their_fractions():
    """Half of a length was written as ``length // 2``, as sizes are, and powers and factors were refused."""
    model = Computed()
    module = capture(model, (torch.randn(2, 4, 3),), dynamic={0: {0: "batch", 1: "length"}}).to_torch()
    for shape in [(2, 4, 3), (3, 7, 3), (5, 9, 3)]:
        x = torch.randn(shape)
        torch.testing.assert_close(module(x), model(x))


class Scaled(nn.Module):
    def forward(self, x):
        return torch.nn.functional.interpolate(x, scale_factor=1.7, recompute_scale_factor=True)


def test_sizes_behind_a_fraction_are_rounded_as_torch_rounds_them():
    model = Scaled()
    module = capture(model, (torch.randn(2, 3, 8),), dynamic={0: {2: "length"}}).to_torch()
    for length in (8, 11, 20):
        x = torch.randn(2, 3, length)
        torch.testing.assert_close(module(x), model(x))
