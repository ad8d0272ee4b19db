"""The base class of every section and the number types that sections share."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Gib: TypeAlias = Annotated[float, Field(gt=0, le=1_000_000)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]
"""``auto``: CUDA where there is a GPU, else the CPU."""
Dtype: TypeAlias = Literal["float32", "bfloat16"]


class Schema(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )
