"""Plans the memory of every kind of card of a cluster: which engines lie on it, and do they fit."""

from dataclasses import dataclass

from qwen3_distill.config import ClusterEngines, RunConfig
from qwen3_distill.config.cluster import OWN, WITH_LEARNER
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.shapes import ModelShape, read_shape
from qwen3_distill.planning.device import DeviceMemory
from qwen3_distill.planning.memory import Engine
from qwen3_distill.planning.plan import MemoryPlan, lay_out, make_plan, planned_device


@dataclass(frozen=True, kw_only=True)
class CardPlan:
    """The plan of cards that hold the same engines."""

    what: str
    """The cards, for people."""
    engines: tuple[Engine, ...]
    plan: MemoryPlan


def plan_cards(
    config: RunConfig,
    *,
    device_memory_bytes: int | None = None,
    device: DeviceMemory | None = None,
    student_shape: ModelShape | None = None,
    teacher_shape: ModelShape | None = None,
) -> list[CardPlan]:
    """Plan every kind of card; without a cluster there is one, with all engines.

    Every card is assumed to have the memory of this machine's, unless the config or the argument
    states another one.

    Args:
        config: the run.
        device_memory_bytes: as of `make_plan`.
        device: as of `make_plan`.
        student_shape: as of `make_plan`.
        teacher_shape: as of `make_plan`.

    Raises:
        ConfigError: an engine does not fit its card, or its cards do not divide its heads.
    """
    rollouts = None if config.cluster is None else config.cluster.rollouts
    if rollouts is not None:
        shape = student_shape or read_shape(config.student.model)
        _check_heads("cluster.rollouts", rollouts, shape)
    fleet = None if config.cluster is None else config.cluster.teachers
    if fleet is not None and config.loaded_teacher is not None:
        shape = teacher_shape or read_shape(config.loaded_teacher.model)
        _check_heads("cluster.teachers", fleet, shape)
    device = device or planned_device(config, device_memory_bytes)
    found = []
    for what, engines in _kinds(config):
        try:
            plan = make_plan(
                config,
                device=device,
                student_shape=student_shape,
                teacher_shape=teacher_shape,
                engines=engines,
            )
        except ConfigError as error:
            if config.cluster is None:
                raise
            raise ConfigError(f"{what}: {error}") from None
        found.append(CardPlan(what=what, engines=engines, plan=plan))
    return found


def lay_out_cards(
    config: RunConfig,
    *,
    device: DeviceMemory,
    student_shape: ModelShape | None = None,
    teacher_shape: ModelShape | None = None,
) -> list[CardPlan]:
    """Plan every kind of card without the checks of `plan_cards`: one may not fit."""
    found = []
    for what, engines in _kinds(config):
        plan = lay_out(
            config,
            device=device,
            student_shape=student_shape,
            teacher_shape=teacher_shape,
            engines=engines,
        )
        found.append(CardPlan(what=what, engines=engines, plan=plan))
    return found


def plan_of(engine: Engine, plans: list[CardPlan]) -> MemoryPlan:
    """The plan of the cards that an engine lies on."""
    return next(card.plan for card in plans if engine in card.engines)


def _kinds(config: RunConfig) -> list[tuple[str, tuple[Engine, ...]]]:
    """The kinds of cards: their names, and the engines on each."""
    cluster = config.cluster
    if cluster is None:
        return [("this machine's card", ("teacher", "student", "learner"))]
    here: list[Engine] = ["learner"]
    others: list[tuple[str, tuple[Engine, ...]]] = []
    sections: tuple[tuple[str, Engine, ClusterEngines | None], ...] = (
        ("teachers", "teacher", cluster.teachers),
        ("rollouts", "student", cluster.rollouts),
    )
    for name, engine, section in sections:
        if section is None or section.where == WITH_LEARNER:
            here.append(engine)
        else:
            node = "any node" if section.where == OWN else f"a node with {section.where}"
            number = f"{section.replicas} x {section.cards} cards"
            others.append((f"cluster.{name}: {number}, {node}", (engine,)))
    learner = cluster.learner
    if learner is not None and learner.sharded:
        where = f"each of the learner's {learner.ranks} cards, which divide weights and optimizer"
    else:
        where = "the learner's card, on this machine"
    return [(where, tuple(here)), *others]


def _check_heads(name: str, section: ClusterEngines, shape: ModelShape) -> None:
    cards = max(1, section.cards)
    if shape.num_heads % cards:
        raise ConfigError(
            f"{name}.cards={cards} does not divide the model's {shape.num_heads} attention heads; "
            "use a number of cards that does, and more replicas"
        )
