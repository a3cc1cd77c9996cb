"""Passes as dataclasses: names, options, their checks and their printed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.base import Context, Pass
from regauge.passes.catalog import as_passes
from regauge.passes.options import option
from regauge.passes.pipeline_text import parse_pipeline


@dataclass(frozen=True, kw_only=True)
class FoldAllConstants(Pass):
    """Fold constants.

    before -> after
    """

    rounds: int = option(3, "how often", at_least=1, at_most=9)
    share: float | None = None
    mode: Literal["fast", "full"] = "fast"
    names: tuple[str, ...] = ()
    keep: Mapping[str, int] = option(None, "per name")
    loud: bool = False

    def __post_init__(self) -> None:
        if self.keep is None:
            object.__setattr__(self, "keep", {})
        super().__post_init__()

    def call(self, graph: Graph, context: Context) -> Graph:
        return graph


def test_name_comes_from_the_class() -> None:
    assert FoldAllConstants.name == "fold-all-constants"
    assert FoldAllConstants.summary() == "Fold constants."


def test_a_summary_is_the_first_sentence_on_however_many_lines() -> None:
    @dataclass(frozen=True, kw_only=True)
    class FoldAsPublished(FoldAllConstants):
        """Fold constants (Some et
        al. 2024). Slowly.
        """

    assert FoldAsPublished.summary() == "Fold constants (Some et al. 2024)."


def test_values_are_brought_to_their_types() -> None:
    one = FoldAllConstants.from_options({"share": 1, "names": "a.*", "keep": {"x": 2}, "loud": True})
    assert (one.share, one.names, one.keep, one.loud) == (1.0, ("a.*",), {"x": 2}, True)
    assert isinstance(one.share, float)


def test_integers_serve_as_words() -> None:
    """Modules of a Sequential are called ``2``, which a pipeline reads as a number."""
    (one,) = (FoldAllConstants.from_options(stage.options) for stage in parse_pipeline("x{names=[2,head.*]}"))
    assert one.names == ("2", "head.*")
    assert FoldAllConstants(names=3).names == ("3",)  # type: ignore[arg-type]
    assert str(one) == 'fold-all-constants{names=["2",head.*],keep={}}'


def test_printed_form_holds_what_was_given() -> None:
    text = str(FoldAllConstants(rounds=5, names=("a", "b c")))
    assert text == 'fold-all-constants{rounds=5,names=[a,"b c"],keep={}}'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round": 2}, r"fold-all-constants has no option 'round': did you mean 'rounds'\? options are rounds, share"),
        ({"rounds": 0}, "must be at least 1 and at most 9, not 0"),
        ({"rounds": 2.5}, "'rounds' of fold-all-constants must be an integer, not 2.5"),
        ({"rounds": True}, "must be an integer, not True"),
        ({"share": "x"}, "must be a number, not 'x'"),
        ({"mode": "slow"}, "must be one of fast, full, not 'slow'"),
        ({"names": [None]}, "'names' of fold-all-constants must be a list of words, not None"),
        ({"names": [0.1]}, 'must be a list of words, not 0.1: put words that read otherwise in quotes, "0.1"'),
        ({"keep": 3}, r"must be a mapping \{name=value\}, not 3"),
        ({"loud": 1}, "must be true or false, not 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        FoldAllConstants.from_options(options)


@dataclass(frozen=True)
class Listing(Pass):
    """Name graphs.

    before -> after
    """

    names: list[str] = option(None, "which")
    kinds: set[str] | None = None

    def call(self, graph: Graph, context: Context) -> Graph:
        return graph


def test_options_may_be_lists_and_other_collections() -> None:
    assert Listing(names=["a", "b"], kinds={"c"}).names == ["a", "b"]
    assert Listing.from_options({"names": "a"}).names == ["a"]
    with pytest.raises(PassError, match="must be set"):
        Listing(names=[], kinds=["c"])  # type: ignore[arg-type]


def test_option_that_must_be_given() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy(FoldAllConstants):
        size: int

    with pytest.raises(PassError, match=r"needy needs the option 'size': write needy\{size=...\}"):
        Needy.from_options({})


def test_class_that_is_no_dataclass_is_refused() -> None:
    class Forgotten(FoldAllConstants):
        depth: int = 2

    with pytest.raises(PassError, match="Forgotten is not a dataclass: write @dataclass"):
        Forgotten()


def test_catalog_and_sequences() -> None:
    one = FoldAllConstants()
    passes = as_passes(["prune{ratio=0.5},prune{macs=0.5}", one])
    assert [p.name for p in passes] == ["prune", "prune", "fold-all-constants"] and passes[2] is one
    with pytest.raises(PassError, match=r"no pass is called 'prun': did you mean 'prune'\?"):
        as_passes("prun{ratio=0.5}")
    with pytest.raises(PassError, match=r"FoldAllConstants is the class of a pass: write FoldAllConstants\(\)"):
        as_passes(FoldAllConstants)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="passes are a text such as"):
        as_passes(3)  # type: ignore[arg-type]


def test_option_table() -> None:
    table = {info.name: info for info in FoldAllConstants.option_table()}
    assert table["rounds"] == ("rounds", "an integer", "3", "how often")
    assert table["mode"].kind == "one of fast, full"


def test_one_array_is_no_list_of_batches() -> None:
    """Its rows would be taken for batches, and told of as inputs of a wrong shape."""
    with pytest.raises(PassError, match=r"data is one array of shape \(5, 4\): give a list of batches"):
        list(Context(data=torch.zeros(5, 4)).batches())
    assert len(list(Context(data=[torch.zeros(5, 4)]).batches())) == 1


def test_no_data_is_told_apart_from_data_without_a_batch() -> None:
    with pytest.raises(PassError, match="it needs data: give batches"):
        list(Context().batches())
    with pytest.raises(PassError, match="data has no batch"):
        list(Context(data=[]).batches())
