"""Families of transformers lose channels or heads: exact, or these tests are skipped where the package is missing."""

import numpy as np
import pytest
import torch

import whet
import zoo_transformers
from whet.specs import Channel, Head, Prune
from whet.torch import inspect, predict

transformers = pytest.importorskip("transformers", reason="transformers is not installed: its families are not tested")
HEADS = Prune(0.3, granularity=Head())
CASES = [
    *((name, Channel()) for name in ("ConvNeXt", "Llama")),
    *((name, Head()) for name in ("Swin", "BERT", "Whisper")),
]


@pytest.mark.parametrize(("name", "granularity"), CASES, ids=[f"{n}-{type(g).__name__}" for n, g in CASES])
def test_thirty_percent_leave_exactly(name, granularity) -> None:
    model, inputs = zoo_transformers.build(name)
    made = whet.prune(model, Prune(0.3, granularity=granularity, round_to=1), example=inputs)
    told = made.steps[0].removal
    assert told["oracle"] <= 1e-5 and 0 < told["change"] < 2  # as silenced, and not as before
    assert type(made.model) is type(model)
    assert inspect(made.model, inputs).macs < 0.95 * inspect(model, inputs).macs
    changed = {row["name"]: row["left"] for row in made.steps[0].changed}
    assert all(list(made.model.get_parameter(key).shape) == left for key, left in changed.items())


def test_a_language_model_without_some_heads_still_generates_and_loads(tmp_path) -> None:
    """Grouped queries: six groups of a key and two queries each, of which two leave; the cache gets the smaller ones."""
    model, inputs = zoo_transformers.build("Llama")
    made = whet.prune(model, HEADS, example=inputs)
    attention = made.model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 4 * 8 and attention.k_proj.out_features == 4 * 4 == attention.v_proj.out_features
    words = torch.from_numpy(inputs["input_ids"][:1])
    how = {"attention_mask": torch.ones_like(words), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, fresh = (made.model.generate(words, use_cache=use, **how) for use in (True, False))
    assert cached.shape == (1, words.shape[1] + 4) and torch.equal(cached, fresh)
    made.save(tmp_path / "saved")
    again = whet.load(tmp_path / "saved", lambda: zoo_transformers.build("Llama")[0])
    np.testing.assert_array_equal(predict(again.model, inputs)["logits"], predict(made.model, inputs)["logits"])


def test_relative_positions_lose_the_column_of_a_head() -> None:
    model, inputs = zoo_transformers.build("T5")
    made = whet.prune(model, HEADS, example=inputs).model
    attention = made.encoder.block[0].layer[0].SelfAttention
    assert attention.n_heads == 7 == attention.relative_attention_bias.weight.shape[1]
    assert (
        made.decoder.block[1].layer[1].EncDecAttention.n_heads == 7
        and model.decoder.block[1].layer[1].EncDecAttention.n_heads == 10
    )


def test_attention_written_out_and_a_rebuilt_graph_give_the_same() -> None:
    """Eager attention (two products and a softmax) and the fused operator; the user's class and a graph of it."""
    model, inputs = zoo_transformers.build("GPT-2")
    fused = whet.prune(model, HEADS, example=inputs)
    model.set_attn_implementation("eager")
    eager = whet.prune(model, HEADS, example=inputs)
    graph = whet.prune(model, Prune(0.3, granularity=Head(), rebuild="graph"), example=inputs)
    assert isinstance(graph.model, torch.fx.GraphModule)
    for other in (eager, graph):
        np.testing.assert_allclose(predict(other.model, inputs)["logits"], predict(fused.model, inputs)["logits"], atol=1e-5)
