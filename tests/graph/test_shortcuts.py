"""Which operations a shortcut leads around, and which blocks leave."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import ModelError, SpecError
from whet.graph.block_choice import choose_blocks, eligible_blocks
from whet.graph.groups import Size
from whet.graph.shortcuts import ADD, OTHER, PASS, Block, Flow, branches, shortcut
from whet.numerics.layers import influence, output_error, vectors
from whet.specs import Layer, OutputChange, Prune


def flows(*rows):
    """Rows of (name, reads, role), all of one shape."""
    return [Flow(name, tuple(reads.split()), role, (2, 4)) for name, reads, role in rows]


BLOCK = flows(("f", "x", OTHER), ("y", "x f", ADD), ("z", "y", PASS))


def test_a_shortcut_is_a_path_of_additions_and_what_keeps_the_shape():
    assert shortcut(BLOCK, "x", "z") == ("y",)
    assert shortcut(BLOCK, "x", "f") == ()
    two = flows(("n", "x", PASS), ("f", "n", OTHER), ("y", "f x", ADD), ("g", "y", OTHER), ("z", "y g", ADD))
    assert shortcut(two, "x", "z") == ("y", "z")


def test_a_norm_in_the_shortcut_is_passed_and_a_convolution_is_not():
    post = flows(("f", "x", OTHER), ("y", "x f", ADD), ("n", "y", PASS), ("g", "n", OTHER), ("z", "n g", ADD))
    assert shortcut(post, "x", "z") == ("y", "z")
    down = flows(("d", "x", OTHER), ("f", "x", OTHER), ("y", "d f", ADD))
    assert shortcut(down, "x", "y") == ()


def test_what_is_added_must_be_worked_out_of_the_input():
    assert shortcut(flows(("y", "x e", ADD)), "x", "y") == ()
    assert shortcut(flows(("y", "x x", ADD)), "x", "y") == ()
    assert shortcut(flows(("g", "x", OTHER), ("y", "x g", OTHER)), "x", "y") == ()  # a gate is no shortcut


def test_a_branch_is_what_only_its_addition_reads():
    found, refused = branches(flows(("x", "", OTHER), ("f", "x", OTHER), ("y", "f x", ADD)), ["y"])
    assert [(b.end, b.start, b.flows) for b in found] == [("y", "x", ("f",))] and not refused
    _, refused = branches(flows(("x", "", OTHER), ("f", "x", OTHER), ("y", "f x", ADD)), ["y", "f"])
    assert refused == [("y", "f in its branch is read elsewhere too")]
    _, refused = branches(flows(("x", "", OTHER), ("d", "x", OTHER), ("f", "x", OTHER), ("y", "f d", ADD)), ["y"])
    assert refused == [("y", "its shortcut computes (neither operand is worked out of the other)")]


def test_nested_branches_are_both_found():
    inner = flows(("x", "", OTHER), ("f", "x", OTHER), ("g", "f", OTHER), ("h", "f g", ADD), ("y", "x h", ADD))
    found, _ = branches(inner, ["y"])
    assert {(b.end, b.flows) for b in found} == {("h", ("g",)), ("y", ("f", "g", "h"))}


# --- what a block matters


def test_influence_is_one_minus_the_cosine_of_the_textbook():
    x, y = np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 2.0], [6.0, 8.0]])
    assert influence(x, y) == (1.0, 2)
    total, count = influence(np.zeros((1, 3)), np.zeros((1, 3)))
    assert (total, count) == (0.0, 1)
    assert influence(np.zeros((1, 3)), np.ones((1, 3)))[0] == 1.0


def test_vectors_are_tokens_or_whole_examples():
    assert vectors(np.zeros((2, 5, 3))).shape == (10, 3)
    assert vectors(np.zeros((2, 3, 4, 4))).shape == (2, 48)


def test_output_error_is_relative_and_sums_over_all_outputs():
    assert output_error([np.array([3.0, 4.0])], [np.array([3.0, 3.0])]) == 1 / 25
    assert output_error([np.array([3.0]), np.array([4.0])], [np.array([3.0]), np.array([3.0])]) == 1 / 25
    assert output_error([np.zeros(2)], [np.ones(2)]) == 2.0


# --- choosing


def made(sizes):
    return [Block(f"b{i}", (f"b{i}.conv",), size, size * 2, size * 8) for i, size in enumerate(sizes)]


def layers(**amount):
    return Prune(granularity=Layer(), **amount)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=7),
    st.floats(0.05, 0.95),
    st.integers(0, 60),
)
def test_a_budget_is_met_by_the_least_total_importance(rows, fraction, rest):
    blocks = made([size for size, _ in rows])
    importance = {block.name: float(worth) for block, (_, worth) in zip(blocks, rows, strict=True)}
    full = rest + sum(size for size, _ in rows)
    allowed = int(fraction * full)
    fits = [
        sum(importance[b.name] for b in gone)
        for count in range(len(blocks) + 1)
        for gone in itertools.combinations(blocks, count)
        if full - sum(b.macs for b in gone) <= allowed
    ]
    spec, size = layers(macs=fraction), Size(full, 0, 0)
    if not fits:
        with pytest.raises(ModelError, match="without all layers that can leave"):
            choose_blocks(blocks, spec, size, lambda gone: importance, greedy=False)
        return
    left = choose_blocks(blocks, spec, size, lambda gone: importance, greedy=False)
    assert sum(importance[name] for name in left.names) == min(fits)
    assert full - sum(b.macs for b in blocks if b.name in left.names) <= allowed


def test_a_count_and_a_fraction_take_the_least_important_ties_by_position():
    blocks, worth = made([1, 1, 1, 1]), {"b0": 2.0, "b1": 1.0, "b2": 1.0, "b3": 0.5}
    for spec in (Prune(granularity=Layer(2)), layers(sparsity=0.5)):
        assert choose_blocks(blocks, spec, Size(4, 4, 4), lambda gone: worth, greedy=False).names == ("b1", "b3")


def test_greedy_measures_anew_what_remains():
    blocks, asked = made([1, 1, 1]), []

    def measure(gone):
        asked.append(tuple(gone))
        return {"b0": 1.0, "b1": 2.0, "b2": 3.0} if not gone else {"b1": 9.0, "b2": 4.0}

    left = choose_blocks(blocks, Prune(granularity=Layer(2)), Size(3, 3, 3), measure, greedy=True)
    assert left.names == ("b0", "b2") and asked == [(), ("b0",)]
    assert left.importance == {"b0": 1.0, "b1": 2.0, "b2": 3.0}


def test_what_cannot_be_done_is_refused():
    blocks, worth = made([1, 1]), {"b0": 1.0, "b1": 1.0}
    for spec, kind, message in (
        (Prune(granularity=Layer(3)), SpecError, "more than can leave, which are 2: b0, b1"),
        (layers(sparsity=0.2), ModelError, "less than one. Write granularity=Layer"),
        (layers(macs=100), SpecError, "fits Prune"),
    ):
        with pytest.raises(kind, match=message):
            choose_blocks(blocks, spec, Size(9, 9, 9), lambda gone: worth, greedy=False)


class Found:
    skipped = (("add", "its shortcut computes"),)

    def __init__(self, blocks):
        self.blocks = blocks


def test_keep_and_include_name_a_block_or_a_layer_in_it():
    found = Found(made([1, 1, 1]))
    kept, skipped = eligible_blocks(found, Prune(granularity=Layer(1), criterion=OutputChange(), keep=("b1.conv",)))
    assert [b.name for b in kept] == ["b0", "b2"] and skipped == (("add", "its shortcut computes"), ("b1", "in keep"))
    only, _ = eligible_blocks(found, Prune(granularity=Layer(1), include=("b2",)))
    assert [b.name for b in only] == ["b2"]
    with pytest.raises(ModelError, match="add: its shortcut computes"):
        eligible_blocks(found, Prune(granularity=Layer(1), keep=("b*",)))
