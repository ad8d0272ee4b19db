"""Checks whether the files of student and teacher can be used, and used together."""

from functools import lru_cache, partial
from pathlib import Path

from qwen3_distill.config import RunConfig, ScoringConfig
from qwen3_distill.errors import ConfigError, DataError
from qwen3_distill.modeling.config_file import CONFIG, read_json_object
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.modeling.fp8_checkpoint import is_per_channel
from qwen3_distill.modeling.hub import is_snapshot, missing_weights
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.modeling.student_directory import check_student
from qwen3_distill.modeling.weight_headers import check_weight_headers
from qwen3_distill.pipeline.disk_space import check_download_space, check_run_space
from qwen3_distill.pipeline.finding import Check, Verdict, bad, doubtful, good, skipped
from qwen3_distill.pipeline.first_prompt import first_prompt, unended_turns
from qwen3_distill.pipeline.own_folder import require_own_folder
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.recording.text import gibibytes
from qwen3_distill.scoring.cache import check_cache_folder
from qwen3_distill.scoring.handshake import differences
from qwen3_distill.types import ModelIdentity

SHORT_THOUGHTS_TOKENS = 1024
"""A response that thinks hardly ever ends within fewer tokens."""
NO_TEACHER = "the config has no teacher"


def _are_there(model: str) -> bool:
    """Whether a model's weights must be there already: those from the hub are downloaded later."""
    return not (is_snapshot(model) and missing_weights(model))


def identity_of(model: str) -> ModelIdentity:
    """Return a model's identity, read once as long as its files stay as they are.

    Raises:
        ModelError: config, tokenizer or generation config are missing or damaged.
    """
    files = sorted(path for path in Path(model).glob("*") if path.suffix in (".json", ".jinja"))
    stats = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    return _read_identity(model, stats)


@lru_cache(maxsize=16)
def _read_identity(model: str, stats: tuple[tuple[str, int, int], ...]) -> ModelIdentity:
    return load_identity(model, weights=False)


def check_student_files(config: RunConfig) -> Verdict:
    """Read everything of the student but its weights.

    Raises:
        ModelError: something is missing, damaged or contradictory.
    """
    model = config.student.model
    check_student(model, weights=_are_there(model))
    return _described(model)


def check_teacher_files(config: RunConfig) -> Verdict:
    """Read config and tokenizer of the teacher, and see that it has weights.

    Raises:
        ModelError: something is missing or damaged.
        ConfigError: its engine does not read its weights, or would quantize them again.
    """
    if config.scoring is None:
        return skipped(NO_TEACHER)
    model = config.teacher.model
    directory = check_model_dir(model, weights=_are_there(model))
    _require_engine_of_channels(config.teacher, directory)
    identity_of(model)
    if _are_there(model):
        check_weight_headers(directory)
    return _described(model)


def _require_engine_of_channels(scoring: ScoringConfig, directory: Path) -> None:
    """Refuse a checkpoint with a scale per channel where the engine cannot serve it as it is."""
    why = scoring.channel_scales_refused
    settings = read_json_object(directory / CONFIG).get("quantization_config")
    if why is not None and is_per_channel(settings):
        raise ConfigError(f"{directory} is an FP8 checkpoint with a scale per channel, {why}")


def _described(model: str) -> Verdict:
    identity = identity_of(model)
    later = "" if _are_there(model) else ", weights are still to be downloaded"
    return good(
        f"{model}: vocabulary {identity.vocab_size}, context {identity.context_length}{later}"
    )


def check_folder(config: RunConfig) -> Verdict:
    """Check that the run folder is the run's own.

    Raises:
        RunFolderError: it holds files of something else.
    """
    require_own_folder(config.output_path)
    return good(config.output_dir)


def check_cache(config: RunConfig) -> Verdict:
    """Check the folder of the score cache.

    Raises:
        RunFolderError: it holds files of something else.
    """
    cache = None if config.scoring is None else config.teacher.cache_folder
    if cache is None:
        return skipped("scores are not cached")
    check_cache_folder(cache)
    return good(str(cache))


def check_disk(config: RunConfig) -> Verdict:
    """Check that the disk holds checkpoints and ``student/``.

    Raises:
        RunFolderError: it does not.
    """
    needed, free = check_run_space(config)
    return good(f"checkpoints and student need {gibibytes(needed, 2)} of {gibibytes(free, 2)} free")


