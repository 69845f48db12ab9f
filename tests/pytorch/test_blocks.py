"""Whole layers of PyTorch models: found where a shortcut leads, and removed."""

import numpy as np
import pytest
import torch
from torch import nn

import whet
from residual_models import TORCH_BLOCKS, data_of, torch_resnet
from whet.errors import ModelError
from whet.specs import Layer, OutputChange, Prune
from whet.torch.blocks import Skip, blocks

X, Y = data_of("torch")
TOKENS = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)


class Encoder(nn.Module):
    """Transformer layers as in `transformers`: called by keyword, with a mask, and returning a tuple."""

    class Layer(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.feed, self.back = nn.Linear(16, 32), nn.Linear(32, 16)
            self.first = first

        def forward(self, states, *, mask, bias=None):
            x = self.norm1(states)
            states = states + self.attention(x, x, x, need_weights=False)[0] * mask
            states = states + self.back(torch.relu(self.feed(self.norm2(states))))
            return states, bias, None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(i == 0) for i in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        mask, bias = torch.ones_like(x[..., :1]), x.mean()
        for layer in self.layers:
            x, bias, _ = layer(states=x, mask=mask, bias=bias)
        return self.head(x.mean(1)) + bias


def encoder():
    torch.manual_seed(1)
    return Encoder().eval()


def test_blocks_are_the_modules_that_hold_an_addition():
    found = blocks(torch_resnet(), X)
    assert found.names[:3] == ("stem", "first", "first.0")
    assert tuple(block.name for block in found.blocks) == TORCH_BLOCKS
    first = found.blocks[0]
    assert (
        first.macs == 2 * 8 * 8 * 9 * 64 and first.parameters == 2 * 8 * 8 * 9 + 4 * 8 and first.bytes == 4 * first.parameters
    )


def test_removal_equals_the_original_whose_branch_is_silent():
    """An oracle of weights: with the last batch norm at zero the branch adds nothing, and relu(x) = x."""
    model, silent = torch_resnet(), torch_resnet()
    with torch.no_grad():
        silent.first[1].norm2.weight.zero_()
        silent.first[1].norm2.bias.zero_()
        expected = silent(torch.from_numpy(X)).numpy()
    found = blocks(model, X)
    tried = found.without(["first.1"], X)
    made, _ = found.remove(["first.1"], {})
    assert np.array_equal(tried, made(torch.from_numpy(X)).detach().numpy())
    assert np.allclose(tried, expected, atol=1e-6) and isinstance(made.first[1], nn.Identity)
    assert not [name for name in made.state_dict() if name.startswith("first.1")]


def test_importance_is_the_change_of_the_outputs():
    spec = Prune(granularity=Layer(1), criterion=OutputChange())
    result = whet.prune(torch_resnet(), spec, train=[(X, Y)], progress=False)
    told = result.steps[0].control["layers"]["importance"]
    reference = torch_resnet()(torch.from_numpy(X)).detach().double().numpy()
    for name in TORCH_BLOCKS:
        model = torch_resnet()
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)[int(key)] = nn.Identity()
        changed = model(torch.from_numpy(X)).detach().double().numpy()
        assert told[name] == pytest.approx(np.sum((reference - changed) ** 2) / np.sum(reference**2), rel=1e-5)
    assert result.steps[0].changed[0]["name"] == min(told, key=told.get)


def test_layers_called_by_keyword_that_return_tuples():
    found = blocks(encoder(), TOKENS)
    assert [block.name for block in found.blocks] == ["layers.0", "layers.1", "layers.2"]
    made, masks = found.remove(["layers.1"], {"layers.1.feed.weight": np.ones((32, 16)), "head.weight": np.ones((4, 16))})
    assert isinstance(made.layers[1], Skip) and list(masks) == ["head.weight"]
    silent = encoder()
    with torch.no_grad():
        for linear in (silent.layers[1].attention.out_proj, silent.layers[1].back):
            linear.weight.zero_()
            linear.bias.zero_()
    tokens = torch.from_numpy(TOKENS)
    assert torch.allclose(made(tokens), silent(tokens), atol=1e-6)


