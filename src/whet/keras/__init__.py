"""The Keras 3 side: the verbs of `whet.pipeline.side.Side`, and pieces for your own training loop."""

from whet.keras.blocks import blocks
from whet.keras.callbacks import DistillationCallback, EarlyStoppingCallback, PruningCallback
from whet.keras.convert import convert
from whet.keras.distiller import Distiller
from whet.keras.export import export
from whet.keras.features import with_features
from whet.keras.groups import groups
from whet.keras.inspect import inspect
from whet.keras.losses import (
    binary_soft_targets,
    dist,
    distillation_loss,
    dkd,
    layer_loss,
    logits_mse,
    regression,
    soft_targets,
)
from whet.keras.model import copy, predict, validate
from whet.keras.posttraining import quantize
from whet.keras.prune import Pruner, adopt, prune
from whet.keras.qat import finish, prepare, quantize_aware
from whet.keras.quantize import FakeQuantize, simulate
from whet.keras.regularizers import GroupLassoRegularizer, group_lasso
from whet.keras.removable import kept, removable, timed_layers
from whet.keras.removal import borrow, own, remove
from whet.keras.store import load_model, save_model
from whet.keras.training import search_rates, train
from whet.keras.variants import variants

FRAMEWORK = "keras"

__all__ = [
    "FRAMEWORK",
    "DistillationCallback",
    "Distiller",
    "EarlyStoppingCallback",
    "FakeQuantize",
    "GroupLassoRegularizer",
    "Pruner",
    "PruningCallback",
    "adopt",
    "binary_soft_targets",
    "blocks",
    "borrow",
    "convert",
    "copy",
    "dist",
    "distillation_loss",
    "dkd",
    "export",
    "finish",
    "group_lasso",
    "groups",
    "inspect",
    "kept",
    "layer_loss",
    "load_model",
    "logits_mse",
    "own",
    "predict",
    "prepare",
    "prune",
    "quantize",
    "quantize_aware",
    "regression",
    "removable",
    "remove",
    "save_model",
    "search_rates",
    "simulate",
    "soft_targets",
    "timed_layers",
    "train",
    "validate",
    "variants",
    "with_features",
]
