"""Specs: WHAT to do, as frozen dataclasses without arrays or framework types."""

from whet.specs.base import from_dict, to_dict
from whet.specs.distillation import Distill, SoftTargets
from whet.specs.pruning import Cubic, Global, Magnitude, OneShot, Prune, Uniform, Weight
from whet.specs.quantization import Float, Granularity, Int, MinMax, PerChannel, PerTensor, Quantize
from whet.specs.recipe import Budget, Metric, Recipe
from whet.specs.target import TARGETS, Target, find_target
from whet.specs.training import EarlyStopping, Train

__all__ = [
    "TARGETS",
    "Budget",
    "Cubic",
    "Distill",
    "EarlyStopping",
    "Float",
    "Global",
    "Granularity",
    "Int",
    "Magnitude",
    "Metric",
    "MinMax",
    "OneShot",
    "PerChannel",
    "PerTensor",
    "Prune",
    "Quantize",
    "Recipe",
    "SoftTargets",
    "Target",
    "Train",
    "Uniform",
    "Weight",
    "find_target",
    "from_dict",
    "to_dict",
]
