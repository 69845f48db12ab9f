"""Specs: WHAT to do, as frozen dataclasses without arrays or framework types."""

from whet.specs import vocabulary
from whet.specs.base import from_dict, to_dict
from whet.specs.schemes import Granularity, Scheme
from whet.specs.target import TARGETS, find_target
from whet.specs.vocabulary import *  # noqa: F403

__all__ = ["TARGETS", "Granularity", "Scheme", "find_target", "from_dict", "to_dict"]
__all__ += vocabulary.__all__
