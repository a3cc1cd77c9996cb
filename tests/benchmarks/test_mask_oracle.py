"""The oracle itself: it accepts a correct cut, and rejects each kind of wrong one."""

import copy

import torch
from benchmarks.mask_oracle import KeptStatistics, kept_entries, masked_error, relative_error
from torch import nn


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def original() -> Network:
    torch.manual_seed(0)
    model = Network(8).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def cut(model: Network, rows: list[int], columns: list[int]) -> Network:
    """``model`` with the hidden units ``rows`` kept where they are produced and ``columns`` where they are read."""
    small = Network(len(rows)).double()
    with torch.no_grad():
        small.first.weight.copy_(model.first.weight[rows])
        small.first.bias.copy_(model.first.bias[rows])
        small.norm.weight.copy_(model.norm.weight[rows])
        small.norm.bias.copy_(model.norm.bias[rows])
        small.second.weight.copy_(model.second.weight[:, columns])
        small.second.bias.copy_(model.second.bias)
    return small


def error(rows: list[int], columns: list[int]) -> float:
    x = torch.randn(4, 5, dtype=torch.float64)
    return masked_error(copy.deepcopy(original()), cut(original(), rows, columns), lambda m: [m(x)])[0]


def test_a_consistent_cut_is_exact() -> None:
    assert error([0, 2, 3, 7], [0, 2, 3, 7]) < 1e-12


def test_a_cut_that_differs_between_producer_and_consumer_is_wrong() -> None:
    assert error([0, 2, 3, 7], [0, 2, 3, 6]) > 1e-3


def test_another_scale_is_wrong() -> None:
    model = cut(original(), [0, 1], [0, 1])
    model.norm.eps = 0.5
    x = torch.randn(4, 5, dtype=torch.float64)
    assert masked_error(original(), model, lambda m: [m(x)])[0] > 1e-3


def test_changed_values_are_no_part_of_the_original() -> None:
    model = cut(original(), [0, 1], [0, 1])
    model.second.weight.data[0, 0] += 1
    x = torch.randn(4, 5, dtype=torch.float64)
    assert masked_error(original(), model, lambda m: [m(x)])[1] == ["second.weight"]


def test_kept_entries_are_found_by_value() -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    found = kept_entries(tensor, tensor[[0, 3]][:, [1, 2, 5]])
    assert found is not None and found.nonzero().tolist() == [[0, 1], [0, 2], [0, 5], [3, 1], [3, 2], [3, 5]]
    found = kept_entries(tensor, torch.stack([tensor[0, [1, 2]], tensor[1, [0, 5]]]))
    assert found is not None and found.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 5]]
    assert kept_entries(tensor, tensor[:, [1, 1]]) is None and kept_entries(tensor, tensor[:2] + 0.5) is None


def test_a_norm_written_out_centres_on_what_was_kept() -> None:
    masked = torch.randn(4, 6, dtype=torch.float64)
    masked[:, [1, 4]] = 0
    kept = masked[:, [0, 2, 3, 5]]

    def norm(x: torch.Tensor) -> torch.Tensor:
        y = x - x.mean(axis=-1, keepdim=True)  # type: ignore[call-overload]
        torch.testing.assert_close(torch.var_mean(x, -1)[0], x.var(-1))
        result: torch.Tensor = y / y.square().mean(-1, keepdim=True).sqrt()
        return result

    with KeptStatistics():
        actual = norm(masked)
    torch.testing.assert_close(actual[:, [0, 2, 3, 5]], norm(kept))
    assert not actual[:, [1, 4]].any()


def test_grouped_matrices_are_multiplied_in_double_precision() -> None:
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    with KeptStatistics():
        actual = torch.nn.functional.grouped_mm(x, weight, offs=torch.tensor([2, 5], dtype=torch.int32))
    torch.testing.assert_close(actual, torch.cat([x[:2] @ weight[0], x[2:] @ weight[1]]))


def test_a_norm_of_nothing_but_zeros_keeps_its_bias() -> None:
    norm = nn.LayerNorm(4)
    nn.init.ones_(norm.bias)
    with KeptStatistics():
        assert norm(torch.zeros(2, 4)).sum() == 8


