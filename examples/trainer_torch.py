"""A Hugging Face Trainer prunes a small BERT while a larger one teaches it, and then trains it for int8.

    pip install 'whet[torch,onnx,transformers,demo]'
    python examples/trainer_torch.py [--epochs 10]

The models are made here and nothing is downloaded: they read digits as sentences of 16 words: every patch of
2x2 pixels, black or white, is one of 16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import digits
import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import whet
from whet import QAT, Cubic, Distill, Int, Prune, Quantize, SoftTargets
from whet.torch.transformers import WhetCallback

WORDS, LENGTH = 16, 16


def sentences(split: digits.Split, count: int) -> list[dict[str, Any]]:
    """Images (n, 8, 8) as rows of 16 words with their label."""
    dark = (split[0][:count] > 0.3).astype(np.int64)
    patches = dark.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, LENGTH, 4)
    words = patches @ np.array([1, 2, 4, 8])
    return [{"input_ids": torch.from_numpy(row), "labels": int(label)} for row, label in zip(words, split[1], strict=False)]


def bert(layers: int) -> Any:
    """A BERT of so many layers."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": LENGTH}
    small: dict[str, Any] = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=WORDS, num_hidden_layers=layers, num_labels=10, **sizes, **small)
    return BertForSequenceClassification(config)


def main() -> None:
    """Train a teacher; prune and teach a student; train it for int8; measure the file."""
    options = digits.options(__doc__, epochs=10)
    train, val, test = digits.load()
    rows = sentences(train, 997)
    inputs, labels = ({"input_ids": np.stack([row["input_ids"] for row in sentences(test, 400)])}, test[1])

    def fit(model: Any, rate: float, *callbacks: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=32,
                learning_rate=rate,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=0,
            )
            Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()
        return model.eval()

    torch.manual_seed(0)
    teacher, student = fit(bert(layers=2), 3e-3), bert(layers=1)
    taught = Distill([SoftTargets(temperature=2)])

    pruning = WhetCallback([Prune(0.6, schedule=Cubic(end=0.5)), taught], teacher=teacher)
    fit(student, 3e-3, pruning)

    calibration = {"input_ids": np.stack([row["input_ids"] for row in sentences(val, 128)])}
    prepared = whet.torch.prepare(student, Quantize(Int(8), qat=QAT()), calibration=calibration, masks=pruning.masks)
    fit(prepared, 3e-4, WhetCallback([taught], teacher=teacher))

    one = {"input_ids": calibration["input_ids"][:1]}
    small = whet.finish(prepared, example=one, masks=pruning.masks)
    with tempfile.TemporaryDirectory() as folder:
        file = small.export(Path(folder) / "student.onnx")
        print(f"teacher        {digits.score(teacher, (inputs, labels))}")
        print(f"student, int8  {digits.score(file, (inputs, labels))}, {pruning.sparsity:.0%} of its weights removed")


if __name__ == "__main__":
    main()
