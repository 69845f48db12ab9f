"""Small models of the families of `transformers`, built from their configurations: random weights, nothing is downloaded.

`FAMILIES` maps a name to a function that returns `(model, inputs)`: the model in inference mode, and a batch by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Built = tuple[Any, dict[str, np.ndarray]]
WORDS, TOKENS = 99, 12
_VISION = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 10, "intermediate_size": 80}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 5}
_TEXT = {"vocab_size": WORDS, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 10, "intermediate_size": 80}
_GROUPED = {**_TEXT, "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6, "use_cache": False}
_STAGES = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "num_labels": 5}
_SEGFORMER = {"hidden_sizes": [20, 20, 40, 40], "num_attention_heads": [4, 4, 10, 10], "depths": [1, 1, 1, 1]}
_T5 = {"vocab_size": WORDS, "d_model": 40, "d_kv": 4, "d_ff": 80, "num_layers": 2, "num_heads": 10, "use_cache": False}
_WHISPER = {
    **{
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 10), ("ffn_dim", 80))
    },
    **{"vocab_size": WORDS, "d_model": 40, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False},
}


def _images(side: int) -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)}


def _words() -> dict[str, np.ndarray]:
    """Two sentences, one of them shorter than the other."""
    mask = np.ones((2, TOKENS), np.int64)
    mask[1, 9:] = 0
    return {"input_ids": np.random.default_rng(0).integers(3, WORDS, (2, TOKENS)), "attention_mask": mask}


def _answered(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**inputs, "decoder_input_ids": np.random.default_rng(1).integers(3, WORDS, (2, 7))}


def _sound() -> dict[str, np.ndarray]:
    return _answered({"input_features": np.random.default_rng(0).standard_normal((2, 8, 40)).astype(np.float32)})


# name: (class, its configuration, the configuration's values, inputs)
_BUILT: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, np.ndarray]]]] = {
    "ResNet": ("ResNetForImageClassification", "ResNetConfig", _STAGES, lambda: _images(64)),
    "MobileNetV2": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.35, "image_size": 64, "num_labels": 5},
        lambda: _images(64),
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_labels": 5},
        lambda: _images(64),
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", {**_VISION, **_IMAGE}, lambda: _images(32)),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", {**_VISION, **_IMAGE}, lambda: _images(32)),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {**_IMAGE, "patch_size": 2, "embed_dim": 20, "depths": [2, 2], "num_heads": [4, 10], "window_size": 4},
        lambda: _images(32),
    ),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**_SEGFORMER, "decoder_hidden_size": 32, "sr_ratios": [4, 2, 2, 1], "num_labels": 5},
        lambda: _images(64),
    ),
    "BERT": ("BertForSequenceClassification", "BertConfig", {**_TEXT, "num_labels": 5}, _words),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 40, "n_layers": 2, "n_heads": 10, "hidden_dim": 80, "num_labels": 5},
        _words,
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": WORDS, "n_embd": 40, "n_layer": 2, "n_head": 10, "n_positions": 32, "use_cache": False},
        _words,
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED, _words),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 8}, _words),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5, lambda: _answered(_words())),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, _sound),
}
HEADLESS = frozenset({"ResNet", "MobileNetV2", "ConvNeXt"})  # families without attention


def spread(model: Any) -> Any:
    """*In place*: scales, offsets and statistics that differ from channel to channel, so that a mix-up of channels shows.

    As they are built, biases are zero, layer scales 1e-6 and norms alike in every channel.
    """
    drawn = torch.Generator().manual_seed(5)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wide = tensor.is_floating_point() and 1 < tensor.numel() == max(tensor.shape)  # a number for each channel
        if wide and "inv_freq" not in name:
            low, high = (-0.2, 0.2) if name.endswith(("bias", "running_mean")) else (0.6, 1.4)
            tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=drawn))
    return model


def build(name: str) -> Built:
    """The family's model, seeded, and its inputs."""
    import transformers

    kind, configuration, values, inputs = _BUILT[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, kind)(getattr(transformers, configuration)(**values))
    return spread(model).eval(), inputs()


FAMILIES: dict[str, Callable[[], Built]] = {name: (lambda name=name: build(name)) for name in _BUILT}
