"""The awkward architectures by case of the zoo, in both frameworks."""

from __future__ import annotations

# The first ten cases of the zoo, and others that break tools: (PyTorch, Keras).
CASES = {
    "1 residual add": ("residual", "residual_add"),
    "2 concatenation of one value with itself": ("concat", "concat_same"),
    "2 concatenation of different widths": ("concat", "concat_widths"),
    "3 depthwise, multiplier 2": ("depthwise", "depthwise"),
    "4 grouped convolution, group norm": ("grouped", "grouped"),
    "5 channel shuffle": ("shuffle", "channel_shuffle"),
    "6 permute and flatten": ("permute", "permute_flatten"),
    "7 pixel shuffle and a gate": ("pixel_shuffle", "pixel_shuffle"),
    "8 linear, view, transposed convolution": ("decoder", "dense_reshape_transposed"),
    "9 fused qkv": ("fused_qkv", "fused_qkv"),
    "9 grouped-query attention": ("grouped_query", None),
    "10 multi-head attention": ("attention", "attention_layer"),
    "11 recurrent": ("recurrent", None),
    "12 tied embedding": ("tied", None),
    "13 a module called twice": ("twice", "shared_layer"),
    "13 siamese, keyword-only, dict of outputs": ("siamese", "several_outputs"),
    "15 functions with the model's own parameters": ("functional", None),
    "16 weight norm": ("weight_norm", None),
    "24 a top-level Sequential": ("sequential", "digits_cnn"),
    "33 a nested Sequential": (None, "nested_sequential"),
    "33 nested models with shared names": (None, "nested_functional"),
    "several of all": ("demo", "small_resnet"),
    "one dimension": (None, "one_dimensional"),
    "padding, dilation, three addends": (None, "padded_and_dilated"),
}
TABLE = [(framework, name) for pair in CASES.values() for framework, name in zip(("torch", "keras"), pair, strict=True) if name]
TABLE = list(dict.fromkeys(TABLE))
# What no rule of the target takes stays in float, and is listed with the reason.
LISTED = {
    ("torch", "weight_norm"): {"0"},
    ("torch", "recurrent"): {"lstm", "gru"},
    ("torch", "attention"): {"attn"},
    ("keras", "attention_layer"): {"attention"},
}
