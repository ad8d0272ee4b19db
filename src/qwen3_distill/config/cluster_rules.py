"""Rules between the `cluster` section and others, for `rules.py`: one function each."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from qwen3_distill.config.cluster import WITH_LEARNER

if TYPE_CHECKING:
    from qwen3_distill.config.run import RunConfig


def cluster_engines_have_own_process(config: "RunConfig") -> None:
    if config.cluster is None:
        return
    if config.cluster.teachers is not None and config.scoring is None:
        raise ValueError("cluster.teachers starts teachers, and scoring is null: drop it")
    sections = {
        "rollouts": ("generation", config.generation),
        "teachers": ("scoring", None if config.cluster.teachers is None else config.teacher),
        "learner": ("training", config.training),
    }
    for name, (key, section) in sections.items():
        if getattr(config.cluster, name) is None:
            continue
        assert section is not None, "a teacher is required above"
        if section.kind == "embedded" and not section.own_process:
            raise ValueError(
                f"cluster.{name} with {key}.own_process=false: an engine in the run's own process "
                f"cannot be on another card or node; set {key}.own_process=true"
            )
    scoring = config.only_teacher
    if scoring is None or scoring.kind == "embedded" or config.cluster.teachers is None:
        return
    if scoring.urls:
        raise ValueError(
            "cluster.teachers starts teachers, and scoring.urls names servers that run already: "
            "drop one of the two"
        )


def cluster_channel_reaches_engines(config: "RunConfig") -> None:
    cluster, generation = config.cluster, config.generation
    if cluster is None or generation.kind != "vllm" or generation.full_weights != "ipc":
        return
    engines = cluster.rollouts
    elsewhere = cluster.address is not None and engines is not None and engines.replicas > 1
    apart = engines is not None and (engines.where != WITH_LEARNER or elsewhere)
    if apart or (engines is None and cluster.learner is not None):
        raise ValueError(
            "generation.full_weights=ipc reaches an engine on the learner's card only, and "
            "cluster puts them apart: use full_weights=auto or directory"
        )


def tensor_parallelism_is_the_cards(config: "RunConfig") -> None:
    generation, scoring, cluster = config.generation, config.only_teacher, config.cluster
    parts = generation.tensor_parallel if generation.kind == "vllm" else 1
    fleet = None if cluster is None else cluster.rollouts
    if fleet is None and parts > 1:
        raise ValueError(
            f"generation.tensor_parallel={parts} without cluster.rollouts: the cards of a rollout "
            f"engine are given by the cluster; add cluster: {{rollouts: {{cards: {parts}}}}}"
        )
    # Without cards the engine computes on the CPU, whatever its parts.
    if fleet is not None and fleet.cards not in (0, parts):
        raise ValueError(
            f"cluster.rollouts.cards={fleet.cards} and generation.tensor_parallel={parts}: a "
            "rollout engine has one card for each part of its model; give both the same number"
            + ("" if generation.kind == "vllm" else ", which is 1 for generation.kind=embedded")
        )
    if cluster is None:
        return
    if scoring is not None and scoring.kind != "embedded" and cluster.teachers is not None:
        names = ("tp-size", "tp_size", "tensor-parallel-size", "tensor_parallel_size", "tp")
        option = "tp-size" if scoring.kind == "sglang" else "tensor-parallel-size"
        given = [scoring.server_arguments[n] for n in names if n in scoring.server_arguments]
        parts = given[0] if given else 1
        if parts != max(1, cluster.teachers.cards):
            raise ValueError(
                f"cluster.teachers.cards={cluster.teachers.cards} and "
                f"scoring.server_arguments.{option}={parts}: a teacher has one card for each part "
                "of its model; give both the same number"
            )


def sharded_learner_trains_whole_layers(config: "RunConfig") -> None:
    cluster, training, generation = config.cluster, config.training, config.generation
    if cluster is None or cluster.learner is None or not cluster.learner.sharded:
        return
    if training.kind == "unsloth":
        raise ValueError(
            "cluster.learner.sharded with training.kind=unsloth: unsloth loads the whole model "
            "onto one card, so what does not fit one card does not fit it either; use "
            "training.kind=embedded, or sharded=false"
        )
    if training.tuning.kind == "lora":
        raise ValueError(
            "cluster.learner.sharded with training.tuning.kind=lora: trained weights are divided, "
            "and adapters are small; use sharded=false, or tuning.kind=full"
        )
    if training.compiled:
        raise ValueError(
            "cluster.learner.sharded with training.compiled: what gathers a layer's weights runs "
            "around its pass, and was never tried with a compiled one; use compiled=false"
        )
    if generation.kind == "vllm" and generation.full_weights == "ipc":
        raise ValueError(
            "cluster.learner.sharded with generation.full_weights=ipc: CUDA IPC lends weights that "
            "lie on a card, and no card has all of them; use full_weights=auto or directory"
        )


CLUSTER_RULES: tuple[Callable[["RunConfig"], None], ...] = (
    cluster_engines_have_own_process,
    cluster_channel_reaches_engines,
    tensor_parallelism_is_the_cards,
    sharded_learner_trains_whole_layers,
)
"""In the order in which they are checked."""
