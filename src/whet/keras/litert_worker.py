"""Run as a script in a process of its own: a frozen TensorFlow graph, or a .keras file, to a float .tflite file.

The converter is native code that can end its process; there is nothing of Whet in this one. Arguments: a JSON file with
"graph" (a GraphDef) or "keras", "tensors" (names of inputs and outputs) and "shapes"; and the path to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any], path: Path) -> None:
    """Convert what `job` names and write it to `path`."""
    import tensorflow as tf

    if "keras" in job:
        frozen = freeze(load(job["keras"]), job["shapes"], job["dtypes"])
    else:
        definition = tf.compat.v1.GraphDef.FromString(Path(job["graph"]).read_bytes())
        wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(definition, name=""), [])
        tensors = wrapped.graph.get_tensor_by_name
        frozen = wrapped.prune([tensors(name) for name in job["inputs"]], [tensors(name) for name in job["outputs"]])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen])
    path.write_bytes(converter.convert())


def load(path: str) -> Any:
    """The model in a .keras file; it takes and returns flat lists."""
    import keras

    return keras.saving.load_model(path, compile=False)


def freeze(model: Any, shapes: list[list[int | None]], dtypes: list[str]) -> Any:
    """A concrete function of `model` in inference mode with its variables as constants; inputs in order, outputs a list."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    specs = [tf.TensorSpec(shape, dtype, name=f"in_{i}") for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]

    def call(*tensors: Any) -> Any:
        outputs = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        return [tf.identity(tensor) for tensor in (outputs if isinstance(outputs, list) else [outputs])]

    function = tf.function(call, input_signature=specs, autograph=False).get_concrete_function()
    return convert_variables_to_constants_v2(function, lower_control_flow=False)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
