"""What attention layers of PyTorch models compute, heard by name and compared in training."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_parts import run_training, same_state, seeded, state_of
from whet.data import Batches
from whet.errors import ModelError
from whet.numerics.losses_attention import Attention
from whet.numerics.losses_layers import layer_loss
from whet.numerics.namespace import numpy_namespace as np_xp
from whet.specs import CRD, AttentionMatrices, AttentionRelations, Distill, Features, SoftTargets, Train
from whet.torch.attention import hear_attention

pytestmark = pytest.mark.filterwarnings("ignore:Nothing but .* teaches:UserWarning")


class Encoder(nn.Module):
    """torch's own encoder layers on ids (n, 7) with a padding mask."""

    def __init__(self, heads, width, layers=2):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, ids, attention_mask):
        x = self.encoder(self.embed(ids), src_key_padding_mask=attention_mask == 0)
        return self.head(x.mean(1))


class Own(nn.Module):
    """Attention as Hugging Face's models write it: a function of torch inside a module of their own."""

    def __init__(self, heads, width):
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(11, width)
        self.qkv, self.head = nn.ModuleList(nn.Linear(width, width) for _ in range(3)), nn.Linear(width, 3)
        self.attend = nn.Module()
        self.attend.forward = self._attend

    def _attend(self, x, mask):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.qkv)
        additive = torch.where(mask[:, None, None] != 0, 0.0, torch.finfo(x.dtype).min)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=additive).transpose(1, 2).flatten(2)

    def forward(self, ids, attention_mask):
        return self.head(self.attend(self.embed(ids), attention_mask).mean(1))


def sentences(n=24):
    rng = np.random.default_rng(0)
    mask = (np.arange(7) < rng.integers(2, 8, n)[:, None]).astype(np.int64)
    return {"ids": rng.integers(1, 11, (n, 7)) * mask, "attention_mask": mask}, rng.integers(0, 3, n)


def heard(model, name, inputs):
    """The attention of a module, as NumPy arrays."""
    found = []
    hooks = hear_attention(model.get_submodule(name), found.append)
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    torch.backends.mha.set_fastpath_enabled(True)
    for hook in hooks:
        hook.remove()
    one = found[-1]
    return Attention(*(getattr(one, part).detach().numpy() for part in ("query", "key", "value", "allowed")), one.scale)


def first_loss(losses, student, teacher):
    spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(losses, student_weight=0)])
    _, step = run_training(student, spec, teacher=teacher, train=Batches(sentences(), "train"), val=None)
    return step.train["history"][0]["loss"], step.train["notes"]


def losses_of(student, teacher):
    of = ("value", "query", "key")
    plain, divergent = AttentionMatrices(student, teacher), AttentionMatrices(student, teacher, divergent=True)
    return [plain, divergent, AttentionRelations(student, teacher, of=of)]


