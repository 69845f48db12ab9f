"""A training that is killed goes on where it was, and ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import killed_job
import whet
from torch_parts import examples, same_state, small, state_of
from whet.errors import OutputError
from whet.graph.checkpoints import Checkpoint
from whet.specs import Train

PRUNING = 12  # batches that the first phase trains on
BATCHES = {"torch": 35, "keras": 36}  # that the whole job reads


def _killed(framework, out, batches):
    """Run in a process of its own and kill -9 that after so many batches were read."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONHASHSEED": "0"}
    command = [sys.executable, killed_job.__file__, framework, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    told = len(list(islice((line for line in process.stdout if line == "batch\n"), batches)))
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert told == batches, errors[-3000:]
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_job_killed_in_quantization_aware_training_ends_as_one_that_was_not(framework, tmp_path):
    _killed(framework, tmp_path / "out", BATCHES[framework] - 6)  # in the second epoch of three
    assert [path.name for path in sorted((tmp_path / "out" / "checkpoints").glob("*.safetensors"))] == [
        "recipe-1-step-1.safetensors",
        "recipe-1-step-2.safetensors",
    ]
    again, rest = killed_job.run(framework, tmp_path / "out")
    whole, batches = killed_job.run(framework, tmp_path / "whole")
    assert batches == BATCHES[framework] and rest < batches - PRUNING  # the first phase was not trained again
    assert sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors")) == []
    assert not (tmp_path / "whole" / "checkpoints").exists()
    notes = [step.pop("notes") for step in again["steps"]]
    for step in whole["steps"]:
        step.pop("notes")
    assert again == whole
    assert [note[-1] for note in notes] == [f"continued from the checkpoint after epoch {epoch}" for epoch in (3, 1)]
    assert (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / "checkpoints").exists()


def test_fit_goes_on_from_its_checkpoint_and_a_finished_one_is_not_trained_again(tmp_path):
    file, data, spec = tmp_path / "fit.safetensors", examples(), Train(epochs=2, learning_rate=0.01)
    options = {"train": data, "val": data, "progress": False}
    whole = whet.fit(small(0.3), spec, **options)
    first = whet.fit(small(0.3), spec, checkpoint=file, **options)
    again = whet.fit(small(0.3), spec, checkpoint=file, **options)
    assert same_state(state_of(whole.model), state_of(first.model)) and same_state(state_of(first.model), state_of(again.model))
    assert again.steps[0].train["notes"][-1] == "continued from the checkpoint after epoch 2"
    assert again.steps[0].train["history"] == first.steps[0].train["history"] == whole.steps[0].train["history"]


def test_a_checkpoint_of_another_training_is_refused_and_kept(tmp_path):
    file, data = tmp_path / "fit.safetensors", examples()
    options = {"train": data, "progress": False, "checkpoint": file}
    whet.fit(small(), Train(epochs=1), **options)
    before = file.read_bytes()
    with pytest.raises(OutputError, match=r"checkpoint of another training: its spec is .*\"epochs\": 1.*\"epochs\": 2"):
        whet.fit(small(), Train(epochs=2), **options)
    with pytest.raises(OutputError, match="its model is"):
        whet.fit(small(seed=1), Train(epochs=1), **options)
    with pytest.raises(OutputError, match="its train data is"):
        whet.fit(small(), Train(epochs=1), **options | {"train": (data[0] + 1, data[1])})
    with pytest.raises(OutputError, match="its seed is 0, and here it is 1"):
        whet.fit(small(), Train(epochs=1), seed=1, **options)
    assert file.read_bytes() == before


def test_a_damaged_checkpoint_is_named(tmp_path):
    file = tmp_path / "fit.safetensors"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(OutputError, match=r"fit\.safetensors.* is no checkpoint that can be read .* Remove it to begin again"):
        whet.fit(small(), Train(epochs=1), train=examples(), progress=False, checkpoint=file)


def test_trees_come_back_bit_for_bit_and_what_a_killed_process_left_is_cleared(tmp_path):
    path = Path(tmp_path) / "t.safetensors"
    (tmp_path / ".t.safetensors.left").mkdir()
    tree = {
        "a": [np.arange(6, dtype=np.int16).reshape(2, 3), None, True, 1.5, "x"],
        "b": {"0": np.float32(2), "nan": np.array([np.nan, -0.0, np.inf]), "empty": np.zeros((0, 3), np.float16)},
        "c": np.array(7, np.uint64),
    }
    checkpoint = Checkpoint(path, {"seed": 3})
    assert checkpoint.read() is None and list(tmp_path.iterdir()) == []
    checkpoint.write(tree)
    found = checkpoint.read()
    assert found["a"][1:] == [None, True, 1.5, "x"] and list(found) == ["a", "b", "c"]
    pairs = [(tree["a"][0], found["a"][0]), (tree["c"], found["c"]), *((tree["b"][key], found["b"][key]) for key in tree["b"])]
    for left, right in pairs:
        assert left.dtype == right.dtype and left.shape == right.shape and np.asarray(left).tobytes() == right.tobytes()