def test_a_model_of_tuples_is_saved_exported_and_loaded(tmp_path):
    made = whet.prune(encoder(), Prune(granularity=Layer(2)), example=TOKENS, progress=False)
    loaded = whet.load(made.save(tmp_path / "saved"), encoder())
    expected = made.side.predict(made.model, TOKENS)
    assert np.array_equal(loaded.side.predict(loaded.model, TOKENS), expected)
    again = whet.load(loaded.save(tmp_path / "again"), loaded.float_model)
    assert np.array_equal(again.side.predict(again.model, TOKENS), expected)
    file = made.export(tmp_path / "model.onnx")
    from whet.runtimes.sessions import open_session

    assert np.allclose(open_session(file).run(TOKENS), expected, atol=1e-5)
    with pytest.raises(ModelError, match=r"no module 'layers\.\d'"):
        whet.load(tmp_path / "saved", nn.Linear(16, 4))


def test_pytorchs_own_encoder_keeps_the_layer_that_its_code_looks_into():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(80, 4)).eval()
    found = blocks(model, TOKENS)
    assert [block.name for block in found.blocks] == ["0.layers.1", "0.layers.2"]
    assert dict(found.skipped)["0.layers.0"].startswith("the model's own code needs it")


class Shared(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.block, self.head, self.times = Encoder.Layer(False), nn.Linear(16, 4), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x, mask=torch.ones_like(x[..., :1]))[0]
        return self.head(x)


def test_a_module_called_twice_stays():
    with pytest.raises(ModelError, match="block: it is called 2 times"):
        whet.prune(Shared(2), Prune(granularity=Layer(1)), example=TOKENS, progress=False)
    assert [block.name for block in blocks(Shared(1), TOKENS).blocks] == ["block"]


class Gate(nn.Module):
    """A gate and an addition to what does not come of its input: neither is a residual block."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid())
        self.position = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return x * self.gate(x) + self.position


def test_gates_and_positions_are_no_blocks():
    model = nn.Sequential(Gate(), nn.Linear(16, 4))
    with pytest.raises(ModelError, match="nothing in it has a shortcut around it"):
        whet.prune(model, Prune(granularity=Layer(1)), example=TOKENS, progress=False)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_forgets_what_left(kind):
    model = torch_resnet().train()
    optimizer = kind(model.parameters(), lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    loss = nn.functional.cross_entropy(model(torch.from_numpy(X)), torch.from_numpy(Y))
    loss.backward()
    optimizer.step()
    made, _ = blocks(model, X).remove(["first.0"], {}, optimizer)
    own = {id(parameter) for parameter in made.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    assert {id(p) for p in optimizer.state} == own
    nn.functional.cross_entropy(made(torch.from_numpy(X)), torch.from_numpy(Y)).backward()
    optimizer.step()


def test_several_blocks_leave_greedily_and_training_goes_on():
    spec = Prune(granularity=Layer(2), criterion=OutputChange(greedy=True))
    made = whet.prune(torch_resnet(), spec, fit=whet.Train(epochs=1), train=[(X, Y)], progress=False)
    assert len(made.steps) == 2 and len(blocks(made.float_model, X).blocks) == 1


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Llama"])
def test_whole_layers_of_transformers_are_found(family):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1} if family == "GPT2" else sizes
    config = getattr(transformers, f"{family}Config")(vocab_size=60, **sizes)
    kind = f"{family}ForSequenceClassification" if family == "Bert" else f"{family}LMHeadModel" if family == "GPT2" else ""
    torch.manual_seed(0)
    model = getattr(transformers, kind or f"{family}ForCausalLM")(config).eval()
    model.config.use_cache = False
    ids = {"input_ids": np.random.default_rng(0).integers(0, 50, (2, 8))}
    found = blocks(model, ids)
    assert len(found.blocks) == 3 and not found.skipped
    before = found.without((), ids)
    tried = found.without([found.blocks[1].name], ids)
    made, _ = found.remove([found.blocks[1].name], {})
    after = blocks(made, ids)
    assert len(after.blocks) == 2 and np.allclose(after.without((), ids)["logits"], tried["logits"], atol=1e-6)
    assert not np.allclose(before["logits"], tried["logits"])
