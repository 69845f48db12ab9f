"""Exported programs (.pt2): PyTorch reads them back and computes the same."""

import numpy as np
import pytest
import torch
from torch import nn

import whet
from whet import errors
from whet.runtimes.content import read_dtypes
from whet.runtimes.sessions import open_session

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 36, 4)

    def forward(self, *, image, shift):
        h = torch.relu(self.norm(self.conv(image))) + shift
        return {"features": h, "logits": self.head(h.flatten(1))}


DATA = {"image": X, "shift": RNG.normal(size=(32, 6, 1, 1)).astype(np.float32)}


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    return whet.quantize(model, calibration=[DATA], target="torch", example=DATA, progress=False)


@pytest.fixture(scope="module")
def path(made, tmp_path_factory):
    return made.export(tmp_path_factory.mktemp("pt2") / "model.pt2")


def test_a_program_gives_the_simulation_at_any_batch_size_and_keeps_names(made, path):
    session = open_session(path, threads=1)
    assert [slot.name for slot in session.inputs] == ["image", "shift"]
    assert [slot.name for slot in session.outputs] == ["features", "logits"]
    for rows in (1, 5, 32):
        batch = {key: value[:rows] for key, value in DATA.items()}
        with torch.no_grad():
            expected = made.model(**{key: torch.from_numpy(value) for key, value in batch.items()})
        features, logits = session.run(batch)
        np.testing.assert_allclose(features, expected["features"].numpy(), atol=1e-5)
        np.testing.assert_allclose(logits, expected["logits"].numpy(), atol=1e-4)


def test_a_program_stores_integers_and_says_that_it_computes_in_float(path):
    types = read_dtypes(path)
    assert types["stored"]["int8"] == 3 * 6 * 9 + 6 * 36 * 4
    assert types["stored"]["int32"] == 4 * (6 + 4)
    assert types["computed"]["conv2d"] == {"float32/int8": 1}
    assert types["computed"]["linear"] == {"float32/int8": 1}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None], ids=["empty", "foreign", "truncated"])
def test_a_damaged_program_is_one_clear_error(path, tmp_path, content):
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(errors.RuntimeFileError, match=r"bad\.pt2"):
        open_session(bad)


def test_whet_load_does_not_read_a_program(path):
    with pytest.raises(errors.WhetError):
        whet.load(path, Net())
