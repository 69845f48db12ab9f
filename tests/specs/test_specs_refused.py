"""Specs, plain forms and recipe files that are refused, with a message that helps."""

from __future__ import annotations

import pytest

from whet.errors import SpecError, WhetError
from whet.numerics.metrics import accuracy
from whet.specs import (
    DIST,
    DKD,
    ERK,
    GPTQ,
    MSE,
    NM,
    RKD,
    Adaptive,
    BatchNormScale,
    BiasCorrection,
    Block,
    Budget,
    Channel,
    Cubic,
    Distill,
    EarlyStopping,
    Features,
    Float,
    Int,
    Isomorphic,
    Iterative,
    LogitsMSE,
    Metric,
    PerGroup,
    Prune,
    Quantize,
    Recipe,
    SoftTargets,
    Train,
    Uniform,
    UserCriterion,
    from_dict,
    to_dict,
)

REFUSED = [
    (lambda: Prune(50), r"Prune.sparsity must be in \[0, 1\), got 50. Did you mean 0.5\?"),
    (lambda: Prune(1.0), r"\[0, 1\), got 1.0\.$"),
    (lambda: Prune(-0.1), "got -0.1"),
    (lambda: Prune(float("nan")), "must be a number"),
    (lambda: Prune(True), "must be a number"),
    (lambda: Prune("5e-1"), r"got '5e-1'. That is text; YAML needs a dot and a sign in the exponent: 0.5"),
    (lambda: Prune("half"), r"got 'half'\.$"),
    (lambda: Prune(0.5, schedule="cubic"), "Prune.schedule must be one of: OneShot, Linear, Cubic, Cosine, Exponential, Iterative, RigL; got 'cubic'"),
    (lambda: Prune(0.5, schedule=Cubic), "Prune.schedule must be one of"),
    (lambda: Prune(0.5, keep=3), "Prune.keep must be a tuple of layer names"),
    (lambda: Prune(0.3, schedule=Cubic(initial=0.5)), "Cubic.initial must be at most sparsity=0.3, got 0.5"),
    (lambda: Prune(), "Prune needs a value for 'sparsity', or a budget: macs=, parameters=, bytes= or latency="),
    (lambda: Prune(0.5, macs=0.5), "takes one of sparsity=, macs=, parameters=, bytes=, latency=; got sparsity, macs"),
    (lambda: Prune(macs=0.5), r"met by real removal: write granularity=Channel\(\)"),
    (lambda: Prune(macs=0, granularity=Channel()), r"Prune.macs must be in \(0"),
    (lambda: Prune(0.5, granularity=NM()), r"NM\(2, 4\) says how much is removed; leave out sparsity="),
    (lambda: NM(4, 4), r"NM.n must be an integer in \[1, 3\], got 4"),
    (lambda: Block(0), "Block.rows must be an integer of at least 1"),
    (lambda: Prune(0.5, granularity=Channel(), allocation=ERK()), "ERK distributes masks"),
    (lambda: Prune(0.5, allocation=Isomorphic()), "Isomorphic ranks channels"),
    (lambda: Prune(0.5, granularity=Channel(), schedule=Cubic()), "is removed at once: leave schedule= out"),
    (lambda: Prune(0.5, criterion=BatchNormScale()), r"ranks channels: write granularity=Channel\(\)"),
    (lambda: Prune(0.5, rebuild="graph"), "rebuild is for Channel"),
    (lambda: Prune(0.5, granularity=Channel(), rebuild="fx"), "must be None or 'graph'"),
    (lambda: Iterative(rounds=0), "Iterative.rounds must be"),
    (lambda: UserCriterion("l1"), "must be a function of"),
    (lambda: Cubic(begin=0.5, end=0.5), "Cubic.end must be greater than begin=0.5"),
    (lambda: Cubic(frequency=0), "an integer of at least 1, got 0"),
    (lambda: Int(1), r"Int.bits must be an integer in \[2, 16\], got 1"),
    (lambda: Int(8.0), "Int.bits must be an integer"),
    (lambda: Int(8, symmetric=False, narrow=True), "Int.narrow=True needs symmetric=True"),
    (lambda: Float("float8"), "Float.dtype must be one of float16, bfloat16, float8_e4m3, got 'float8'"),
    (lambda: Quantize(Int(8, symmetric=False)), "Quantize.weights must be symmetric"),
    (lambda: Quantize(overrides={"a": Int(8, symmetric=False)}), r"Quantize.overrides\['a'\] must be symmetric"),
    (lambda: Quantize(overrides={"a": 4}), r"Quantize.overrides\['a'\] must be one of: Int, Float, KMeans, NF4, PowerOfTwo, Piecewise; got 4"),
    (lambda: Quantize(overrides={1: Int(4)}), "layer name in Quantize.overrides"),
    (lambda: Quantize(Float("float16")), r"needs activations=None: write Quantize\(Float\(dtype='float16'\), None\)"),
    (lambda: Quantize(overrides={"a": Float("float16")}), "casts weights only and needs activations=None"),
    (lambda: Quantize(Int(4, granularity=PerGroup(32))), "integer kernels sum over a whole row"),
    (lambda: Quantize(Adaptive((Int(8),)), None), "at least two schemes"),
    (lambda: BiasCorrection(analytic=True, batch_norm=True), "analytic=True does without"),
    (lambda: GPTQ(damping=0), r"GPTQ.damping must be in \(0, 1\]"),
    (lambda: Quantize(rounding=MSE()), "Quantize.rounding must be one of: Nearest, AdaRound, GPTQ"),
    (lambda: Quantize(activations=Int(8)), r"activations must use granularity=PerTensor\(\)"),
    (lambda: DKD(beta=-1), r"DKD.beta must be in \[0, 1e\+06\], got -1"),
    (lambda: DIST(temperature=0), "DIST.temperature"),
    (lambda: LogitsMSE(weight=0), "LogitsMSE.weight"),
    (lambda: SoftTargets(standardize=1), "SoftTargets.standardize"),
    (lambda: Features("", "b"), "Features.student must name a layer or be a pattern"),
    (lambda: Features("a", None), "Features.teacher must name a layer"),
    (lambda: RKD("a"), "RKD takes layers of both models or of none, got 'a' and None"),
    (lambda: RKD(distance=0, angle=0), "nothing to learn"),
    (lambda: Distill(Uniform()), "Distill.loss must be one of: SoftTargets"),
    (lambda: SoftTargets(0), r"\(0, 1e\+06\], got 0"),
    (lambda: Distill([]), "at least one distillation loss"),
    (lambda: Distill(student_weight=2), r"Did you mean 0.02\?"),
    (lambda: EarlyStopping(patience=0), "EarlyStopping.patience"),
    (lambda: EarlyStopping(min_delta=-1), "EarlyStopping.min_delta"),
    (lambda: Train(epochs=0), "Train.epochs"),
    (lambda: Train(decay="linear"), "Train.decay must be 'cosine' or None"),
    (lambda: Train(loss="mse"), "Train.loss must be a function"),
    (lambda: Train(apply=[Prune(0.5), Prune(0.6)]), "at most one Prune, got 2"),
    (lambda: Train(apply=[Quantize()]), "Train.apply must be one of: Prune, Distill"),
    (lambda: Recipe([]), "at least one step"),
    (lambda: Recipe([Distill()]), "Recipe step must be one of: Train, Prune, Quantize"),
    (lambda: Recipe([Prune(0.5, schedule=Cubic())]), "A Cubic schedule needs training"),
    (lambda: Recipe([Quantize(), Prune(0.5)]), "Quantize must be the last step"),
    (lambda: Budget(-1), "Budget.max_drop"),
    (lambda: Budget(confidence=95), r"Did you mean 0.95\?"),
    (lambda: Budget(size=300_000), r"got 300000. An absolute limit is written as text: '300 kB'"),
    (lambda: Budget(latency=0), "An absolute limit is written as text: '2 ms'"),
    (lambda: Budget(size="300 KB"), "one of the units B, kB, MB, GB, KiB, MiB, GiB, got '300 KB'"),
    (lambda: Budget(latency="2 kB"), "one of the units us, ms, s, got '2 kB'"),
    (lambda: Budget(size="-3 kB"), "must be a number and one of the units"),
    (lambda: Budget(size="0 kB"), "more than nothing"),
    (lambda: Metric("accuracy"), "Metric.fn must be a function"),
    (lambda: Metric(accuracy, name=3), "Metric.name"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_refused_with_a_message_that_helps(make, message) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        make()
    assert isinstance(caught.value, WhetError) and isinstance(caught.value, ValueError)


PLAIN = [
    ({"Prun": {"sparsity": 0.5}}, "Unknown spec 'Prun'. Known: .*Prune"),
    (
        {"Prune": {"sparsity": 0.5, "ratio": 1}},
        "Prune has no field 'ratio'. Its fields: sparsity, macs, parameters, bytes, latency, granularity",
    ),
    ({"Prune": {}}, "Prune needs a value for 'sparsity'"),
    ({"Prune": None}, "Prune needs a value for 'sparsity'"),
    ({"Prune": 0.5}, "Prune must be followed by its fields as a mapping, got 0.5"),
    ({"Train": {"loss": {"function": "no.such.module:f"}}}, "Cannot import the function 'no.such.module:f'"),
    ({"Train": {"loss": {"function": "math:nothing"}}}, "Cannot import the function 'math:nothing'"),
    ({"Train": {"loss": {"function": "math"}}}, "must be written as module:name"),
    ({"Train": {"loss": {"function": "math:pi"}}}, "must name a function, got a float"),
]


@pytest.mark.parametrize(("plain", "message"), PLAIN)
def test_plain_forms_that_are_refused(plain, message) -> None:
    with pytest.raises(SpecError, match=message):
        from_dict(plain)


RECIPES = [
    ("format: 2\nrecipe: []", "reads recipes of format 1, got format 2"),
    ("- Prune: {sparsity: 0.5", "not valid YAML"),
    ("Prune", "A recipe is a list of steps"),
    ("{steps: []}", "A recipe is a list of steps"),
    ("- Prune", "Recipe step must be one of"),
    ("- Train: {learning_rate: 1e-3}", r"That is text; YAML needs a dot and a sign in the exponent: 0\.001"),
    ("", "A recipe is a list of steps"),
]


@pytest.mark.parametrize(("text", "message"), RECIPES)
def test_recipe_files_that_are_refused(text, message) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe.from_yaml(text)


def test_functions_that_cannot_be_found_again_are_not_saved() -> None:
    def local(outputs, targets):
        return 0

    for function in (lambda o, t: 0, local):
        with pytest.raises(SpecError, match="must be importable as module:name"):
            to_dict(Train(loss=function))
    with pytest.raises(SpecError, match="cannot hold a complex"):
        to_dict({"a": 1j})
