"""What the command reads from files, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from whet.cli.inputs import read_keras_model, read_npz, read_recipe
from whet.errors import DataError, ModelError, SpecError

X, Y = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, 2])


def saved(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("names", [("x", "y"), ("inputs", "targets")])
def test_inputs_and_targets(tmp_path, names) -> None:
    inputs, targets = read_npz(saved(tmp_path, **dict(zip(names, (X, Y), strict=True))))
    assert np.array_equal(inputs, X) and np.array_equal(targets, Y)


@pytest.mark.parametrize("name", ["x", "inputs"])
def test_inputs_alone(tmp_path, name) -> None:
    assert np.array_equal(read_npz(saved(tmp_path, **{name: X})), X)


@pytest.mark.parametrize("name", ["y", "targets", "labels"])
def test_other_names_are_the_inputs_names(tmp_path, name) -> None:
    inputs, targets = read_npz(saved(tmp_path, left=X, right=-X, **{name: Y}))
    assert set(inputs) == {"left", "right"}
    assert np.array_equal(inputs["right"], -X) and np.array_equal(targets, Y)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.array([object()], dtype=object), "y": Y}, "pickles"),
        ({}, "no arrays"),
        ({"y": Y}, "only targets"),
        ({"a": X, "y": Y, "labels": Y}, "y and labels"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, arrays, said) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read_npz(saved(tmp_path, **arrays))
    assert "allow_pickle" not in str(caught.value)  # numpy's advice, and the wrong one


def test_files_that_are_no_npz_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="no data file"):
        read_npz(tmp_path / "none.npz")
    text = tmp_path / "text.npz"
    text.write_text("hello")
    with pytest.raises(DataError, match=r"not an \.npz"):
        read_npz(text)
    np.save(tmp_path / "single.npy", X)
    with pytest.raises(DataError, match=r"not an \.npz"):
        read_npz(tmp_path / "single.npy")
    whole = saved(tmp_path, x=np.arange(5000.0), y=np.arange(5000))
    broken = bytearray(whole.read_bytes())
    broken[3000:3100] = bytes(100)
    whole.write_bytes(broken)
    with pytest.raises(DataError, match="damaged"):
        read_npz(whole)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.pt", "pickle"),
        ("model.pth", "pickle"),
        ("weights.bin", "pickle"),
        ("model.onnx", "whet measure"),
        ("model.h5", "job.py or model.keras"),
        ("none.keras", "no model file"),
    ],
)
def test_other_model_files_are_refused_with_what_to_do(tmp_path, name, said) -> None:
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=said):
        read_keras_model(tmp_path / name)


def test_recipes(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("recipe:\n- Quantize: {}\n", encoding="utf-8")
    assert len(read_recipe(path).steps) == 1
    path.write_text("recipe: [{Nope: {}}]", encoding="utf-8")
    with pytest.raises(SpecError, match="Nope"):
        read_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not a text file"):
        read_recipe(path)
    with pytest.raises(SpecError, match="Cannot read"):
        read_recipe(tmp_path / "none.yaml")
