"""Every test process: Keras on TensorFlow, torch imported before TensorFlow, few threads, no GPU, few garbage collections."""

import gc
import os
from collections import Counter

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

gc.disable()  # while modules are imported: there is no garbage among a million objects that stay


LONG = {  # few tests, each of many seconds: begun last, one of them would keep a process busy after the other has ended
    "test_examples.py",
    "test_pages.py",
    "test_removal_transformers.py",
    "test_checkpoints.py",
    "test_fit_callbacks.py",
    "test_jax.py",
    "test_lightning.py",
    "test_transformers_trainer.py",
    "test_training_backends.py",
    "test_training_scale.py",
    "test_qat_mirrored.py",
    "test_real_jobs.py",
}


def pytest_collection_modifyitems(config, items):
    """In several processes (`--dist loadfile --no-loadscope-reorder`): long files first, then those of most tests."""
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name not in LONG, -counts[item.path], str(item.path)))


def pytest_collection_finish():
    """What is imported is not looked through again, and what tests leave, less often: 13 % of a Keras test's seconds."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
