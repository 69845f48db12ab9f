"""A disk that is full, a folder that may not be written: one clear error, and nothing half-written."""

import os
import subprocess
import sys

import numpy as np
import pytest

from whet.errors import OutputError

pytest.importorskip("torch")
SUFFIXES = {
    "onnxruntime": (".onnx", "onnxruntime"),
    "openvino": (".xml", "openvino"),
    "executorch": (".pte", "executorch"),
}


@pytest.fixture(scope="module")
def tiny_disk(tmp_path_factory):
    """A folder on a disk of 16 kB."""
    folder = tmp_path_factory.mktemp("tiny")
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def quantized(target=None):
    """A model of 22,000 weights: its smallest file does not fit on the tiny disk."""
    import torch

    import whet

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
    inputs = np.random.default_rng(0).random((16, 100), np.float32)
    return whet.quantize(model, whet.Quantize(), calibration=inputs, target=target, progress=False)


@pytest.mark.parametrize("target", SUFFIXES)
def test_an_export_to_a_full_disk_leaves_nothing(tiny_disk, target):
    suffix, package = SUFFIXES[target]
    pytest.importorskip(package)
    (tiny_disk / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(OutputError, match=r"(?i)no space"):
        quantized(target).export(tiny_disk / f"model{suffix}")
    assert [path.name for path in tiny_disk.iterdir()] == ["mine.txt"]
    assert (tiny_disk / "mine.txt").read_text(encoding="utf-8") == "kept"


def test_a_litert_export_to_a_full_disk_leaves_nothing(tiny_disk, monkeypatch):
    keras = pytest.importorskip("keras")
    pytest.importorskip("ai_edge_litert")
    import bench
    import whet

    bench.convert_in_process(monkeypatch)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(200, activation="relu"), keras.layers.Dense(10)])
    inputs = np.random.default_rng(0).random((16, 100), np.float32)
    small = whet.quantize(model, calibration=inputs, target="litert", progress=False)
    before = sorted(path.name for path in tiny_disk.iterdir())
    with pytest.raises(OutputError, match=r"(?i)no space"):
        small.export(tiny_disk / "model.tflite")
    assert sorted(path.name for path in tiny_disk.iterdir()) == before


def test_a_saved_folder_and_a_report_leave_nothing(tiny_disk):
    from report_samples import sample_report
    from whet.records import Report
    from whet.report.html import write_html

    with pytest.raises(OutputError, match=r"(?i)no space"):
        quantized().save(tiny_disk / "saved")
    with pytest.raises(OutputError, match=r"(?i)no space"):
        write_html(Report(sample_report()), tiny_disk / "page.html")
    assert [path.name for path in tiny_disk.iterdir() if path.name != "mine.txt"] == []


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, sys.argv[2])
from report_samples import sample_report
from whet.errors import OutputError
from whet.records import Report
from whet.report.html import write_html
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_html(Report(sample_report()), sys.argv[1] + "/page.html")
except OutputError as error:
    print(error)
"""


def test_a_quota_on_file_sizes_leaves_nothing(tmp_path):
    """Without root too: the system refuses files above 4 kB."""
    pytest.importorskip("resource")
    support = os.path.join(os.path.dirname(__file__), os.pardir, "support")
    ran = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path), support], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "Cannot write" in ran.stdout and "File too large" in ran.stdout
    assert list(tmp_path.iterdir()) == []


READ_ONLY = """
import os, sys
os.setuid(65534)
try:
    from whet.files import replacing
    with replacing(sys.argv[1] + "/model.onnx") as path:
        path.write_bytes(b"x")
except OSError as error:
    print(type(error).__name__, error)
"""


def test_a_folder_that_may_not_be_written(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # root may write everywhere: ask as nobody, with the code preloaded
        program = READ_ONLY.replace("import os, sys", "import os, sys\nimport whet.files, encodings.idna")
    else:
        folder.chmod(0o500)
        program = READ_ONLY.replace("os.setuid(65534)", "")
    ran = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)
    assert ran.stdout.startswith("OutputError Cannot write to"), ran.stderr
    assert "Permission denied" in ran.stdout and "folder you may write to" in ran.stdout
    assert list(folder.iterdir()) == []
