"""Bad input: one `WhetError` each, which names what and where and says what to do; nothing is written, the model is untouched."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import whet
from bench import same
from contract_table import made as technique
from whet import Cubic, Distill, EarlyStopping, Metric, Prune, Quantize, Train
from whet.errors import (
    DataError,
    MetricError,
    MissingExtraError,
    ModelError,
    OutputError,
    RuntimeFileError,
    SpecError,
    TargetError,
)

QUIET = {"progress": False}


def quantized(b, m, **changes):
    return whet.quantize(m, **({"calibration": b.data(32)[0]} | QUIET | changes))


def trained(b, m, spec=None, **changes):
    return whet.fit(m, spec or Train(epochs=1), **({"train": b.data(64), "val": b.data(32, 1)} | QUIET | changes))


def compressed(b, m, **changes):
    return whet.compress(m, **({"train": b.data(64), "val": b.data(32, 1), "recipe": [Quantize()]} | QUIET | changes))


def poisoned(b, m, value):
    b.poison(m, value)
    return m


def spoiled(b, value):
    x, y = b.data(32)
    x.reshape(-1)[40] = value
    return x, y


def exhausted(b):
    found = iter([b.data(32)])
    next(found)
    return found


def raising(outputs, targets):
    raise KeyError("logits")


def nan_metric(outputs, targets):
    return np.full(len(targets), np.nan)


@dataclass
class Bad:
    """What is wrong, what is called, and what it says."""

    name: str
    call: Any
    error: type[Exception]
    says: str


class Fake:
    """Of a class whose module is `tf_keras`."""


Fake.__module__ = "tf_keras.src.engine.sequential"

TABLE = [
    Bad("NaN weight", lambda b, m: quantized(b, poisoned(b, m, np.nan)), ModelError, r"head.*nan at index \(\d, \d\)"),
    Bad(
        "Inf weight", lambda b, m: whet.prune(poisoned(b, m, np.inf), Prune(0.5)), ModelError, r"head.*inf at index \(\d, \d\)"
    ),
    Bad("Inf weight, compress", lambda b, m: compressed(b, poisoned(b, m, -np.inf)), ModelError, r"head.*-inf at index"),
    Bad(
        "NaN in calibration",
        lambda b, m: quantized(b, m, calibration=spoiled(b, np.nan)),
        DataError,
        r"calibration, batch 0 holds nan at index \(1,",
    ),
    Bad("Inf in train", lambda b, m: trained(b, m, train=spoiled(b, np.inf)), DataError, "train, batch 0 holds inf"),
    Bad("NaN in val", lambda b, m: compressed(b, m, val=spoiled(b, np.nan)), DataError, "val, batch 0 holds nan"),
    Bad(
        "no calibration",
        lambda b, m: quantized(b, m, calibration=None),
        DataError,
        r"needs calibration=.*Quantize\(Int\(8\), None\)",
    ),
    Bad("empty calibration", lambda b, m: quantized(b, m, calibration=[]), DataError, "calibration is empty"),
    Bad("calibration without rows", lambda b, m: quantized(b, m, calibration=b.data(0)[0]), DataError, "calibration is empty"),
    Bad(
        "exhausted calibration",
        lambda b, m: quantized(b, m, calibration=exhausted(b)),
        DataError,
        "calibration is empty.*generator.*read before",
    ),
    Bad("exhausted train", lambda b, m: trained(b, m, train=exhausted(b)), DataError, "train is empty"),
    Bad("empty val", lambda b, m: compressed(b, m, val=[]), DataError, "val is empty"),
    Bad("no train", lambda b, m: whet.prune(m, Prune(0.5), fit=Train()), DataError, "needs train="),
    Bad(
        "calibration of another shape",
        lambda b, m: quantized(b, m, calibration=np.zeros((8, 5), np.float32)),
        DataError,
        r"8, 5",
    ),
    Bad(
        "train of another shape",
        lambda b, m: trained(b, m, train=(np.zeros((8, 5), np.float32), np.zeros(8, int))),
        DataError,
        r"8, 5",
    ),
    Bad("unequal lengths", lambda b, m: trained(b, m, train=(b.data(8)[0], b.data(9)[1])), DataError, "one first dimension"),
    Bad("train without targets", lambda b, m: trained(b, m, train=b.data(32)[0]), DataError, "(?i)target"),
    Bad("val without targets", lambda b, m: compressed(b, m, val=b.data(32)[0]), DataError, "val has no targets"),
    Bad(
        "val without targets, own metric",
        lambda b, m: compressed(b, m, val=b.data(32)[0], metric=nan_metric),
        DataError,
        "val has no targets",
    ),
    Bad(
        "classes that are none",
        lambda b, m: trained(b, m, train=(b.data(32)[0], b.data(32)[1] + 7)),
        whet.WhetError,
        "(?i)target|class|label",
    ),
    Bad("a text for data", lambda b, m: quantized(b, m, calibration="train.npz"), DataError, "iterable of batches.*got a str"),
    Bad("metric is NaN", lambda b, m: trained(b, m, metric=nan_metric), MetricError, "'nan_metric' returned nan"),
    Bad("metric is NaN, compress", lambda b, m: compressed(b, m, metric=nan_metric), MetricError, "'nan_metric' returned nan"),
    Bad(
        "metric of the whole is NaN",
        lambda b, m: compressed(b, m, metric=Metric(lambda o, t: np.nan, per_example=False, name="auc")),
        MetricError,
        "'auc' returned nan",
    ),
    Bad("metric raises", lambda b, m: trained(b, m, metric=raising), MetricError, "'raising' failed on outputs .*KeyError"),
    Bad(
        "metric raises, compress",
        lambda b, m: compressed(b, m, metric=raising),
        MetricError,
        "'raising' failed on outputs .*KeyError",
    ),
    Bad("metric raises, measure", lambda b, m: whet.measure(m, b.data(8), metric=raising), MetricError, "'raising' failed"),
    Bad("metric is one number", lambda b, m: compressed(b, m, metric=lambda o, t: 0.5), MetricError, "per_example=False"),
    Bad("metric is no function", lambda b, m: trained(b, m, metric="accuracy"), SpecError, "Metric.fn must be a function"),
    Bad(
        "unknown target",
        lambda b, m: quantized(b, m, target="tensorrt"),
        TargetError,
        f"Unknown target 'tensorrt'. Targets: .*{'litert'}",
    ),
    Bad("target of the other framework", lambda b, m: quantized(b, m, target=b.other), TargetError, "Targets for"),
    Bad("target of the other framework, compress", lambda b, m: compressed(b, m, target=b.other), TargetError, "Targets for"),
    Bad(
        "tf_keras model", lambda b, m: whet.prune(Fake(), Prune(0.5)), ModelError, "package tf_keras.*package keras, version 3"
    ),
    Bad(
        "no model",
        lambda b, m: whet.prune("model.keras", Prune(0.5)),
        ModelError,
        "must be a torch.nn.Module or a keras.Model, got a builtins.str",
    ),
    Bad("another spec", lambda b, m: whet.prune(m, Quantize()), SpecError, "spec must be a whet.Prune"),
    Bad("a budget that is a number", lambda b, m: compressed(b, m, budget=0.01), SpecError, "budget must be a whet.Budget"),
    Bad("a recipe that is a text", lambda b, m: compressed(b, m, recipe="prune"), SpecError, "list of specs.*from_yaml"),
    Bad("a schedule without training", lambda b, m: whet.prune(m, Prune(0.5, schedule=Cubic())), SpecError, "needs training"),
    Bad(
        "a schedule that does not fit",
        lambda b, m: trained(b, m, Train(epochs=1, apply=Prune(0.5, schedule=Cubic(begin=0.9, end=0.95)))),
        SpecError,
        "(?i)cubic|schedule|ramp",
    ),
    Bad(
        "distillation without a teacher",
        lambda b, m: trained(b, m, Train(apply=Distill())),
        SpecError,
        "needs a teacher: pass teacher=",
    ),
    Bad(
        "a teacher of other classes",
        lambda b, m: trained(b, m, Train(apply=Distill()), teacher=b.regressor()),
        whet.WhetError,
        r"(?i)teacher|failed on inputs|cannot run on inputs",
    ),
    Bad("patience of nothing", lambda b, m: EarlyStopping(patience=0), SpecError, "patience"),
    Bad(
        "a pattern that names nothing",
        lambda b, m: whet.prune(m, Prune(0.5, include=("conv9",))),
        ModelError,
        "match no layer: conv9",
    ),
    Bad("unlabelled data", lambda b, m: whet.measure(m, b.data(8)[0]), DataError, "labelled"),
    Bad("no such file", lambda b, m: whet.measure(f"nowhere{b.suffix}", b.data(8)), RuntimeFileError, "no file"),
    Bad("no such device", lambda b, m: trained(b, m, device="cuda:9"), whet.WhetError, "cuda"),
]


@pytest.mark.filterwarnings("ignore:The student has")  # the teacher of other classes is small, too
@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_it_is_refused_in_one_sentence_and_nothing_has_happened(b, bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = b.build()
    if "weight" in bad.name:
        b.poison(model, {"N": np.nan, "I": -np.inf if "compress" in bad.name else np.inf}[bad.name[0]])
    weights, state = b.frozen(model)
    with pytest.raises(bad.error, match=bad.says) as caught:
        bad.call(b, model)
    assert isinstance(caught.value, whet.WhetError)
    again, after = b.frozen(model)
    assert state == after and all(np.array_equal(weights[name], again[name], equal_nan=True) for name in weights)
    assert list(tmp_path.iterdir()) == []


OUTPUTS = {
    "export": lambda b, path: technique("quantize", b.name).export(path / f"model{b.suffix}"),
    "save": lambda b, path: technique("quantize", b.name).save(path / "saved"),
    "compress": lambda b, path: compressed(b, b.build(), out=path / "out"),
}


@pytest.mark.parametrize("verb", OUTPUTS)
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no folder here that nobody may write to")
def test_a_place_that_cannot_be_written(b, verb):
    """Where not even root may write."""
    with pytest.raises(OutputError, match=r"Cannot write to '/proc.*Choose a folder you may write to"):
        OUTPUTS[verb](b, Path("/proc/1"))


@pytest.mark.parametrize("verb", OUTPUTS)
def test_a_file_where_a_folder_must_be(b, verb, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="notes"):
        OUTPUTS[verb](b, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_out_is_a_file(b, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file; out must name a folder"):
        compressed(b, b.build(), out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_is_refused_before_the_work(b, tmp_path):
    (tmp_path / "report.json").write_text("mine")

    def never(outputs, targets):
        raise AssertionError("the work began")

    with pytest.raises(OutputError, match=r"already holds report.json"):
        compressed(b, b.build(), out=tmp_path, metric=never)
    with pytest.raises(OutputError, match="Cannot write"):
        compressed(b, b.build(), out="/proc/1/out", metric=never)


def test_a_metric_is_tried_before_the_work(b, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(technique("train", b.name).side, "train", never)
    monkeypatch.setattr(technique("train", b.name).side, "export", never)
    with pytest.raises(MetricError, match="nan_metric"):
        compressed(b, b.build(), metric=nan_metric, recipe=[Train(epochs=1), Quantize()])


EXTRAS = {
    "torch": ("onnxscript", "onnxscript.optimizer", "onnx"),
    "keras": ("ai_edge_litert", "ai_edge_litert.schema_py_generated"),
}


def test_a_missing_extra_is_named_with_the_command_that_brings_it(b, tmp_path, monkeypatch):
    made = technique("quantize", b.name)
    for module in EXTRAS[b.name]:
        monkeypatch.setitem(sys.modules, module, None)
    extra = {"torch": "onnx", "keras": "litert"}[b.name]
    with pytest.raises(MissingExtraError, match=rf"pip install 'whet\[{extra}\]'") as caught:
        made.export(tmp_path / f"model{b.suffix}")
    assert isinstance(caught.value, ImportError) and list(tmp_path.iterdir()) == []


BLOCK = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
"""
TORCH_ALONE = """
import bench, numpy as np, pytest, torch, whet
bench.few_runs(pytest.MonkeyPatch())
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
x, y = np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), np.arange(64) % 3
made = whet.compress(model, train=(x, y), val=(x, y), recipe=[whet.Quantize()], progress=False, budget=whet.Budget(1.0))
print(made.report.data["budget"]["met"], sorted(n for n in sys.modules if n.split(".")[0] in {blocked}))
"""
KERAS_ALONE = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
import bench, numpy as np, keras, pytest, whet
bench.few_runs(pytest.MonkeyPatch())
bench.convert_in_process(pytest.MonkeyPatch())
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])
x, y = np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), np.arange(64) % 3
made = whet.compress(model, train=(x, y), val=(x, y), recipe=[whet.Quantize()], progress=False, budget=whet.Budget(1.0))
print(made.report.data["budget"]["met"], sorted(n for n in sys.modules if n.split(".")[0] in {blocked}))
"""
NEITHER = """
import whet
for call in (lambda: whet.prune(object(), whet.Prune(0.5)), lambda: whet.torch.prune, lambda: whet.keras.prune):
    try:
        call()
    except whet.WhetError as error:
        print(type(error).__name__, error)
    except ImportError as error:
        print("bare", type(error).__name__, error)
