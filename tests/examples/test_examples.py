"""The programs of examples/, run as a reader would, on few epochs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(name, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_distillation_in_pytorch_prints_all_three():
    lines = _run("distill_torch.py", "--epochs", "2").splitlines()
    assert [line[:16].strip() for line in lines] == ["teacher", "student, alone", "student, taught"]
    assert all(re.search(r"\d+\.\d % \[\d+\.\d, \d+\.\d\] of 400 test images", line) for line in lines)


def test_pruning_in_pytorch_says_what_to_expect_and_packs_to_less_than_half():
    out = _run("prune_torch.py", "--epochs", "2")
    assert "granularity=Channel()" in out
    dense, sparse = (int(re.search(rf"{name} +([\d,]+) bytes packed", out)[1].replace(",", "")) for name in ("dense", "sparse"))
    assert sparse < 0.5 * dense


def test_quantization_in_keras_reports_an_int8_file():
    out = _run("quantize_keras.py", "--epochs", "1")
    assert "FULLY_CONNECTED int8 ×3" in re.sub(r"\s+", " ", out)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("lightning_torch.py", ("lightning",)),
        ("trainer_torch.py", ("transformers", "accelerate")),
        ("fit_keras.py", ("keras",)),
    ],
)
def test_loops_of_others_end_in_a_quantized_file_without_most_weights(name, needs):
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    teacher, student = _run(name, "--epochs", "2").splitlines()[-2:]
    assert re.match(r"teacher +\d+\.\d % .* of 400 test images", teacher)
    found = re.match(r"student, int8 +\d+\.\d % .* of 400 test images, (\d+)% of its weights removed", student)
    assert found and int(found[1]) in (60, 80)


def test_help_says_what_data_it_takes():
    assert "--data" in _run("prune_torch.py", "--help")  # of digits.py, as the others'
