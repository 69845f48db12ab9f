"""Losses on attention, contrastive losses and layers by name: against formulas written out one head and one row at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from whet.errors import ModelError
from whet.numerics.losses_attention import Attention, attention_matrices, relations
from whet.numerics.losses_layers import LayerLosses, layer_loss, paired_layers
from whet.numerics.losses_relations import crd
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import CRD, AttentionMatrices, AttentionRelations, Distill, Features


def attention(heads, width, seed, n=3, length=5, padded=True, keys=None):
    """Random queries, keys and values; the last positions of each example are padding, where `padded`."""
    rng = np.random.default_rng(seed)
    shapes = [(n, heads, length, width)] + [(n, keys or heads, length, width)] * 2
    allowed = (np.arange(length) < np.array([[5], [3], [2]])[:n])[:, None, None, :] if padded else None
    return Attention(*(rng.normal(size=shape) for shape in shapes), allowed)


def real(one, example):
    """The positions of an example that are no padding."""
    return range(5) if one.allowed is None else [j for j in range(5) if one.allowed[example, 0, 0, j]]


def distribution(scores):
    powers = np.exp(np.asarray(scores) - max(scores))
    return powers / powers.sum()


def scores_of(one, example, head, query):
    q, k = one.query[example, head, query], one.key[example, head]
    return [float(q @ k[j]) / math.sqrt(len(q)) for j in real(one, example)]


def test_attention_matrices_are_compared_before_the_softmax() -> None:
    s, t = attention(2, 4, 0), attention(2, 7, 1)
    gaps = [
        (np.array(scores_of(s, e, h, i)) - np.array(scores_of(t, e, h, i))) ** 2
        for e in range(3)
        for h in range(2)
        for i in real(s, e)
    ]
    assert attention_matrices(s, t, xp=xp) == pytest.approx(np.concatenate(gaps).mean(), rel=1e-12)
    bare = [attention(2, 4, seed, padded=False) for seed in (0, 1)]
    scores = [np.einsum("nhid,nhjd->nhij", a.query, a.key) / 2 for a in bare]
    assert attention_matrices(*bare, xp=xp) == pytest.approx(((scores[0] - scores[1]) ** 2).mean(), rel=1e-12)


def test_attention_distributions_by_their_divergence() -> None:
    s, t = attention(2, 4, 0), attention(2, 7, 1)
    rows = []
    for e in range(3):
        for h in range(2):
            for i in real(s, e):
                q, p = distribution(scores_of(s, e, h, i)), distribution(scores_of(t, e, h, i))
                rows.append(float((p * np.log(p / q)).sum()))
    assert attention_matrices(s, t, divergent=True, xp=xp) == pytest.approx(math.fsum(rows) / len(rows), rel=1e-9)
    assert attention_matrices(t, t, divergent=True, xp=xp) == pytest.approx(0, abs=1e-15)


def test_other_numbers_of_heads_are_averaged_in_groups() -> None:
    s, t = attention(2, 4, 0), attention(6, 4, 1)
    total, count = 0.0, 0
    for e in range(3):
        for group in range(2):
            for i in real(s, e):
                mine = np.array(scores_of(s, e, group, i))
                its = np.mean([scores_of(t, e, 3 * group + k, i) for k in range(3)], axis=0)
                total, count = total + float(((mine - its) ** 2).sum()), count + len(mine)
    assert attention_matrices(s, t, xp=xp) == pytest.approx(total / count, rel=1e-12)
    rows = []
    for e in range(3):
        for group in range(2):
            for i in real(s, e):
                q = distribution(scores_of(s, e, group, i))
                p = np.mean([distribution(scores_of(t, e, 3 * group + k, i)) for k in range(3)], axis=0)
                rows.append(float((p * np.log(p / q)).sum()))
    assert attention_matrices(s, t, divergent=True, xp=xp) == pytest.approx(math.fsum(rows) / len(rows), rel=1e-9)


def test_value_relations_with_heads_of_their_own() -> None:
    s, t = attention(2, 6, 0), attention(4, 5, 1)  # 12 and 20 numbers a position: two relation heads of 6 and of 10
    rows = []
    for e in range(3):
        for head in range(2):
            pieces = []
            for one, width in ((s, 6), (t, 10)):
                joined = np.concatenate(list(one.value[e]), axis=-1)[:, head * width : (head + 1) * width]
                pieces.append(joined[list(real(s, e))])
            for i in range(len(pieces[0])):
                q, p = (distribution(list(x @ x[i] / math.sqrt(x.shape[1]))) for x in pieces)
                rows.append(float((p * np.log(p / q)).sum()))
    assert relations(s, t, of="value", xp=xp) == pytest.approx(math.fsum(rows) / len(rows), rel=1e-9)
    assert relations(s, t, of="value", heads=2, xp=xp) == relations(s, t, of="value", xp=xp)
    both = layer_loss(AttentionRelations("a", "b", of=("query", "key")), s, t, xp=xp)
    assert both == pytest.approx(relations(s, t, of="query", xp=xp) + relations(s, t, of="key", xp=xp))
    with pytest.raises(ModelError, match="5 relation heads do not divide the 12 numbers"):
        relations(s, t, of="value", heads=5, xp=xp)


def test_grouped_queries_share_keys() -> None:
    grouped = attention(4, 3, 0, keys=2)
    whole = Attention(grouped.query, *(np.repeat(x, 2, axis=1) for x in (grouped.key, grouped.value)), grouped.allowed)
    teacher = attention(4, 3, 1)
    assert attention_matrices(grouped, teacher, xp=xp) == pytest.approx(attention_matrices(whole, teacher, xp=xp), rel=1e-12)


def test_other_positions_are_refused() -> None:
    with pytest.raises(ModelError, match="5×5 positions of the student and 4×4 of the teacher"):
        attention_matrices(attention(2, 4, 0), attention(2, 4, 0, length=4, padded=False), xp=xp)
    with pytest.raises(ModelError, match=r"compares two Attention\(query, key, value\), got ndarray"):
        layer_loss(AttentionMatrices("a", "b"), np.zeros((2, 3)), np.zeros((2, 3)), xp=xp)


@pytest.mark.parametrize("temperature", [0.07, 1.0, 100.0])
def test_crd(temperature) -> None:
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 6, 4))
    total = 0.0
    for i in range(6):
        for j in range(6):
            z = float(s[i] @ t[j]) / np.linalg.norm(s[i]) / np.linalg.norm(t[j]) / temperature
            h = math.exp(z) / (math.exp(z) + 5 / 6)
            total -= math.log(h) if i == j else math.log1p(-h)
    assert crd(s, t, temperature, xp=xp) == pytest.approx(total / 6, rel=1e-9)
    assert crd(t, t, temperature, xp=xp) < crd(s, t, temperature, xp=xp)
    assert np.isfinite(crd(s[:1], t[:1], temperature, xp=xp)) and np.isfinite(crd(0 * s, t, temperature, xp=xp))


def test_layers_of_other_numbers_are_paired_evenly() -> None:
    spec = Features("s*", "t*")
    names = lambda letter, count: [f"{letter}{i}" for i in range(1, count + 1)]  # noqa: E731
    pairs = lambda m, n: [int(t[1:]) for _, t in paired_layers(spec, names("s", m), names("t", n))]  # noqa: E731
    assert pairs(3, 3) == [1, 2, 3] and pairs(2, 4) == [2, 4] and pairs(2, 3) == [2, 3] and pairs(1, 4) == [4]
    with pytest.raises(ModelError, match=r"matches 3 layers of the student \(s1, s2, s3\) and 't\*' 2 of the teacher"):
        pairs(3, 2)


def test_maps_are_made_for_what_differs_and_features_of_padding_do_not_count() -> None:
    spec = Distill([Features("a", "b", weight=2.0), CRD("a", "b", dimension=7), Features("a", "c")])
    losses = LayerLosses(spec, ["a"], ["b", "c"])
    rng = np.random.default_rng(0)
    heard = {(0, "a"): rng.normal(size=(2, 4, 3)), (1, "b"): rng.normal(size=(2, 4, 5)), (1, "c"): rng.normal(size=(2, 4, 3))}
    maps = losses.maps(heard, ())
    shapes = {name: maps[name].shape for name in maps if name.endswith("kernel")}
    assert shapes == {"0.0/student/kernel": (3, 5), "1.0/student/kernel": (3, 7), "1.0/teacher/kernel": (5, 7)}
    keep = np.array([[True, True, True, False], [True, False, False, False]])
    mapped = heard[0, "a"] @ maps["0.0/student/kernel"] + maps["0.0/student/bias"]
    wanted = 2 * np.mean([np.mean((mapped - heard[1, "b"])[keep] ** 2)])
    wanted += np.mean((heard[0, "a"] - heard[1, "c"])[keep] ** 2)
    pair = [heard[0, "a"].mean(1), heard[1, "b"].mean(1)]
    for index, who in enumerate(("student", "teacher")):
        pair[index] = pair[index] @ maps[f"1.0/{who}/kernel"] + maps[f"1.0/{who}/bias"]
    wanted += 0.8 * crd(*pair, 0.07, xp=xp)
    assert losses.total(heard, (), maps, xp=xp, real=keep) == pytest.approx(wanted, rel=1e-12)
    assert losses.rates() == {"0.0": 1e-3, "1.0": 1e-3, "2.0": 1e-3} and losses.heard(0, attention=False) == ["a"]
