"""Every test process: Keras on TensorFlow, torch imported before TensorFlow, few threads, no GPU, few garbage collections."""

import gc
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

gc.disable()  # while modules are imported: there is no garbage among a million objects that stay


def pytest_collection_finish():
    """What is imported is not looked through again, and what tests leave, less often: 13 % of a Keras test's seconds."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
