"""Prepares a config for the doctor, and chooses what its teacher is asked for."""

from qwen3_distill.config import RunConfig
from qwen3_distill.config.learning import ConstantSchedule
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.types import GivenCandidatesRequest, SampledRequest, ScoreRequest, TopKRequest

CANDIDATES = 20
"""The teacher's most likely tokens that are asked for, where the objective asks for none."""
_FULL_RATE, _LORA_RATE = 5e-3, 3e-2
"""Learning rates of the one step, so large that old weights cannot be taken for new ones."""


def examined(config: RunConfig, output_dir: str) -> RunConfig:
    """Return a run's config as the doctor runs it: elsewhere, without cached scores.

    The learning rate is raised, because one usual step changes too little to be told from rounding.
    """
    training = config.training
    rate = _FULL_RATE if training.tuning.kind == "full" else _LORA_RATE
    optimizer = training.optimizer.model_copy(
        update={
            "learning_rate": max(rate, training.optimizer.learning_rate),
            "schedule": ConstantSchedule(kind="constant"),
        }
    )
    changes: dict[str, object] = {
        "output_dir": output_dir,
        "training": training.model_copy(update={"optimizer": optimizer}),
    }
    uncached = {
        teacher.name: teacher.section.model_copy(update={"cache": None})
        for teacher in config.teachers
        if teacher.section.cache_folder is not None
    }
    return config.with_sections(uncached).model_copy(update=changes)


def score_request(config: RunConfig) -> ScoreRequest | None:
    """Return the objective's request, with some candidates where it asks for the scores alone.

    None: the objective needs no scores. An ensemble has no candidates for every kind of member, so
    with one the objective's own request is made. Candidates are the teacher's own, also where the
    objective takes the student's: their probabilities bound its entropy.
    """
    request = config.objective.score_request
    if isinstance(request, GivenCandidatesRequest):
        return TopKRequest(k=request.k)
    if isinstance(request, SampledRequest) and not has_ensemble(config):
        vocab_size = load_identity(config.teachers[0].section.model, weights=False).vocab_size
        return TopKRequest(k=min(CANDIDATES, vocab_size))
    return request


def has_ensemble(config: RunConfig) -> bool:
    """Whether a teacher is a mean of several."""
    return any(".members." in teacher.setting for teacher in config.teachers)
