"""Coupling groups and the choice among them, on structures written by hand."""

import itertools

import numpy as np
import pytest

from whet.errors import ModelError, SpecError
from whet.graph.groups import Groups
from whet.graph.selection import choose, eligible
from whet.graph.structure import Structure
from whet.specs import Channel, Global, Isomorphic, Prune


def chain(widths=(3, 16, 8, 4)):
    """Linear layers l0, l1, … with biases, from an input to an output, read with two examples."""
    s = Structure()
    x = s.fresh((2, widths[0]), "an input of the model")
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        weight = s.hold(f"l{i}.weight", (after, before), itemsize=4, is_parameter=True)
        bias = s.hold(f"l{i}.bias", (after,), itemsize=4, is_parameter=True)
        x = s.linear(x, weight, bias, layer=f"l{i}")
    s.fix(x, "an output of the model")
    s.ids.solve()
    return Groups(s, rows=2)


def test_families_of_a_chain() -> None:
    groups = chain()
    assert [(f.name, f.kind, len(f), f.width, f.layer) for f in groups.families] == [
        ("l0.weight", "channel", 16, 1, "l0"),
        ("l1.weight", "channel", 8, 1, "l1"),
    ]
    first = groups.families[0]
    assert [(m.tensor, m.axis, m.contracted) for m in first.members] == [
        ("l0.weight", 0, False),
        ("l0.bias", 0, False),
        ("l1.weight", 1, True),
    ]
    assert (first.parameters, first.macs, first.bytes) == (3 + 1 + 8, 3 + 8, 48)
    assert {(f.tensor, f.axis, f.reason) for f in groups.fixed} == {
        ("l0.weight", 1, "an input of the model"),
        ("l2.weight", 0, "an output of the model"),
        ("l2.bias", 0, "an output of the model"),
    }


def test_sizes_with_and_without_groups() -> None:
    groups = chain()
    assert groups.size() == (whole := groups.size(groups.gone()))
    assert (whole.macs, whole.parameters) == (3 * 16 + 16 * 8 + 8 * 4, 3 * 16 + 16 * 8 + 8 * 4 + 28)
    gone = groups.gone([groups.named("l0.weight").roots[:6]])
    left = groups.size(gone)
    assert (left.macs, left.parameters) == (3 * 10 + 10 * 8 + 8 * 4, 3 * 10 + 10 * 8 + 8 * 4 + 22)
    assert whole.parameters - left.parameters == 6 * groups.families[0].parameters
    kept = groups.kept(gone)
    assert kept["l0.weight"][0].tolist() == list(range(6, 16)) == kept["l1.weight"][1].tolist() and "l2.weight" not in kept
    assert groups.is_empty(gone) is None and groups.is_empty(groups.gone([groups.families[0].roots])) == "l0.weight"


def test_groups_print_what_leaves_together_and_what_stays() -> None:
    text = str(chain())
    assert "l0.weight  channel      16               12         11  l0.weight[0], l0.bias[0], l1.weight[1]" in text
    assert "stays: l2.weight[0], 4 positions: an output of the model" in text
    html = chain()._repr_html_()
    assert "<table" in html and "an output of the model" in html
    plain = chain().to_dict()
    assert plain["families"][1]["members"][0]["positions"][:2] == [[0], [1]] and len(plain["fixed"]) == 3


def counts(groups, spec, scores=None):
    families = eligible(groups, spec).families
    scores = scores or [np.arange(len(f), dtype=float) for f in families]
    gone = choose(groups, families, scores, spec)
    return {f.name: np.flatnonzero(gone[f.roots]).tolist() for f in families}


def test_the_lowest_scores_leave_and_ties_go_by_position() -> None:
    groups = chain()
    scores = [np.asarray([5.0] * 15 + [1.0]), np.asarray([3.0, 1, 2, 1, 5, 6, 7, 8])]
    assert counts(groups, Prune(0.25, granularity=Channel(), round_to=1), scores) == {
        "l0.weight": [0, 1, 2, 15],
        "l1.weight": [1, 3],
    }


@pytest.mark.parametrize(("sparsity", "left"), [(0.5, (8, 8)), (0.3, (8, 8)), (0.2, (16, 8)), (0.9, (8, 8))])
def test_what_is_left_is_a_multiple_of_round_to(sparsity, left) -> None:
    groups = chain((3, 16, 8, 4))
    try:
        found = counts(groups, Prune(sparsity, granularity=Channel(), round_to=8))
    except ModelError:
        found = {"l0.weight": [], "l1.weight": []}
    assert (16 - len(found["l0.weight"]), 8 - len(found["l1.weight"])) == left


def test_a_width_that_is_no_multiple_becomes_one() -> None:
    assert len(counts(chain((3, 20, 30, 4)), Prune(0.2, granularity=Channel()))["l0.weight"]) == 4


def test_nothing_to_remove_is_an_error() -> None:
    with pytest.raises(ModelError, match="round_to=8"):
        counts(chain((3, 8, 8, 4)), Prune(0.5, granularity=Channel()))


@pytest.mark.parametrize("what", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_budget_is_met_and_not_by_far(what, share) -> None:
    groups = chain((8, 64, 64, 4))
    spec = Prune(granularity=Channel(), round_to=1, **{what: share})
    families = eligible(groups, spec).families
    gone = choose(groups, families, [np.arange(64.0)] * 2, spec)
    left, whole = getattr(groups.size(gone), what), getattr(groups.size(), what)
    assert left <= share * whole and left > (share - 0.04) * whole
    count = Prune(granularity=Channel(), round_to=1, **{what: int(share * whole)})
    assert getattr(groups.size(choose(groups, families, [np.arange(64.0)] * 2, count)), what) == left


def test_with_rounding_layers_take_back_what_the_budget_allows() -> None:
    """Both hidden layers step from 64 to 56 at once; at 90 % of the MACs one of them need not."""
    groups = chain((8, 64, 64, 4))
    found = counts(groups, Prune(macs=0.9, granularity=Channel(), round_to=8), [np.arange(64.0), np.arange(64.0) ** 2])
    assert sorted(map(len, found.values())) == [0, 8]


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ModelError, match="removing all that can leave gives 8 of 208"):
        counts(chain(), Prune(macs=0.01, granularity=Channel(), round_to=1))
    with pytest.raises(SpecError, match="has 208 macs and fits"):
        counts(chain(), Prune(macs=300, granularity=Channel()))


def test_global_ranks_layers_together_and_isomorphic_only_those_built_alike() -> None:
    groups = chain((3, 16, 16, 4))
    scores = [np.linspace(0.1, 0.2, 16), np.geomspace(0.01, 10, 16)]
    found = counts(groups, Prune(0.5, granularity=Channel(), round_to=1, allocation=Global()), scores)
    assert len(found["l0.weight"]) + len(found["l1.weight"]) == 16 and len(found["l1.weight"]) > len(found["l0.weight"])
    alike = counts(groups, Prune(0.5, granularity=Channel(), round_to=1, allocation=Isomorphic()), scores)
    assert alike == found  # both layers are built alike here


def test_keep_and_include_name_the_layers_whose_outputs_stay() -> None:
    groups = chain()
    kept = eligible(groups, Prune(0.5, granularity=Channel(), keep="l0"))
    assert [f.name for f in kept.families] == ["l1.weight"] and ("l0", "in keep") in kept.skipped
    included = eligible(groups, Prune(0.5, granularity=Channel(), include="l0"))
    assert [f.name for f in included.families] == ["l0.weight"] and ("l1", "not in include") in included.skipped
    assert ("l2", "an output of the model") in included.skipped
