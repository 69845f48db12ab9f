"""What a row of the audit says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A model of the zoo, and what quantizing it to 8 bits must come to.

    name: the number of the case, and what is odd. build: the model and a batch of inputs. weights: how many leave as
    integers. listed: every layer that stays in float, and a word of the reason. refused: what quantizing says instead;
    unwritten: what writing the file says.
    """

    name: str
    build: Callable[[], tuple[Any, Any]]
    weights: int = 0
    listed: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None
    unwritten: str | None = None
