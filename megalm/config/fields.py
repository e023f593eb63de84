"""The types that the sections of a recipe are made of: numbers with their ranges, names with their choices."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from megalm.config.choices import CHOICES
from megalm.registry import unknown_name

LARGEST_COUNT = 2**40
LARGEST_ENUMERATED = 2**17  # layers, heads, ranks of an axis: what is gone through one by one
LARGEST_SEED = 2**63 - 1


def one_of(kind: str) -> AfterValidator:
    """Return a validator that accepts the names of `CHOICES[kind]` and suggests one for any other."""

    def check(value: str) -> str:
        if value not in CHOICES[kind]:
            hint = unknown_name(value, CHOICES[kind])
            raise PydanticCustomError("unknown_choice", "unknown {kind}; {hint}", {"kind": kind, "hint": hint})
        return value

    return AfterValidator(check)


def as_tuple(value: Any) -> Any:
    """Turn YAML's list into the tuple that a frozen section holds; leave the rest for the type check."""
    return tuple(value) if isinstance(value, list) else value


Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Positive = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Few = Annotated[int, Field(ge=1, le=LARGEST_ENUMERATED)]
Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen part of a recipe: strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
