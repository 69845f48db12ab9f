"""Targets: the rules of a runtime, as plain frozen data."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace

from whet.errors import TargetError

# Canonical operations, spoken by both framework readers (graph/nodes.py describes them).
COMPUTE = frozenset({"conv", "conv_transpose", "linear"})
WEIGHTED = COMPUTE | {
    "conv3d",
    "einsum",
    "embedding",
    "attention",
    "lstm",
    "gru",
    "rnn",
}  # whose weights may be quantized alone
ALL_STORED = frozenset({"int8", "int4", "int16", "unsigned", "groups", "codebook", "float8"})
ELEMENTWISE = frozenset({"relu", "relu6", "clamp"})
SHARED = frozenset({"max_pool", "reshape", "flatten", "transpose", "identity"})


@dataclass(frozen=True, slots=True)
class Target:
    """Where quantizers go for one runtime, and what form its files have.

    compute: operations with weights that run in integers.
    quantized: further operations whose inputs and outputs are quantized (add, concat, pooling with arithmetic).
    fused: activations folded into the operation before them: the quantizer comes after.
    shared: operations that only move values: the output has the input's scale and zero point.
    joined: operations whose inputs and output all share one range (concat and average pooling on LiteRT).
    fixed: operations whose output has a given (scale, zero_point in the unsigned form).
    portable: 8-bit weights use 7 bits (codes within ±63). Processors without VNNI add two products of 8 bits in 16, which
    overflow at full range; with this the file computes the same on all of them.
    requantizes: kernels accumulate integers and multiply each accumulator by one float32 factor, and so does the simulation.
    sum_bits: a sum of two multiplies codes by integers of that many bits and rounds halves up; None computes it in float.
    weight_only: operations whose weights its files can hold in small types while they compute in float; weights of other
    operations are then rounded, and stored as floats.
    stores: the types of weights that its files can hold: "int8" (two to eight bits, symmetric), "int4" (in half a byte),
    "int16", "unsigned" (with zero points), "groups", "codebook", "float8".
    dynamic: operations with kernels that quantize what they read at run time.
    """

    name: str
    _: KW_ONLY
    frameworks: tuple[str, ...]  # "torch", "keras": the sides that write its files
    runtime: str
    extra: str
    suffix: str
    signed_activations: bool
    compute: frozenset[str] = COMPUTE
    quantized: frozenset[str] = frozenset()
    fused: frozenset[str] = ELEMENTWISE
    shared: frozenset[str] = SHARED
    joined: frozenset[str] = frozenset()
    fixed: dict[str, tuple[float, int]] = field(default_factory=dict)
    portable: bool = False
    requantizes: bool = False
    sum_bits: int | None = None
    weight_only: frozenset[str] = COMPUTE
    stores: frozenset[str] = frozenset({"int8"})
    dynamic: frozenset[str] = frozenset()

    def describe(self) -> list[str]:
        """The rules as lines to read: what computes in integers, on which codes."""

        def names(operations: frozenset[str]) -> str:
            return ", ".join(sorted(operations)) or "none"

        if not self.compute:
            return ["holds floats and computes in floats: nothing is quantized for it"]
        bits = "7 of 8 bits (±63)" if self.portable else "8 bits (±127)"
        lines = [
            f"integer operations with weights: {names(self.compute)}; other integer operations: {names(self.quantized)}",
            f"weights: int8, symmetric, per channel, {bits}; activations: {'int8' if self.signed_activations else 'uint8'}",
            f"folded into the operation before: {names(self.fused)}; scale of the input kept: {names(self.shared)}",
        ]
        if self.joined:
            lines.append(f"one scale for inputs and output: {names(self.joined)}")
        if self.fixed:
            lines.append(f"given output scale: {', '.join(f'{op} {scale:g}' for op, (scale, _) in sorted(self.fixed.items()))}")
        if self.sum_bits is not None:
            lines.append(f"sums: codes times integers of {self.sum_bits} bits, halves rounded up")
        lines.append(f"weights alone: {names(self.weight_only)}, stored as {names(self.stores)}")
        lines.append(f"activations quantized at run time: {names(self.dynamic)}")
        return lines


XNNPACK_SUM_BITS = 21

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "onnxruntime",
            frameworks=("torch", "keras"),
            runtime="onnxruntime",
            extra="onnx",
            suffix=".onnx",
            signed_activations=False,
            compute=COMPUTE - {"conv_transpose"},  # ONNX Runtime has no integer kernel for it
            quantized=frozenset({"add", "mul", "concat", "global_avg_pool", "avg_pool"}),
            requantizes=True,
            weight_only=WEIGHTED,
            stores=ALL_STORED,
            dynamic=frozenset({"linear"}),  # ConvInteger takes 5 to 20 times as long as the float convolution (measured, 1.32)
        ),
        Target(
            "executorch",
            frameworks=("torch",),
            runtime="executorch",
            extra="executorch",
            suffix=".pte",
            signed_activations=True,
            quantized=frozenset({"add", "mul", "concat", "global_avg_pool"}),
            requantizes=True,
            sum_bits=XNNPACK_SUM_BITS,
        ),
        Target(
            "openvino",
            frameworks=("torch", "keras"),
            runtime="openvino",
            extra="openvino",
            suffix=".xml",
            signed_activations=False,
            # Quantizers behind convolutions too, not on their inputs alone: sums stay in integers, which is faster.
            quantized=frozenset({"add", "mul", "concat", "global_avg_pool", "avg_pool"}),
            weight_only=WEIGHTED,
            stores=ALL_STORED - {"codebook"},  # its converter looks levels up, and stores floats
        ),
        Target(
            "litert",
            frameworks=("keras", "torch"),
            runtime="litert",
            extra="litert",
            suffix=".tflite",
            signed_activations=True,
            quantized=frozenset({"add", "mul", "concat", "global_avg_pool", "softmax", "sigmoid", "tanh"}),
            shared=SHARED | {"avg_pool", "pad", "slice"},  # its kernels take one scale for input and output
            joined=frozenset({"concat", "avg_pool"}),
            # int8 kernels demand these: https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec
            fixed={"softmax": (1 / 256, 0), "sigmoid": (1 / 256, 0), "tanh": (1 / 128, 128)},
            requantizes=True,
            sum_bits=XNNPACK_SUM_BITS,
        ),
        # An exchange format: integers are stored, and PyTorch computes in float; other tools lower it further.
        Target(
            "torch",
            frameworks=("torch",),
            runtime="torch",
            extra="torch",
            suffix=".pt2",
            signed_activations=True,
            quantized=frozenset({"add", "mul", "concat", "global_avg_pool"}),
            weight_only=WEIGHTED,
            stores=ALL_STORED - {"int4"},
        ),
        # Keras' own formats hold floats: nothing is quantized for them.
        Target(
            "keras",
            frameworks=("keras",),
            runtime="keras",
            extra="keras",
            suffix=".keras",
            signed_activations=True,
            compute=frozenset(),
        ),
        Target(
            "tensorflow",
            frameworks=("keras",),
            runtime="tensorflow",
            extra="keras",
            suffix=".savedmodel",
            signed_activations=True,
            compute=frozenset(),
        ),
    )
}
TARGETS |= {
    f"{name}-portable": replace(TARGETS[name], name=f"{name}-portable", portable=True)
    for name in ("onnxruntime",)  # its kernels for processors without VNNI are those that overflow
}

DEFAULTS = {"torch": "onnxruntime", "keras": "litert"}


def find_target(name: str | Target | None, framework: str) -> Target:
    """The target of that name, or the framework's own when None.

    Raises:
        TargetError: an unknown name, or a target that another framework writes.
    """
    if isinstance(name, Target):
        found = name
    elif name is None:
        found = TARGETS[DEFAULTS[framework]]
    elif isinstance(name, str) and name in TARGETS:
        found = TARGETS[name]
    else:
        raise TargetError(f"Unknown target {name!r}. Targets: {', '.join(sorted(TARGETS))}.")
    if framework not in found.frameworks:
        allowed = ", ".join(sorted(t.name for t in TARGETS.values() if framework in t.frameworks))
        raise TargetError(
            f"Target {found.name!r} is written from {' and '.join(found.frameworks)} models, and this one is a {framework} "
            f"model. Targets for {framework}: {allowed}."
        )
    return found
