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
from whet.errors import TargetError
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
            if name
            not in {
                "Prune",
                "Float",
                "Recipe",
                "Metric",
                "UserCriterion",
                "Features",
                "AttentionTransfer",
                "AttentionMatrices",
                "AttentionRelations",
                "TeacherWeights",
                "TeacherSubsets",
                "Group",
            }
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