def test_a_softmax_after_its_maximum_is_subtracted_sees_what_was_kept() -> None:
    """A kept entry that is the largest in every row is zero then, and a removed one is not."""
    masked = torch.randn(4, 5, dtype=torch.float64)
    masked[:, 3] = 9
    masked[:, 1] = 0
    kept = masked[:, [0, 2, 3, 4]]
    with KeptStatistics():
        for shifted in (masked - masked.max(dim=-1, keepdim=True).values, masked - masked.amax(-1, keepdim=True)):
            actual = torch.softmax(shifted, dim=-1)
            torch.testing.assert_close(actual[:, [0, 2, 3, 4]], torch.softmax(kept, dim=-1))
            assert not actual[:, 1].any()
        negative = torch.where(masked == 0, masked, -masked.abs())
        assert (negative.max(-1).values < 0).all(), "what was removed is no maximum"


class ChannelAttention(nn.Module):
    """Attention between the channels of each head, as XCiT has it."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(5, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        query, key, value = (part.permute(0, 2, 3, 1) for part in parts)  # example, head, channel, place
        mixed = torch.softmax(query @ key.mT, -1) @ value
        return self.out(mixed.permute(0, 3, 1, 2).flatten(2))


def test_a_softmax_over_channels_of_heads_sees_what_each_head_kept() -> None:
    torch.manual_seed(0)
    model = ChannelAttention(4, 6).double()
    kept = {0: [0, 2, 5], 1: [1, 2, 3], 3: [0, 4, 5]}  # no channel of the third head
    rows = [6 * head + channel for head, channels in kept.items() for channel in channels]
    x = torch.randn(2, 7, 5, dtype=torch.float64)

    def error(rows_of_values: list[int]) -> float:
        small = ChannelAttention(3, 3).double()
        with torch.no_grad():
            for name in ("query", "key", "value"):
                own, whole = getattr(small, name), getattr(model, name)
                places = rows_of_values if name == "value" else rows
                own.weight.copy_(whole.weight[places])
                own.bias.copy_(whole.bias[places])
            small.out.weight.copy_(model.out.weight[:, rows])
            small.out.bias.copy_(model.out.bias)
        return masked_error(copy.deepcopy(model), small, lambda m: [m(x)])[0]

    assert error(rows) < 1e-14
    assert error([1, *rows[1:]]) > 1e-3


class Weighted(nn.Module):
    """A weight-normalised layer and one after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(5, width))
        self.second = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_weight_norm_of_removed_rows_is_zero() -> None:
    torch.manual_seed(0)
    model, small = Weighted(8).double(), Weighted(3).double()
    rows = [1, 4, 6]
    with torch.no_grad():
        for mine, given in zip(small.first.parameters(), model.first.parameters(), strict=True):
            mine.copy_(given[rows])
        small.second.weight.copy_(model.second.weight[:, rows])
        small.second.bias.copy_(model.second.bias)
    x = torch.randn(4, 5, dtype=torch.float64)
    worst, strange = masked_error(model, small, lambda m: [m(x)])
    assert worst < 1e-12 and not strange


def test_results_of_norms_can_be_viewed() -> None:
    x = torch.randn(2, 6, 4).transpose(1, 2)
    x[..., 1] = 0
    norms = [nn.LayerNorm(6), nn.RMSNorm(6)]
    with KeptStatistics():
        for norm in norms:
            nn.init.constant_(norm.weight[1:2], 0)  # type: ignore[index]
            assert norm(x).view(2, 24).shape == (2, 24)


def test_equal_infinities_are_no_error_and_hide_none() -> None:
    infinity, least = float("inf"), torch.finfo(torch.float32).min
    for bound in (infinity, -infinity, least):
        assert relative_error([torch.tensor([1.0, bound])], [torch.tensor([1.0, bound])]) == 0
        assert relative_error([torch.tensor([1.1, bound])], [torch.tensor([1.0, bound])]) > 0.09
        assert relative_error([torch.tensor([bound, 1.0])], [torch.tensor([1.0, bound])]) > 0.9
    nan = torch.tensor([float("nan")])
    assert relative_error([nan], [nan]) == infinity


def test_whole_numbers_are_compared_too() -> None:
    assert relative_error([torch.tensor([1, 2])], [torch.tensor([1, 2])]) == 0
    assert relative_error([torch.tensor([1, 3])], [torch.tensor([1, 2])]) > 0.1
