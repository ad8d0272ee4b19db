"""The base class of every section and the number types that sections share."""

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qwen3_distill.utils.paths import plain_path

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Gib: TypeAlias = Annotated[float, Field(gt=0, le=1_000_000)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
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
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # it may hold a secret
    )
