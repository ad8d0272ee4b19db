"""Builds what the cost ledger of a config is computed from."""

from collections.abc import Callable

from qwen3_distill.config import LoraTuning, RunConfig
from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.shapes import ModelShape, read_shape
from qwen3_distill.pipeline.assembly.engines import served_adapter
from qwen3_distill.pipeline.assembly.teachers import teachers_below
from qwen3_distill.pipeline.metering import CostModel

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def build_cost_model(config: RunConfig) -> CostModel:
    """Read the models' shapes; a model without a readable one has the reason in ``unknown``."""
    unknown: dict[str, str] = {}

    def shape_of(role: str, directory: str) -> ModelShape | None:
        try:
            return read_shape(directory)
        except ModelError as error:
            unknown[role] = str(error)
            return None

    student = shape_of("student", config.student.model)
    return CostModel(
        student=student,
        teachers=_teacher_shapes(config, shape_of),
        tuning=config.training.tuning,
        objective=config.objective,
        published_bytes=0 if student is None else _published_bytes(config, student),
        unknown=unknown,
    )


def _teacher_shapes(
    config: RunConfig, shape_of: Callable[[str, str], ModelShape | None]
) -> dict[str | None, tuple[ModelShape, ...] | None]:
    found: dict[str | None, tuple[ModelShape, ...] | None] = {}
    for tag in config.tags or (None,):
        teachers = config.teachers if tag is None else teachers_below(config, tag)
        shapes = [shape_of(one.role, one.section.model) for one in teachers]
        known = tuple(shape for shape in shapes if shape is not None)
        found[tag] = known if len(known) == len(shapes) and known else None
    return found


def _published_bytes(config: RunConfig, student: ModelShape) -> int:
    tuning = served_adapter(config.generation, config.training.tuning)
    if isinstance(tuning, LoraTuning):
        return 4 * student.lora_parameters(tuning.rank, tuning.target_modules)
    return student.weight_bytes(_ITEM_BYTES[config.training.dtype])
