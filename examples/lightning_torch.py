"""A LightningModule's own training prunes, learns from a teacher, and then trains for int8; ONNX Runtime runs the file.

    pip install 'whet[torch,onnx,lightning,demo]'
    python examples/lightning_torch.py [--data mnist_train.npz] [--epochs 20]

Without --data it trains on scikit-learn's digits, enlarged to 28x28. An .npz file holds `x` (n, 28, 28) and `y` (n,).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import digits
import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import whet
from whet import QAT, Cubic, Distill, EarlyStopping, Int, Prune, Quantize, SoftTargets
from whet.torch.lightning import WhetCallback


class Classifier(lightning.LightningModule):
    """A module that knows nothing of compression."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def training_step(self, batch: Any, index: int) -> Any:
        """The loss on a batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        """What early stopping watches."""
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    """Train a teacher; prune and teach a student; train it for int8; measure the file."""
    options = digits.options(__doc__)
    train, val, test = digits.large(options.data)
    loaders = [
        DataLoader(TensorDataset(*map(torch.from_numpy, split)), batch_size=64, shuffle=shuffle)
        for split, shuffle in ((train, True), (val, False))
    ]

    def fit(module: Classifier, *callbacks: Any) -> None:
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            callbacks=list(callbacks),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, *loaders)

    lightning.seed_everything(0)
    teacher, student = Classifier(128), Classifier(32)
    fit(teacher)
    taught = Distill([SoftTargets(temperature=4)], student_weight=0.3)

    pruning = WhetCallback(
        [Prune(0.8, schedule=Cubic(end=0.5)), taught],
        teacher=teacher.network,
        early_stopping=EarlyStopping(patience=5),
    )
    fit(student, pruning)

    student.network = whet.torch.prepare(student.network, Quantize(Int(8), qat=QAT()), calibration=val[0], masks=pruning.masks)
    fit(student, WhetCallback([taught], teacher=teacher.network, early_stopping=EarlyStopping(patience=5)))

    small = whet.finish(student.network, example=val[0][:1], masks=pruning.masks)
    with tempfile.TemporaryDirectory() as folder:
        file = small.export(Path(folder) / "student.onnx")
        print(f"teacher        {digits.score(teacher.network, test)}")
        print(f"student, int8  {digits.score(file, test)}, {pruning.sparsity:.0%} of its weights removed")


if __name__ == "__main__":
    main()