@pytest.mark.parametrize(
    ("build", "name"), [(Encoder, "encoder.layers.0.self_attn"), (Own, "attend")], ids=["MultiheadAttention", "function"]
)
def test_attention_of_other_heads_and_widths(build, name):
    student, teacher = seeded(lambda: build(2, 8)), seeded(lambda: build(4, 12), 1)
    inputs, _ = sentences()
    pair = [heard(model, name, inputs) for model in (student, teacher)]
    assert pair[0].query.shape == (24, 2, 7, 4) and pair[1].key.shape == (24, 4, 7, 3)
    np.testing.assert_array_equal(np.broadcast_to(pair[0].allowed, (24, 1, 1, 7))[:, 0, 0], inputs["attention_mask"] != 0)
    wanted = [float(layer_loss(loss, *pair, xp=np_xp)) for loss in losses_of(name, name)]
    before = state_of(teacher)
    found, _ = first_loss(losses_of(name, name), student, teacher)
    assert found == pytest.approx(sum(wanted), rel=1e-4) and min(wanted) > 1e-3
    assert same_state(before, state_of(teacher))
    for model in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_heard_is_what_torch_computes():
    """Its own weights, averaged over heads, are the softmax of the scores that are compared."""
    model, (inputs, _) = seeded(lambda: Encoder(2, 8)).eval(), sentences()
    one = heard(model, "encoder.layers.0.self_attn", inputs)
    x = model.embed(torch.from_numpy(inputs["ids"]))
    padding = torch.from_numpy(inputs["attention_mask"] == 0)
    _, weights = model.encoder.layers[0].self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    scores = np.where(one.allowed, one.query @ np.swapaxes(one.key, -1, -2) * one.scale, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(powers / powers.sum(-1, keepdims=True), weights.detach().numpy(), atol=1e-6)


def bert(kind, heads=2, width=8):
    """Two layers of Hugging Face's BERT, nothing downloaded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=kind,
    )
    return transformers.BertForSequenceClassification(config)


class Written(Own):
    """The same attention as most tutorials write it."""

    def _attend(self, x, mask):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.qkv)
        scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(mask[:, None, None] == 0, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.attention.self", "attend"])
def test_attention_written_out_is_heard_as_the_function_is(name):
    inputs, labels = sentences()
    if name == "attend":
        models = [seeded(lambda kind=kind: kind(2, 8)) for kind in (Own, Written)]
    else:
        models = [seeded(lambda kind=kind: bert(kind)).eval() for kind in ("sdpa", "eager")]
        inputs = {"input_ids": inputs["ids"], "attention_mask": inputs["attention_mask"]}
    one, other = (heard(model, name, inputs) for model in models)
    real = inputs["attention_mask"] != 0
    assert one.query.shape == (24, 2, 7, 4) and (one.scale or 0.5) == pytest.approx(other.scale)
    for part in ("query", "key", "value"):
        np.testing.assert_allclose(getattr(other, part), getattr(one, part), atol=1e-5)
    np.testing.assert_array_equal(np.broadcast_to(other.allowed, (24, 1, 7, 7))[:, 0, 0], real)
    teacher = seeded(lambda: bert("sdpa", 4, 12) if name != "attend" else Own(4, 12), 1)
    found = []
    for model in models:
        spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(losses_of(name, name), student_weight=0)])
        _, step = run_training(model, spec, teacher=teacher, train=Batches((inputs, labels), "train"), val=None)
        found.append(step.train["history"][0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] > 1e-6


def test_fewer_layers_learn_from_every_second_one():
    student, teacher = seeded(lambda: Encoder(2, 8)), seeded(lambda: Encoder(4, 12, layers=4), 1)
    layers = "encoder.layers.?"
    losses = [SoftTargets(), AttentionMatrices(f"{layers}.self_attn", f"{layers}.self_attn"), Features(layers, layers), CRD()]
    spec = Train(epochs=12, learning_rate=3e-3, apply=[Distill(losses, student_weight=0)])
    _, step = run_training(student, spec, teacher=teacher, train=Batches(sentences(), "train", batch=16), val=None)
    history = [row["loss"] for row in step.train["history"]]
    assert history[-1] < 0.8 * history[0]
    told = "encoder.layers.0 from encoder.layers.1, encoder.layers.1 from encoder.layers.3"
    assert any(told in note for note in step.train["notes"])


def test_a_causal_function_and_a_module_without_attention():
    class Causal(Own):
        def _attend(self, x, mask):
            q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.qkv)
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    one = heard(seeded(lambda: Causal(2, 8)), "attend", sentences()[0])
    np.testing.assert_array_equal(one.allowed[0, 0], np.tril(np.ones((7, 7), bool)))
    with pytest.raises(ModelError, match="'head' of the student computed no attention that can be seen"):
        first_loss(
            [SoftTargets(), AttentionMatrices("head", "attend")], seeded(lambda: Own(2, 8)), seeded(lambda: Own(2, 8), 1)
        )
