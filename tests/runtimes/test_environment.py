import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from whet.runtimes.environment import environment, parse_cpuinfo, usable_cores

X86 = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu avx avx2 fma avx512f avx512_vnni hypervisor
processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes asimdhp asimddp i8mm bf16
CPU implementer\t: 0x41
"""


def test_features_that_kernels_choose_by():
    assert parse_cpuinfo(X86) == ("Some CPU @ 2.00GHz", ["avx", "avx2", "fma", "avx512f", "avx512_vnni"])
    assert parse_cpuinfo(ARM) == (None, ["neon", "fp16", "dotprod", "i8mm", "bf16"])
    assert parse_cpuinfo("nothing here") == (None, None)


def test_the_environment_names_versions_and_no_machine():
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == version("numpy") and "onnxruntime" in found["packages"]
    assert 1 <= found["cores"] <= os.cpu_count() and found["cores"] == usable_cores()
    assert found["memory_bytes"] > 2**28
    text = json.dumps(found)
    assert platform.node() not in text and os.path.expanduser("~") + "/" not in text
    assert found["cpu_features"] is not None or found["cpu_features_reason"]


def test_a_system_without_cpuinfo_says_so(monkeypatch):
    real = Path.read_text

    def missing(self, *args, **kwargs):
        if str(self).startswith("/proc"):
            raise FileNotFoundError(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    found = environment()
    assert found["cpu_features"] is None and "/proc/cpuinfo" in found["cpu_features_reason"]


def test_looking_imports_no_framework():
    code = (
        "import sys; from whet.runtimes.environment import environment; from whet.runtimes.targets import available;"
        "environment(); available();"
        "print([m for m in ('torch', 'keras', 'tensorflow', 'onnxruntime', 'onnx', 'ai_edge_litert') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
