"""Ids: what is united, what is fixed, and which factor of a split dimension stays free."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.graph import moves
from whet.graph.ids import SECOND_FACTOR, Ids
from whet.graph.structure import Structure


def classes(s, ids):
    """Ids as the number of their class, in order of first appearance."""
    roots = s.find(ids).tolist()
    order = list(dict.fromkeys(roots))
    return [order.index(root) for root in roots]


def test_uniting_is_transitive_and_keeps_reasons() -> None:
    ids = Ids()
    a, b, c = ids.fresh(3), ids.fresh(3), ids.fresh(3)
    ids.fix(c[2:], "an output")
    ids.unite(a, b)
    ids.unite(b, c)
    assert classes(ids, np.concatenate([a, b, c])) == [0, 1, 2] * 3
    assert ids.is_fixed(a).tolist() == [False, False, True]
    assert ids.reason(int(a[2])) == "an output" and ids.reason(int(a[0])) == ""


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60), st.sets(st.integers(0, 39), max_size=4))
def test_union_find_is_connected_components(pairs, fixed) -> None:
    ids = Ids()
    made = ids.fresh(40)
    for one in fixed:
        ids.fix(made[one : one + 1], f"reason {one}")
    if pairs:
        ids.unite(made[[a for a, _ in pairs]], made[[b for _, b in pairs]])
    label = list(range(40))
    for _ in range(40):
        for a, b in pairs:
            label[a] = label[b] = min(label[a], label[b])
    found = ids.find(made)
    assert [[found[i] == found[j] for j in range(40)] for i in range(40)] == [[x == y for y in label] for x in label]
    assert ids.is_fixed(made).tolist() == [any(label[f] == label[i] for f in fixed) for i in range(40)]


def test_more_than_one_page_of_ids() -> None:
    ids = Ids()
    first, many = ids.fresh(1000), ids.fresh(5000)
    ids.unite(first, many[:1000])
    assert len(ids) == 6000 and (ids.find(many[:1000]) == first).all() and not ids.is_fixed(many).any()


def test_of_a_split_dimension_the_other_factor_stays() -> None:
    ids = Ids()
    flat, heads, size = ids.fresh(6), ids.fresh(2), ids.fresh(3)
    ids.link(flat, (heads, size))
    ids.fix(size, "the size of a head")
    ids.solve()
    assert classes(ids, flat) == [0, 0, 0, 1, 1, 1] and (ids.find(flat[::3]) == ids.find(heads)).all()


def test_of_two_free_factors_the_one_that_leaves_most_groups_shrinks() -> None:
    ids = Ids()
    flat, two, three = ids.fresh(6), ids.fresh(2), ids.fresh(3)
    ids.link(flat, (two, three))
    ids.solve()
    assert classes(ids, flat) == [0, 1, 2, 0, 1, 2]
    assert ids.is_fixed(two).all() and ids.reason(int(two[0])) == SECOND_FACTOR


def test_a_factor_that_shrinks_elsewhere_is_preferred() -> None:
    ids = Ids()
    one, other, heads = ids.fresh(6), ids.fresh(6), ids.fresh(2)
    ids.link(one, (heads, ids.fresh(3, "fixed")))
    ids.link(other, (heads, ids.fresh(3)))
    ids.solve()
    assert classes(ids, other) == [0, 0, 0, 1, 1, 1]


def test_decisions_in_conflict_fix_the_dimension() -> None:
    ids = Ids()
    flat, first, second = ids.fresh(4), ids.fresh(2), ids.fresh(2)
    ids.link(flat, (first, ids.fresh(2, "fixed")))
    ids.link(flat, (ids.fresh(2, "fixed too"), second))
    ids.solve()
    assert len(set(classes(ids, flat))) == 1  # all or nothing: no axis can lose all of its positions


def test_a_fixed_dimension_fixes_its_factors() -> None:
    ids = Ids()
    flat, a, b = ids.fresh(6, "an input"), ids.fresh(2), ids.fresh(3)
    ids.link(flat, (a, b))
    ids.solve()
    assert ids.is_fixed(a).all() and ids.is_fixed(b).all() and ids.reason(int(a[0])) == "an input"


def test_a_link_whose_sizes_do_not_multiply_is_refused() -> None:
    ids = Ids()
    with pytest.raises(ValueError, match=r"\[2, 2\] do not multiply to 6"):
        ids.link(ids.fresh(6), (ids.fresh(2), ids.fresh(2)))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_reshape_follows_every_position(shape, data) -> None:
    """Against numpy: a merged dimension whose other factors are fixed repeats the ids of the free one."""
    s = Structure()
    free = data.draw(st.integers(0, len(shape) - 1))
    x = tuple(s.ids.fresh(n, None if d == free else "fixed") for d, n in enumerate(shape))
    (flat,) = moves.reshape(s, x, [int(np.prod(shape))], "view")
    s.ids.solve()
    at = np.indices(shape)[free].reshape(-1)
    if shape[free] > 1:
        assert (s.ids.find(flat) == s.ids.find(x[free])[at]).all()
        assert not s.ids.is_fixed(flat).any()


@pytest.mark.parametrize(
    ("shape", "to"),
    [
        ((2, 12), (2, 3, 4)),
        ((2, 3, 4), (2, 12)),
        ((4, 6), (2, 2, 6)),
        ((5, 2, 16), (5, 8, 4)),
        ((2, 1, 6), (2, 6)),
        ((6,), (1, 6, 1)),
    ],
)
def test_reshapes_have_the_sizes_they_say(shape, to) -> None:
    s = Structure()
    out = moves.reshape(s, s.fresh(shape), to, "view")
    assert tuple(map(len, out)) == to
    s.ids.solve()


def test_a_reshape_without_common_factors_keeps_what_it_cuts() -> None:
    s = Structure()
    x = s.fresh((5, 4, 6, 7))
    out = moves.reshape(s, x, (5, 6, 4, 7), "view")
    s.ids.solve()
    assert s.ids.is_fixed(x[1]).all() and s.ids.is_fixed(x[2]).all() and "view cuts across" in s.ids.reason(int(x[1][0]))
    assert not s.ids.is_fixed(x[0]).any() and (s.ids.find(out[3]) == s.ids.find(x[3])).all()


def test_batch_and_heads_share_a_dimension() -> None:
    """(T, B, E) viewed as (T, B·H, D): E is (H, D)."""
    s = Structure()
    x = (s.ids.fresh(5, "time"), s.ids.fresh(2, "batch"), s.ids.fresh(8))
    out = moves.reshape(s, x, (5, 8, 2), "view")
    s.fix(out, "the size of a head", [2])
    s.ids.solve()
    assert classes(s.ids, x[2]) == [0, 0, 1, 1, 2, 2, 3, 3] and classes(s.ids, out[1]) == [0, 1, 2, 3] * 2


def test_grouped_convolution_couples_the_index_within_the_group() -> None:
    s = Structure()
    x, w = s.fresh((2, 8, 5, 5)), s.fresh((6, 4, 3, 3))
    y = s.conv(x, w, None, (5, 5), groups=2)
    s.ids.solve()
    assert classes(s.ids, x[1]) == [0, 1, 2, 3] * 2 and classes(s.ids, y[1]) == [0, 1, 2] * 2
    assert s.ids.is_fixed(x[2]).all() and s.ids.is_fixed(w[2]).all()


def test_depthwise_convolution_couples_inputs_with_their_outputs() -> None:
    s = Structure()
    x, w, b = s.fresh((2, 3, 5, 5)), s.fresh((6, 1, 3, 3)), s.fresh((6,))
    y = s.conv(x, w, b, (5, 5), groups=3)
    s.ids.solve()
    assert classes(s.ids, np.concatenate([x[1], y[1], b[0]])) == [0, 1, 2] + [0, 0, 1, 1, 2, 2] * 2


def test_elementwise_broadcasts_from_the_right() -> None:
    s = Structure()
    x, y = s.fresh((2, 3, 4)), s.fresh((3, 1))
    out = s.elementwise(x, y)
    assert tuple(map(len, out)) == (2, 3, 4) and (s.ids.find(y[0]) == s.ids.find(x[1])).all()


def test_concat_split_pad_and_slice_move_ids() -> None:
    s = Structure()
    a, b = s.fresh((2, 3)), s.fresh((2, 5))
    joined = moves.concat(s, [a, b], 1)
    first, second = moves.split(s, joined, [3, 5], 1, "split")
    assert (first[1] == a[1]).all() and (second[1] == b[1]).all()
    padded = moves.pad(s, a, [(0, 0), (2, 1)], "pad")
    assert len(padded[1]) == 6 and (moves.cut(s, padded, 1, 2, 5, 1, "slice")[1] == a[1]).all()
    assert [site.name for site in s.sites] == ["split", "pad", "slice"]


def test_chunks_lose_the_same_positions() -> None:
    s = Structure()
    x = s.fresh((1, 6))
    moves.chunk(s, x, 2, 1, "chunk")
    assert classes(s.ids, x[1]) == [0, 1, 2, 0, 1, 2]
    odd = s.fresh((1, 5))
    moves.chunk(s, odd, 2, 1, "chunk")
    assert s.ids.is_fixed(odd[1]).all()


def test_grouped_query_heads_follow_their_keys() -> None:
    s = Structure()
    q, k, v = s.fresh((1, 4, 3, 2)), s.fresh((1, 2, 3, 2)), s.fresh((1, 2, 3, 2))
    s.attention(q, k, v)
    s.ids.solve()
    assert classes(s.ids, np.concatenate([q[1], k[1], v[1]])) == [0, 0, 1, 1, 0, 1, 0, 1]
    assert s.ids.is_fixed(q[3]).all() and len(s.heads) == 1


def test_einsum_contracts_what_is_not_in_the_output() -> None:
    s = Structure()
    x, w = s.fresh((2, 5, 4)), s.fresh((3, 4))
    y = s.einsum("btc,oc->bto", [x, w], weight=1)
    assert tuple(map(len, y)) == (2, 5, 3) and (s.ids.find(w[1]) == s.ids.find(x[2])).all()
    assert s.ids.is_contracted(w[1]).all() and not s.ids.is_contracted(w[0]).any()


def test_pixel_shuffle_and_back() -> None:
    s = Structure()
    x = s.fresh((1, 8, 3, 3))
    y = moves.pixel_shuffle(s, x, 2)
    back = moves.pixel_unshuffle(s, y, 2)
    s.ids.solve()
    assert tuple(map(len, y)) == (1, 2, 6, 6) and classes(s.ids, x[1]) == [0] * 4 + [1] * 4 == classes(s.ids, back[1])
