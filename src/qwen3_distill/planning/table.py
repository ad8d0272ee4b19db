"""Shows a plan as a table and as settings."""

from rich.table import Table

from qwen3_distill.config import RunConfig
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning.memory import ENGINES
from qwen3_distill.planning.plan import MemoryPlan
from qwen3_distill.recording.text import gib


def plan_table(plan: MemoryPlan, title: str | None = None) -> Table:
    """Every piece with its size in GiB, and the sum per engine."""
    table = Table(title=title, title_justify="left")
    for column in ("engine", "memory", "GiB", "how"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for engine in ENGINES:
        own = [row for row in plan.rows if row.engine == engine]
        if not own:
            table.add_row(engine, "not here", gib(0))
        for row in own:
            table.add_row(row.label, row.what, gib(row.num_bytes), row.how)
        table.add_row("", "", f"[bold]{gib(plan.engine_bytes(engine))}", end_section=True)
    table.add_row("reserve", "left free", gib(plan.reserve_bytes))
    table.add_row("all", "required", f"[bold]{gib(plan.required_bytes)}")
    table.add_row("", "available", gib(plan.device.free_bytes), plan.device.name)
    return table


def plan_settings(config: RunConfig, plan: MemoryPlan) -> str:
    """The plan as settings for a config, for the engines that have any."""
    settings = []
    for teacher in config.loaded_teachers:
        section = teacher.section
        if section.kind == "embedded" or section.urls:
            continue
        share = plan.teachers[teacher.name]
        if section.kind == "sglang":
            settings.append(f"{teacher.setting}.memory_fraction={share.memory_fraction}")
        settings.append(f"{teacher.setting}.max_total_tokens={share.max_total_tokens}")
    if config.generation.kind == "vllm":
        settings.append(f"generation.kv_cache_gib={plan.vllm_kv_cache_bytes / GIB:.2f}")
    if config.training.kind == "unsloth":
        settings.append(f"training.memory_gib={plan.learner_memory_bytes / GIB:.2f}")
    return " ".join(settings) or "none; the embedded engines allocate as they go"
