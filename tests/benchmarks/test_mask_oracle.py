"""The oracle itself: it accepts a correct cut, and rejects each kind of wrong one."""

import copy

import torch
from benchmarks.mask_oracle import KeptStatistics, kept_indices, masked_error, relative_error
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


def test_changed_values_are_no_box_of_the_original() -> None:
    model = cut(original(), [0, 1], [0, 1])
    model.second.weight.data[0, 0] += 1
    x = torch.randn(4, 5, dtype=torch.float64)
    assert masked_error(original(), model, lambda m: [m(x)])[1] == ["second.weight"]


def test_kept_indices_are_found_by_value() -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    found = kept_indices(tensor, tensor[[0, 3]][:, [1, 2, 5]])
    assert found is not None and [f.tolist() for f in found if f is not None] == [[0, 3], [1, 2, 5]]
    assert kept_indices(tensor, tensor[:, [2, 1]]) is None


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


def test_whole_numbers_are_compared_too() -> None:
    assert relative_error([torch.tensor([1, 2])], [torch.tensor([1, 2])]) == 0
    assert relative_error([torch.tensor([1, 3])], [torch.tensor([1, 2])]) > 0.1