"""


def alone(text, *blocked):
    names = repr(set(blocked))
    code = BLOCK.replace("{blocked}", names) + text.replace("{blocked}", names)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def test_pytorch_works_without_keras():
    others = ("keras", "tensorflow", "ai_edge_litert", "ai_edge_quantizer", "jax")
    assert alone(TORCH_ALONE, *others)[-1] == "True []"


def test_keras_works_without_pytorch():
    assert alone(KERAS_ALONE, "torch", "onnx", "onnxscript", "onnxruntime", "jax")[-1] == "True []"


def test_without_a_framework_the_sentence_is_whets_own():
    lines = alone(NEITHER, "torch", "keras", "tensorflow", "jax")
    assert lines[0].startswith("ModelError model must be a torch.nn.Module or a keras.Model")
    assert not any(line.startswith("bare") for line in lines[:1])


def test_a_saved_model_without_its_framework_names_the_extra(tmp_path):
    folder = technique("prune_uniform", "torch").save(tmp_path / "saved")
    text = f"""
import whet
try:
    whet.load({str(folder)!r})
except whet.WhetError as error:
    print(type(error).__name__, error)
"""
    (line,) = alone(text, "torch")
    assert line.startswith("MissingExtraError Working with torch models needs") and "pip install 'whet[torch]'" in line


def test_frozen_state_notices_a_change(b):
    """The check used above sees what it must."""
    model = b.build()
    before = b.frozen(model)
    b.poison(model, 0.25)
    assert not same(before, b.frozen(model))
