"""The PyTorch side: the verbs of `whet.pipeline.side.Side`, and pieces for your own training loop."""

from whet.torch.blocks import blocks
from whet.torch.borrowing import borrow, own
from whet.torch.convert import convert
from whet.torch.export import export
from whet.torch.groups import groups
from whet.torch.handover import from_torch_prune_, to_torch_prune_
from whet.torch.inspect import inspect
from whet.torch.losses import (
    binary_soft_targets,
    dist,
    distillation_loss,
    dkd,
    layer_loss,
    logits_mse,
    regression,
    soft_targets,
)
from whet.torch.model import copy, predict, validate
from whet.torch.posttraining import quantize
from whet.torch.prune import Pruner, prune
from whet.torch.qat import finish, prepare, quantize_aware
from whet.torch.quantize import simulate
from whet.torch.regularizers import group_lasso
from whet.torch.removable import kept, removable, timed_layers
from whet.torch.removal import remove
from whet.torch.store import load_model, save_model
from whet.torch.torchao_tensors import to_torchao
from whet.torch.training import search_rates, train
from whet.torch.variants import variants

FRAMEWORK = "torch"
adopt = from_torch_prune_

__all__ = [
    "FRAMEWORK",
    "Pruner",
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
    "from_torch_prune_",
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
    "to_torch_prune_",
    "to_torchao",
    "train",
    "validate",
    "variants",
]
