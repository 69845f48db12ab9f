import pytest

import runtime_files


@pytest.fixture(scope="session")
def onnx_float(tmp_path_factory):
    """A float ONNX file and its weights."""
    return runtime_files.onnx_file(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def onnx_int8(onnx_float):
    return runtime_files.quantized_onnx(onnx_float[0])


@pytest.fixture(scope="session")
def litert(tmp_path_factory):
    """A Keras model and its .tflite files by kind."""
    return runtime_files.tflite_files(tmp_path_factory.mktemp("litert"))