def check_model_disk(config: RunConfig) -> Verdict:
    """Check that the hub's cache has room for the weights that are still to be downloaded.

    Raises:
        RunFolderError: it does not.
    """
    models = [config.student.model]
    models += [teacher.section.model for teacher in config.teachers]
    missing = [model for model in dict.fromkeys(models) if not _are_there(model)]
    if not missing:
        return skipped("nothing is to be downloaded")
    needed, free = check_download_space(missing)
    return good(f"weights of {gibibytes(needed)} are to be downloaded, {gibibytes(free)} are free")


def check_equal(name: str, config: RunConfig) -> Verdict:
    """Compare a property of student and teacher.

    Args:
        name: of a field of `ModelIdentity` that must be equal.
    """
    if config.scoring is None:
        return skipped(NO_TEACHER)
    if config.teacher.has_own_tokenizer:
        return skipped("scoring.tokenizer=own: it need not be the same")
    student, teacher = identity_of(config.student.model), identity_of(config.teacher.model)
    found = differences(student, teacher)
    if name in found:
        what, _, remedy = found[name].partition("; ")
        return bad(what, remedy)
    value = getattr(student, name)
    text = str(sorted(value) if isinstance(value, frozenset) else value)
    return good(f"the same in both: {text[:12] if len(text) > 40 else text}")


def check_end_of_turn(config: RunConfig) -> Verdict:
    """Compare the token that ends a turn of the chat template with those that end a rollout."""
    notes = unended_turns(config)
    if not notes:
        return good("the template ends an assistant's turn with a token that ends a rollout")
    what, separator, change = notes[0].partition(". To change that, ")
    if not separator:
        return doubtful(what, "use a chat template that ends a turn, unless this is a base model")
    return bad(what, change)


def check_thinking(config: RunConfig) -> Verdict:
    """Render the first prompt and tell whether its response thinks.

    Raises:
        ConfigError: the chat template does not take `student.template_arguments`.
        DataError: the prompt cannot be read or rendered.
    """
    view = first_prompt(config, TextTools(config.student.model))
    facts = dict(view.facts())
    limit = config.sampling.max_new_tokens
    if view.thinking == "on" and limit < SHORT_THOUGHTS_TOKENS:
        return doubtful(
            f"{facts['thinking']}, and sampling.max_new_tokens={limit} will cut most of them",
            f"raise sampling.max_new_tokens to {SHORT_THOUGHTS_TOKENS} or more, or set "
            "student.template_arguments={enable_thinking: false}",
        )
    return good(str(facts["thinking"]))


def without_prompt_errors(config: RunConfig) -> Verdict:
    """`check_thinking`, left out where the first prompt cannot be read: other checks say why."""
    try:
        return check_thinking(config)
    except DataError as error:
        return skipped(f"the first prompt cannot be rendered: {str(error).splitlines()[0][:80]}")


_BOTH = ("student files", "teacher files")
FILE_CHECKS = (
    Check(
        name="student files",
        find=check_student_files,
        refuses_run=True,
        remedy="download the model again, or correct student.model",
    ),
    Check(
        name="teacher files",
        find=check_teacher_files,
        per_teacher=True,
        refuses_run=True,
        remedy="download the model again, or correct scoring.model",
    ),
    Check(name="run folder", find=check_folder, refuses_run=True),
    Check(name="score cache", find=check_cache, per_teacher=True, refuses_run=True),
)
DISK_CHECKS = (
    Check(
        name="disk for the run",
        find=check_disk,
        needs=("student files", "run folder"),
        refuses_run=True,
    ),
    Check(name="disk for models", find=check_model_disk, needs=_BOTH, refuses_run=True),
)
PAIR_CHECKS = (
    *(
        Check(name=name, find=partial(check_equal, field), per_teacher=True, needs=_BOTH)
        for name, field in {
            "tokenizer": "tokenizer_digest",
            "vocabulary": "vocab_size",
            "end-of-sequence ids": "eos_ids",
            "chat template": "chat_template_digest",
        }.items()
    ),
    Check(name="end of a turn", find=check_end_of_turn, needs=_BOTH),
    Check(name="thinking", find=without_prompt_errors, needs=("student files", "training prompts")),
)
