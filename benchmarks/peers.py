"""How others quantize the same model from the same images: each writes a file that its own runtime runs.

`PEERS` holds, for each, a function of the float ONNX file, the calibration batches (arrays) and the path of the file to write.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from executorch_part import pt2e

Peer = Callable[[Path, list[Any], Path], None]


def static(method: str = "MinMax", bits: int = 8) -> Peer:
    """ONNX Runtime's quantize_static, with its defaults for x86 but for the weights' bits and how ranges are found."""

    def work(model: Path, batches: list[Any], path: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.items = iter([{"x": batch} for batch in batches])

            def get_next(self) -> Any:
                return next(self.items, None)

        quantize_static(
            str(model),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type={8: QuantType.QInt8, 4: QuantType.QInt4}[bits],
            calibrate_method=CalibrationMethod[method],
        )

    return work


def nncf_onnx(model: Path, batches: list[Any], path: Path) -> None:
    """NNCF, on the ONNX file, with its defaults."""
    import nncf
    import onnx

    data = nncf.Dataset([{"x": batch} for batch in batches])
    onnx.save(nncf.quantize(onnx.load(model), data, subset_size=len(batches)), path)


def nncf_openvino(model: Path, batches: list[Any], path: Path) -> None:
    """NNCF, on an OpenVINO model, with its defaults."""
    import nncf
    import openvino

    opened = openvino.Core().read_model(str(model))
    made = nncf.quantize(opened, nncf.Dataset(batches), subset_size=len(batches))
    openvino.save_model(made, path, compress_to_fp16=False)


PEERS: dict[str, tuple[str, Peer]] = {  # and the target whose runtime runs the file
    "ONNX Runtime quantize_static, MinMax": ("onnxruntime", static("MinMax")),
    "ONNX Runtime quantize_static, Entropy": ("onnxruntime", static("Entropy")),
    "ONNX Runtime quantize_static, Percentile": ("onnxruntime", static("Percentile")),
    "NNCF, on ONNX": ("onnxruntime", nncf_onnx),
    "NNCF, on OpenVINO": ("openvino", nncf_openvino),
    "torchao PT2E, XNNPACKQuantizer": ("executorch", pt2e),
}
