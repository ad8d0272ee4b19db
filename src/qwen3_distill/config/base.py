"""The base class of every section and the number types that sections share."""

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qwen3_distill.utils.paths import plain_path

PositiveInt: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""Counts are kept as 32-bit integers in places."""
NonNegativeInt: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
PositiveFloat: TypeAlias = Annotated[float, Field(ge=1e-30, le=1e6)]
"""Bounds within which a square and a quotient are finite in float32."""
Seconds: TypeAlias = Annotated[float, Field(ge=0.01, le=1e7)]
"""A time limit: from 10 ms to 115 days."""
Threads: TypeAlias = Annotated[int, Field(ge=1, le=1024)]
Gib: TypeAlias = Annotated[float, Field(gt=0, le=1_000_000)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]
"""``auto``: CUDA where there is a GPU, else the CPU."""
PathText: TypeAlias = Annotated[str, AfterValidator(plain_path)]
"""A path on this machine, or a hub id where the setting says so. ``~`` is the home directory; a URL
and a variable are refused."""
Dtype: TypeAlias = Literal["float32", "bfloat16"]


class Schema(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # it may hold a secret
    )
