"""Who teaches: models, stored outputs, or the model itself as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whet.data import Batches
from whet.errors import ModelError
from whet.graph.teacher_store import StoredOutputs, write_outputs
from whet.pipeline.compressed import Compressed, plain_model
from whet.pipeline.side import side_of


def teacher_outputs(
    teacher: Any,
    data: Any,
    store: str | os.PathLike[str],
    *,
    transform: Callable[[Any], Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> StoredOutputs:
    """Write what `teacher` returns for all of `data` into the folder `store`, once; the result is a `teacher` for training.

    `teacher` is a model of either framework, a `Compressed`, or an exported file (.onnx, .tflite, …) run by its runtime. `data`
    is what the student will train on, in any order then; where the teacher takes it in another form, `transform(inputs)` makes
    it of a batch's inputs: `lambda x: x.transpose(0, 2, 3, 1)`. A run that was interrupted goes on where it was; a store that
    is there already is checked against the data and the teacher, and is not written again.

    Raises:
        OutputError: `store` holds something else, or cannot be written. DataError: it is of other data or another order.
        ModelError: it is another teacher's, or the teacher returns NaN. RuntimeFileError: the file cannot be run.
    """
    batches = Batches(data, "data")
    predict, name = _predictor(teacher)
    chosen = predict if transform is None else lambda inputs: predict(transform(inputs))
    return write_outputs(chosen, name, batches, Path(store), overwrite=overwrite, progress=progress)


def teachers_of(teacher: Any, model: Any) -> Any:
    """What a side takes as teacher: a model, stored outputs, or a tuple of them. `True` is `model` as it is now.

    Raises:
        ModelError: a path, whose file only teaches through its stored outputs.
    """
    if teacher is True:
        plain = plain_model(model)
        return side_of(plain).copy(plain)
    if isinstance(teacher, list | tuple):
        return tuple(teachers_of(one, model) for one in teacher)
    if isinstance(teacher, str | os.PathLike):
        raise ModelError(
            f"The file {str(teacher)!r} cannot teach while training. Write its outputs once, "
            "whet.teacher_outputs(file, train, store), and pass the result as teacher. A store that is there already is "
            "whet.StoredOutputs(store)."
        )
    return plain_model(teacher)


def _predictor(teacher: Any) -> tuple[Callable[[Any], Any], str]:
    if isinstance(teacher, str | os.PathLike):
        from whet.runtimes.sessions import open_session

        return open_session(teacher).run, Path(teacher).name
    plain = plain_model(teacher)
    side = side_of(plain)
    name = type(plain).__name__ if not isinstance(teacher, Compressed) else f"compressed {type(plain).__name__}"
    return lambda inputs: side.predict(plain, inputs), name
