"""Masks from pruning to the exported file: through distillation and quantization-aware training, in both frameworks."""

import numpy as np
import pytest

import whet
from bench import FRAMEWORKS, bench
from whet import NM, QAT, Cubic, Distill, Prune, Quantize, Train
from whet.runtimes.content import read_dtypes

QUIET = {"progress": False}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("pruning", [{"sparsity": 0.75}, {"granularity": NM(2, 4)}], ids=["weights", "2:4"])
def test_pruned_distilled_and_trained_in_integers_the_file_is_as_sparse(framework, pruning, tmp_path) -> None:
    b = bench(framework)
    model, data = b.build(), {"train": b.data(96), "val": b.data(48, 1), **QUIET}
    together = Train(epochs=2, apply=(Prune(schedule=Cubic(frequency=1), **pruning), Distill()))
    sparse = whet.fit(model, together, teacher=model, **data)
    made = whet.quantize(sparse, Quantize(qat=QAT(epochs=2)), fit=None, calibration=b.data(64)[0], **data)
    assert made.masks.keys() == sparse.masks.keys() != set()
    file = made.export(tmp_path / f"model{b.suffix}")
    codes = b.codes(file)
    assert read_dtypes(file)["stored"]["int8"] >= sum(mask.size for mask in made.masks.values())
    for name, mask in made.masks.items():
        np.testing.assert_array_equal(mask, sparse.masks[name])
        (stored,) = [array for array in codes if array.size == mask.size]
        assert (stored == 0).sum() >= (mask == 0).sum() == round((0.5 if "granularity" in pruning else 0.75) * mask.size)
        if "granularity" in pruning and stored.ndim == 2:
            rows = stored if framework == "torch" or stored.shape[1] % 4 == 0 else stored.T
            assert ((rows.reshape(-1, 4) != 0).sum(1) <= 2).all()
