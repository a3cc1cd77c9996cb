"""Distillation: formulae by hand, features of different widths through the cut, and training with it."""

import math
import warnings

import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, digits, train
from regauge.ir.dims.resize import kept_indices
from regauge.training import Distillation, feature_distance, soft_cross_entropy


def test_divergence_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])  # 1/2, 1/2; 3/4, 1/4 at T=2
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert float(soft_cross_entropy(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)
    assert float(soft_cross_entropy(student.T[None], teacher.T[None], 2.0, axis=1)) == pytest.approx(expected, rel=1e-5)


def test_feature_distance_by_hand() -> None:
    student, teacher = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert float(feature_distance(student, teacher)) == pytest.approx(8 / 25)
    assert float(feature_distance(student, teacher, normalised=False)) == 4


def test_indices_kept_by_cuts_one_after_the_other() -> None:
    graph = captured(convolutional())
    once = regauge.resize(graph, {"3.weight:0": range(1, 32, 2)})
    twice = regauge.resize(once, {"3.weight:0": [0, 3]})
    ((dim, kept),) = kept_indices(graph, twice).items()
    assert (dim.name, kept.tolist()) == ("3.weight:0", [1, 7])
    with pytest.raises(regauge.RegaugeError, match="was not made from"):
        kept_indices(once, graph)


def test_a_cut_that_keeps_the_features_exactly_is_at_distance_zero() -> None:
    """A cut of the layer behind changes nothing in the layer before: its kept channels are the teacher's own."""
    model = convolutional().eval()
    graph = captured(model)
    small = regauge.resize(graph, {"3.weight:0": [1, 5, 30]})
    distil = Distillation(model, small.to_torch().eval(), graph, small, features=["3"], logits=0.0)
    images = digits()[2][:8]
    assert distil(distil.student(images), images).item() == 0
    teacher_only = Distillation(model, small.to_torch(), features=["3"])
    with pytest.raises(regauge.RegaugeError, match=r"'3' gives .*give both graphs"):
        teacher_only(teacher_only.student(images), images)


def test_names_of_values_name_the_module_that_gives_them() -> None:
    model = convolutional()
    graph = captured(model)
    by_value = Distillation(model, convolutional(), graph, graph, features=["conv_1"])
    assert by_value._pairs == {"3": "3"}
    with pytest.raises(regauge.RegaugeError, match="input is not what one module gives: name the path of a module"):
        Distillation(model, convolutional(), graph, graph, features=["input"])
    with pytest.raises(regauge.RegaugeError, match="has no module 'nowhere'"):
        Distillation(model, convolutional(), features=["nowhere"])


def test_a_module_that_took_a_norm_in_is_not_compared_with_itself() -> None:
    """In silence the student's batch norm was held against the teacher's convolution."""
    model = convolutional().eval()
    graph = captured(model)
    small = regauge.optimize(graph, "simplify")
    with pytest.raises(regauge.RegaugeError, match="'0' gives batch_norm in the student and conv in the teacher"):
        Distillation(model, small.to_torch(), graph, small, features=["0"])
    distil = Distillation(model, small.to_torch().eval(), graph, small, features={"0": "1"}, logits=0.0)
    images = digits()[2][:8]
    assert distil(distil.student(images), images).item() < 1e-10


def test_what_stands_for_a_removed_last_block_is_compared() -> None:
    """The result of a graph keeps its name when the block that gave it is gone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 8)
    graph = regauge.capture(model, (x,))
    small = regauge.optimize(graph, "depth{blocks=1,include=[layers.2],compensate=false}")
    distil = Distillation(model, small.to_torch().eval(), graph, small, features=["layers.1"], logits=0.0)
    assert distil(distil.student(x), x).item() < 1e-10


def test_a_teacher_that_is_left_in_training_mode_is_told_once() -> None:
    """Its batch norms take the statistics of what the student is trained on."""
    teacher, x = convolutional().train(), torch.rand(4, 1, 8, 8)
    distil = Distillation(teacher, convolutional())
    with pytest.warns(regauge.RegaugeWarning, match=r"training mode, where 1 \(BatchNorm2d\).*teacher.eval\(\)"):
        distil(distil.student(x), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distil(distil.student(x), x)


def test_features_follow_the_teacher_after_training_with_them() -> None:
    teacher = convolutional()
    train(teacher, 150)
    graph = captured(teacher)
    small = regauge.optimize(graph, "prune{macs=0.3}")
    student = small.to_torch()
    distil = Distillation(teacher, student, graph, small, features={"4": "4", "7": "7"}, temperature=4.0)
    images, labels, held_out, _ = digits()
    before = distil(student(held_out), held_out).item()
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    student.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = torch.randint(len(images), (64,), generator=generator)
        logits = student(images[batch])
        (nn.functional.cross_entropy(logits, labels[batch]) + distil(logits, images[batch])).backward()
        optimizer.step()
        optimizer.zero_grad()
    student.eval()
    assert distil(student(held_out), held_out).item() < 0.3 * before
    assert accuracy(student) > 0.9
    assert all(parameter.grad is None for parameter in teacher.parameters())
    distil.remove()
    assert not teacher[4]._forward_hooks
