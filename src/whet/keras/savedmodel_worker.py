"""Run as a script in a process of its own, under TensorFlow: a .keras file to a SavedModel folder.

There is nothing of Whet in this process. Arguments: a JSON file with "keras" (the file), "names", "shapes" and "dtypes" of the
inputs and "outputs" (their names); and the folder to write.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(job: dict[str, Any], folder: str) -> None:
    """Load the model that `job` names, and write it."""
    import keras

    write(keras.saving.load_model(job["keras"], compile=False), job, folder)


def write(model: Any, job: dict[str, Any], folder: str) -> None:
    """Write `model`, which takes and returns flat lists, with one signature: inputs and outputs under their names."""
    import tensorflow as tf

    inputs = zip(job["names"], job["shapes"], job["dtypes"], strict=True)
    specs = [tf.TensorSpec(shape, dtype, name=name) for name, shape, dtype in inputs]

    def serve(*tensors: Any) -> Any:
        outputs = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        return dict(zip(job["outputs"], outputs if isinstance(outputs, list) else [outputs], strict=True))

    # Not keras.export.ExportArchive, which stores every variable twice.
    module = tf.Module()
    module.serve = tf.function(serve, input_signature=specs, autograph=False)
    module.kept = list(module.serve.get_concrete_function().variables)
    tf.saved_model.save(module, folder, signatures={"serving_default": module.serve})


if __name__ == "__main__":
    main(json.loads(open(sys.argv[1], encoding="utf-8").read()), sys.argv[2])
