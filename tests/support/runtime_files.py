"""Small exported files for the runtimes' tests, made by the runtimes' own tools and not by Whet's exporters."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from pathlib import Path

import numpy as np


def onnx_file(
    folder: Path, *, batch: int | str = "n", outputs: int = 1, bias: bool = True
) -> tuple[Path, dict[str, np.ndarray]]:
    """Conv, Relu, Flatten, Gemm on (batch, 1, 8, 8) as float ONNX, and its weights; 2 `outputs` add the features."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(4, 1, 3, 3)), "w2": rng.normal(size=(10, 144)) / 12}
    if bias:
        weights |= {"b1": rng.normal(size=4), "b2": rng.normal(size=10)}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1", *(["b1"] if bias else [])], ["c"], name="conv", kernel_shape=[3, 3]),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("Flatten", ["r"], ["f"], name="flatten"),
            helper.make_node("Gemm", ["f", "w2", *(["b2"] if bias else [])], ["y"], name="gemm", transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info(*item) for item in (("y", 1, [batch, 10]), ("f", 1, [batch, 144]))[:outputs]],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "float.onnx"
    onnx.save(model, str(path))
    return path, weights


def quantized_onnx(path: Path, *, keep: tuple[str, ...] = ()) -> Path:
    """`path` quantized by ONNX Runtime's own tool: QDQ, uint8 activations, int8 weights per channel; `keep` stays float."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            self.batches = iter([{"x": rng.random((16, 1, 8, 8), np.float32)} for _ in range(4)])

        def get_next(self):
            return next(self.batches, None)

    logging.disable(logging.WARNING)
    try:
        quantize_static(
            str(path),
            str(path.with_name("int8.onnx")),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(keep),
        )
    finally:
        logging.disable(logging.NOTSET)
    return path.with_name("int8.onnx")


def tflite_files(folder: Path) -> tuple[object, dict[str, Path]]:
    """A Keras CNN on (8, 8, 1), large enough that LiteRT's converter stores integers, and its files by kind."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, activation="relu", bias_initializer="normal")(inputs)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(32, bias_initializer="normal")(x))
    images = np.random.default_rng(0).random((20, 1, 8, 8, 1), np.float32)
    files = {}
    for kind in ("float", "int8", "int8_io", "float16", "dynamic"):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if kind != "float":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if kind.startswith("int8"):
            converter.representative_dataset = lambda: ([image] for image in images)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        if kind == "int8_io":
            converter.inference_input_type = converter.inference_output_type = tf.int8
        if kind == "float16":
            converter.target_spec.supported_types = [tf.float16]
        files[kind] = folder / f"{kind}.tflite"
        with contextlib.redirect_stdout(io.StringIO()):
            files[kind].write_bytes(converter.convert())
    return model, files
