"""Data in every form that people hold it, read the same."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest

from whet.data import Batches, concatenate, rows, split, to_numpy
from whet.errors import DataError

N = 10
X = np.arange(N * 6, dtype=np.float32).reshape(N, 2, 3)
Y = np.arange(N)


def cut(size: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, N, size)]


def torch_loader():
    import torch

    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=4)


def torch_stream():
    """A loader that does not know its length."""
    import torch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    return torch.utils.data.DataLoader(Stream(), batch_size=4)


def tf_dataset():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def tf_unknown_length():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda x, y: y >= 0).batch(4)


def py_dataset():
    keras = pytest.importorskip("keras")

    class Set(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return cut()[i]

    return Set()


class OldSequence:
    """Only `__getitem__` and `__len__`, and no IndexError at the end."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return cut()[i % 3]


def generator():
    yield from cut()


def tensors():
    import torch

    return torch.from_numpy(X).requires_grad_(), torch.from_numpy(Y)


FORMS = {
    "list": cut,
    "list of lists": lambda: [list(batch) for batch in cut()],
    "generator": generator,
    "iterator": lambda: iter(cut()),
    "arrays": lambda: (X, Y),
    "torch arrays": tensors,
    "float64 arrays": lambda: (X.astype(np.float64), Y),
    "DataLoader": torch_loader,
    "DataLoader of unknown length": torch_stream,
    "tf.data": tf_dataset,
    "tf.data of unknown length": tf_unknown_length,
    "PyDataset": py_dataset,
    "old sequence": OldSequence,
    "Batches": lambda: Batches(cut(), "other"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_twice_and_the_same(form) -> None:
    batches = Batches(FORMS[form](), "train", batch=4)
    assert len(batches) == 3
    for _ in range(2):
        read = list(batches)
        assert [len(x) for x, _ in read] == [4, 4, 2]
        assert all(x.dtype == np.float32 and isinstance(x, np.ndarray) and np.issubdtype(y.dtype, np.integer) for x, y in read)
        np.testing.assert_array_equal(np.concatenate([x for x, _ in read]), X)
        np.testing.assert_array_equal(np.concatenate([y for _, y in read]), Y)
    np.testing.assert_array_equal(batches.first()[0], X[:4])


def test_a_last_batch_of_one() -> None:
    assert [len(x) for x, _ in Batches((X[:5], Y[:5]), batch=4)] == [4, 1]


def test_whole_arrays_are_shuffled_together_and_from_the_seed() -> None:
    batches = Batches((X, Y), batch=4)
    x, y = (np.concatenate(parts) for parts in zip(*batches.shuffled(3), strict=True))
    np.testing.assert_array_equal(X[y], x)
    assert sorted(y) == list(Y) and list(y) != list(Y)
    np.testing.assert_array_equal(np.concatenate([t for _, t in batches.shuffled(3)]), y)
    assert list(np.concatenate([t for _, t in batches.shuffled(4)])) != list(y)
    np.testing.assert_array_equal(np.concatenate([t for _, t in batches]), Y)


def test_batches_keep_their_own_order() -> None:
    np.testing.assert_array_equal(np.concatenate([t for _, t in Batches(cut()).shuffled(3)]), Y)


def test_inputs_without_targets() -> None:
    for data in (X, [X[:4], X[4:]], [(X[:4],), (X[4:],)], [(X[:4], None), (X[4:], None)]):
        read = list(Batches(data, batch=4))
        assert all(y is None for _, y in read)
        np.testing.assert_array_equal(np.concatenate([x for x, _ in read]), X)


def test_several_inputs_and_targets_keep_their_structure() -> None:
    for data in (((X, X[:, 0]), Y), [((X[:4], X[:4, 0]), Y[:4])], [[[X[:4], X[:4, 0]], Y[:4]]]):
        (a, b), y = Batches(data, batch=4).first()
        assert a.shape == (4, 2, 3) and b.shape == (4, 3) and y.shape == (4,)
    x, (y, z) = Batches((X, (Y, X)), batch=4).first()
    assert x.shape == (4, 2, 3) and y.shape == (4,) and z.shape == (4, 2, 3)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_dict_of_inputs_may_hold_labels(kind) -> None:
    for data in ({"ids": X, "labels": Y}, [kind({"ids": X[:4], "labels": Y[:4]})], [(kind({"ids": X[:4]}), Y[:4])]):
        inputs, targets = Batches(data, batch=4).first()
        assert set(inputs) == {"ids"} and inputs["ids"].shape == (4, 2, 3)
        np.testing.assert_array_equal(targets, Y[:4])
    inputs, targets = Batches(({"ids": X}, Y), batch=4).first()
    assert inputs["ids"].shape == (4, 2, 3) and targets.shape == (4,)
    assert Batches({"ids": X}, batch=4).first()[1] is None


def nan_at(index) -> np.ndarray:
    bad = X.copy()
    bad[index] = np.nan
    return bad


def endless():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(X).batch(4).repeat()


def single_examples():
    import torch

    return torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


def exhausted():
    made = generator()
    list(made)
    return made


REFUSED = [
    (lambda: None, "train is needed here, got None"),
    (lambda: [], "train is empty: it yielded no batch"),
    (lambda: {}, "train is empty"),
    (exhausted, "it may have been read before"),
    (lambda: X[:0], "train is empty: its arrays have no rows"),
    (lambda: 3, "must be an iterable of batches or a tuple of arrays, got a int"),
    (lambda: "file.npz", "got a str"),
    (lambda: (X, Y[:5]), r"must have one first dimension, the examples; got shapes \[\(10, 2, 3\), \(5,\)\]"),
    (lambda: (X, np.float32(1.0)), "must have one first dimension"),
    (lambda: [X, Y], r"is a list, which holds batches.*written as a tuple: \(inputs, targets\)"),
    (lambda: {"a": X, "b": [1, 2]}, "is a dict, whose values must be arrays; 'b' is a list"),
    (single_examples, r"a TensorDataset, which yields single examples. Wrap it: torch.utils.data.DataLoader"),
    (endless, r"never ends. Leave out .repeat\(\)"),
    (lambda: [(X, Y, Y)], "got a sequence of 3.*sample weights are not taken"),
    (lambda: (nan_at((3, 1, 2)), Y), r"inputs of train, batch 0 holds nan at index \(3, 1, 2\)"),
    (lambda: [(X, Y), (nan_at((7, 0, 0)), Y)], r"inputs of train, batch 1 holds nan at index \(7, 0, 0\)"),
    (lambda: [({"a": X, "b": nan_at((0, 0, 0))}, Y)], r"inputs of train, batch 0\['b'\] holds nan"),
    (lambda: [((X, X + np.inf), Y)], r"inputs of train, batch 0\[1\] holds inf"),
    (lambda: [(X, Y * np.nan)], "targets of train, batch 0 holds nan"),
    (lambda: [(X.astype(np.float64) * 1e300, Y)], "holds inf"),  # float32 cannot hold it
    (lambda: [np.asarray(["a", "b"])], "must be numeric arrays of one shape, got ndarray of <U1"),
    (lambda: [([[1.0], [1.0, 2.0]], Y)], "must be numeric arrays of one shape"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused_with_a_message_that_helps(make, message) -> None:
    with pytest.raises(DataError, match=message):
        list(Batches(make(), "train"))


def test_arrays_of_every_framework_and_dtype() -> None:
    import torch

    assert to_numpy(torch.ones(2, dtype=torch.bfloat16), "x").dtype == np.float32
    assert to_numpy(torch.ones(2, dtype=torch.float16), "x").dtype == np.float16
    assert to_numpy(torch.ones(2, 3).T, "x").shape == (3, 2)
    assert to_numpy([1, 2, 3], "x").shape == (3,) and to_numpy([torch.tensor(1), torch.tensor(2)], "x").shape == (2,)
    assert to_numpy(np.asarray([True, False]), "x").dtype == bool and to_numpy(None, "x") is None
    tf = pytest.importorskip("tensorflow")
    assert to_numpy(tf.constant([1.0], tf.bfloat16), "x").dtype == np.float32
    assert to_numpy(tf.Variable([1.0]), "x").dtype == np.float32


def test_the_callers_arrays_are_untouched() -> None:
    mine = X.astype(np.float64)
    before = mine.copy()
    for x, _ in Batches((mine, Y), batch=3):
        x += 1
    np.testing.assert_array_equal(mine, before)


def test_split_and_rows() -> None:
    assert split({"a": 1, "labels": 2}) == ({"a": 1}, 2) and split([1]) == (1, None) and split(5) == (5, None)
    assert rows(X) == rows((X, Y)) == rows({"a": X}) == N and rows(np.float32(1)) == 1


def test_concatenate_keeps_structures() -> None:
    joined = concatenate([{"a": (X[:4], Y[:4])}, {"a": (X[4:], Y[4:])}])
    np.testing.assert_array_equal(joined["a"][0], X)
    np.testing.assert_array_equal(joined["a"][1], Y)
    assert concatenate([None, None]) is None
    assert concatenate([np.float32(1), np.float32(2)]).shape == (2,)
    with pytest.raises(DataError, match=r"different shapes, \(2, 2\) and \(2, 3\)"):
        concatenate([X, X[:, :, :2]])
    with pytest.raises(DataError, match="no batch to join"):
        concatenate([])
