"""Layers of several blocks: the same form and ranks in all.

The links of a grouped convolution have as many groups; those of stacked matrices, of experts, are stacks of as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from regauge.ir.graph import Graph
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice, Form
from regauge.passes.factorization.problems import Problem


def choices_of(form: Form, problems: Sequence[Problem], graph: Graph, multiple: int) -> list[Choice]:
    """What a layer may become, whose blocks are ``problems``: costs and losses are those of all together."""
    each = [{replace(c, loss=0.0): c.loss for c in form.choices(problem, graph, multiple)} for problem in problems]
    found, count = [], len(problems)
    for first in each[0]:
        loss = sum(own[first] for own in each)
        found.append(replace(first, parameters=count * first.parameters, macs=count * first.macs, loss=loss))
    return found


def links_of(form: Form, problems: Sequence[Problem], numbers: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
    """The links of all blocks side by side, and the matrices [blocks, outputs, columns] that they multiply by.

    ``numbers`` are those of the choice.
    """
    found = [form.links(problem, numbers) for problem in problems]
    matrices = torch.stack([matrix for _, matrix in found])
    if len(found) == 1:
        return found[0][0], matrices
    links = []
    for parts in zip(*(links for links, _ in found), strict=True):
        if "groups" not in parts[0].attributes:
            links.append(replace(parts[0], weight=torch.stack([part.weight for part in parts])))
            continue
        groups = len(parts) * int(parts[0].attributes["groups"])
        weight = torch.cat([part.weight for part in parts])
        links.append(replace(parts[0], weight=weight, attributes={**parts[0].attributes, "groups": groups}))
    return links, matrices
