"""Specs: what they refuse, in which words, and that each survives YAML."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import whet.specs
from whet.errors import SpecError, TargetError, WhetError
from whet.numerics.losses import soft_targets
from whet.numerics.metrics import accuracy
from whet.specs import (
    AWQ,
    DIST,
    DKD,
    ERK,
    GPTQ,
    HQQ,
    MSE,
    NF4,
    NM,
    PKT,
    QAT,
    RKD,
    TARGETS,
    Adaptive,
    AdaRound,
    AttentionTransfer,
    BatchNormScale,
    BiasCorrection,
    BinarySoftTargets,
    Block,
    Budget,
    Channel,
    Cosine,
    CrossLayer,
    Cubic,
    Distill,
    Dynamic,
    EarlyStopping,
    Entropy,
    Exponential,
    Features,
    Fisher,
    Float,
    GeometricMedian,
    Global,
    Head,
    Int,
    Isomorphic,
    Iterative,
    KMeans,
    Linear,
    LogitsMSE,
    Magnitude,
    Metric,
    MovingAverage,
    Nearest,
    OneShot,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    Piecewise,
    PowerOfTwo,
    Prune,
    Quantize,
    Random,
    Recipe,
    Regression,
    SimilarityPreserving,
    SmoothQuant,
    SoftTargets,
    Target,
    Taylor,
    Train,
    Uniform,
    UserCriterion,
    Weight,
    find_target,
    from_dict,
    to_dict,
)
from whet.specs.base import _SPECS

fractions = st.floats(0, 0.999)
positive = st.floats(1e-9, 900)
patterns = st.lists(st.text("abc.*_/Q", min_size=1, max_size=6), max_size=3).map(tuple)
ints = st.builds(
    lambda bits, granularity, narrow: Int(bits, granularity=granularity, narrow=narrow),
    st.integers(2, 16),
    st.sampled_from([PerTensor(), PerChannel()]),
    st.sampled_from([None, True, False]),
)
prunes = st.builds(
    Prune,
    fractions,
    granularity=st.sampled_from([Weight(), Block(4, 2)]),
    criterion=st.sampled_from(
        [Magnitude(), Magnitude(p=1), Random(seed=3), Taylor(batches=2), Fisher(), UserCriterion(accuracy)]
    ),
    allocation=st.sampled_from([Uniform(), Global(), ERK()]),
    schedule=st.one_of(
        st.sampled_from([Linear(), Cosine(end=0.9), Exponential(), Iterative(rounds=3)]),
        st.just(OneShot()),
        st.builds(Cubic, begin=st.floats(0, 0.4), end=st.floats(0.5, 1), frequency=st.integers(1, 99)),
    ),
    keep=patterns,
    include=st.one_of(st.none(), patterns),
)
removals = st.one_of(
    st.builds(Prune, fractions, granularity=st.sampled_from([Channel(), Head()]), round_to=st.integers(1, 16)),
    st.builds(
        Prune,
        macs=st.floats(0.1, 1e9),
        granularity=st.just(Channel()),
        criterion=st.sampled_from([BatchNormScale(), GeometricMedian()]),
        allocation=st.sampled_from([Uniform(), Global(), Isomorphic()]),
        rebuild=st.sampled_from([None, "graph"]),
    ),
    st.builds(Prune, granularity=st.builds(NM, st.integers(1, 3), st.integers(4, 8))),
)
distills = st.builds(
    Distill,
    st.lists(
        st.builds(SoftTargets, positive, standardize=st.booleans(), weight=positive)
        | st.builds(DKD, st.floats(0, 9), beta=st.floats(0, 9), temperature=positive)
        | st.builds(Features, st.just("a.*"), st.just("b"), learning_rate=positive)
        | st.sampled_from([AttentionTransfer("a", "b"), RKD(angle=0), SimilarityPreserving("a", "b"), PKT()])
        | st.sampled_from([DIST(gamma=0.5), BinarySoftTargets(2.0), LogitsMSE(weight=0.5), Regression()]),
        min_size=1,
        max_size=2,
    ),
    student_weight=st.floats(0, 1),
)
trains = st.builds(
    Train,
    epochs=st.integers(1, 99),
    learning_rate=positive,
    weight_decay=st.floats(0, 900),
    decay=st.sampled_from(["cosine", None]),
    loss=st.sampled_from([None, soft_targets]),
    apply=st.tuples() | st.tuples(prunes) | st.tuples(prunes, distills) | st.tuples(distills),
    early_stopping=st.none()
    | st.builds(EarlyStopping, patience=st.integers(1, 99), min_delta=st.floats(0, 9))
    | st.builds(EarlyStopping, relative=st.booleans(), warmup=st.integers(0, 9), threshold=st.none() | st.floats(-9, 9)),
)
names = st.sampled_from(["conv1", "Int", "Prune", "Conv1", "function", "a.b"])
quantizes = st.one_of(
    st.builds(
        Quantize,
        ints,
        st.sampled_from([None, Int(8, symmetric=False, granularity=PerTensor())]),
        keep=patterns,
        overrides=st.dictionaries(names, ints, max_size=2),
    ),
    st.builds(Quantize, st.builds(Float, st.sampled_from(["float16", "bfloat16"])), st.none(), include=st.none() | patterns),
    st.builds(
        Quantize,
        st.sampled_from(
            [KMeans(3), NF4(), PowerOfTwo(4, terms=2), Piecewise(5), Adaptive((Int(8), NF4()), budget=Budget(bits=5))]
        ),
        st.sampled_from([None, Dynamic(8)]),
        observer=st.sampled_from([MovingAverage(0.5), Percentile(99.9), MSE(), Entropy()]),
        weight_observer=st.sampled_from([MSE(), HQQ(0.5)]),
        equalize=st.sampled_from([None, CrossLayer(), SmoothQuant(0.3), AWQ()]),
        rounding=st.sampled_from([Nearest(), AdaRound(blocks=True), GPTQ(damping=0.1)]),
        correct_bias=st.sampled_from([None, BiasCorrection(batch_norm=True)]),
        qat=st.sampled_from([None, QAT(epochs=1, observe=0.5)]),
        keep=st.just((dict,)) | patterns,
        max_drop=st.none() | st.floats(0, 1),
    ),
)
budgets = st.builds(
    Budget,
    st.floats(0, 1),
    confidence=st.none() | st.floats(0.5, 0.99),
    size=st.none() | st.floats(1e-6, 10) | st.sampled_from(["300 kB", "1.5MiB"]),
    latency=st.none() | st.sampled_from(["2 ms", "150us"]),
)


@given(
    st.one_of(
        prunes,
        removals,
        distills,
        trains,
        quantizes,
        budgets,
        st.builds(Metric, st.just(accuracy), per_example=st.booleans(), name=st.sampled_from(["", "top1"])),
    )
)
def test_every_spec_survives_yaml(spec) -> None:
    again = from_dict(yaml.safe_load(yaml.safe_dump(to_dict(spec))))
    assert again == spec and type(again) is type(spec)


@given(st.lists(trains, max_size=2).flatmap(lambda t: quantizes.map(lambda q: [*t, q])))
def test_every_recipe_survives_yaml(steps) -> None:
    recipe = Recipe(steps)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_the_plain_form_holds_what_differs_from_the_defaults() -> None:
    assert to_dict(Prune(0.8)) == {"Prune": {"sparsity": 0.8}}
    assert to_dict(Quantize()) == {"Quantize": {}}
    assert to_dict(Prune(0.5, schedule=Cubic(end=0.7), keep="head")) == {
        "Prune": {"sparsity": 0.5, "schedule": {"Cubic": {"end": 0.7}}, "keep": ["head"]}
    }
    assert to_dict(Train(loss=soft_targets)) == {"Train": {"loss": {"function": "whet.numerics.losses:soft_targets"}}}


def test_numpy_numbers_are_saved_as_plain_ones() -> None:
    text = Recipe([Prune(np.float64(0.5))]).to_yaml()
    assert "numpy" not in text and Recipe.from_yaml(text) == Recipe([Prune(0.5)])


def test_every_spec_class_is_registered_frozen_and_copies() -> None:
    examples = [Prune(0.5), Quantize(), Distill(), Train(), Budget(), Metric(accuracy), Float("float16"), Recipe([Prune(0.5)])]
    for name, cls in _SPECS.items():
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen, name
        assert (
            not hasattr(cls(), "__dict__")
            if name not in {"Prune", "Float", "Recipe", "Metric", "UserCriterion", "Features", "AttentionTransfer", "Group"}
            else True
        ), name
    for spec in examples:
        assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, dataclasses.fields(spec)[0].name, 1)
    public = {name for name in whet.specs.__all__ if dataclasses.is_dataclass(getattr(whet.specs, name)) and name != "Target"}
    assert public == set(_SPECS)


def test_the_callers_overrides_may_change_without_changing_the_spec() -> None:
    mine = {"fc": Int(4)}
    spec = Quantize(overrides=mine)
    mine["conv"] = Int(2)
    assert spec.overrides == {"fc": Int(4)}


def test_a_single_item_stands_for_a_list_of_one() -> None:
    assert Recipe(Prune(0.5)) == Recipe([Prune(0.5)])
    assert Train(apply=Prune(0.5)).apply == (Prune(0.5),) and Train(apply=Prune(0.5)).prune == Prune(0.5)
    assert Distill(SoftTargets(2.0)).loss == (SoftTargets(2.0),) and Train().distill is None
    assert Prune(0.5, keep="head").keep == ("head",)


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


def test_a_recipe_as_a_person_writes_it() -> None:
    text = """
    - Train:
        epochs: 8
        apply:
          - Prune: {sparsity: 0.8, schedule: {Cubic: {}}}
          - Distill:
        early_stopping: {EarlyStopping: {patience: 2}}
    - Quantize: {overrides: {Conv1: {Int: {bits: 4}}}}
    """
    train = Train(epochs=8, apply=[Prune(0.8, schedule=Cubic()), Distill()], early_stopping=EarlyStopping(patience=2))
    assert Recipe.from_yaml(text) == Recipe([train, Quantize(overrides={"Conv1": Int(4)})])


def test_functions_that_cannot_be_found_again_are_not_saved() -> None:
    def local(outputs, targets):
        return 0

    for function in (lambda o, t: 0, local):
        with pytest.raises(SpecError, match="must be importable as module:name"):
            to_dict(Train(loss=function))
    with pytest.raises(SpecError, match="cannot hold a complex"):
        to_dict({"a": 1j})


def test_budget_limits() -> None:
    budget = Budget(size="300 kB", gzip=0.5, latency="0.5 s")
    assert budget.limit("size", 1e9) == 300_000 and budget.limit("gzip", 80) == 40 and budget.limit("latency", 1) == 500
    assert Budget(size="2MiB").limit("size", 1) == 2 * 2**20 and Budget(latency=" 150 us ").limit(
        "latency", 1
    ) == pytest.approx(0.15)
    assert Budget().limit("size", 5) is None


def test_metric_takes_its_functions_name() -> None:
    assert Metric(accuracy).name == "accuracy" and Metric(accuracy, name="top-1").name == "top-1"


def test_targets() -> None:
    assert find_target(None, "torch").name == "onnxruntime" and find_target(None, "keras").name == "litert"
    assert find_target("litert", "keras") is TARGETS["litert"] and find_target(TARGETS["litert"], "keras") is TARGETS["litert"]
    with pytest.raises(TargetError, match=r"Unknown target 'tflite'. Targets: .*litert.*, onnxruntime"):
        find_target("tflite", "keras")
    with pytest.raises(TargetError, match=r"Unknown target 3"):
        find_target(3, "keras")  # type: ignore[arg-type]
    with pytest.raises(
        TargetError,
        match=r"'tensorflow' is written from keras models, and this one is a torch model. Targets for torch: .*onnxruntime",
    ):
        find_target("tensorflow", "torch")
    assert find_target("litert", "torch") is TARGETS["litert"]
    assert isinstance(TARGETS["litert"], Target)
