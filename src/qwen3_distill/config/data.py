"""The student, its prompts, how answers are sampled, checked and evaluated."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PrivateAttr, field_validator
from typing_extensions import Self

from qwen3_distill.config.base import PositiveInt, Schema
from qwen3_distill.types import SamplingSpec


class _FilePrompts(Schema):
    prompt_field: str = "prompt"
    """Field with the prompt: a string, or a list of messages (guide/data-formats.md). Dots lead
    into objects and lists: ``data.question``."""
    answer_field: str | None = None
    """Field with the reference answer that the verifier compares with, e.g. ``answer``,
    ``reward_model.ground_truth`` or ``messages.-1.content``."""
    system: str | None = None
    """System message prepended to every prompt."""
    suffix: str = ""
    """Text appended to every last user message, e.g. an instruction about the answer's form."""
    limit: PositiveInt | None = None
    """Use only this many rows, from the first on; null: all."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """A prompt that does not fit the student's context together with ``max_new_tokens``.
    ``refuse``: it is an error before the run. ``drop``: it is left out and counted."""


class JsonlPrompts(_FilePrompts):
    """Prompts from a JSON Lines file, which may be compressed (``.jsonl.gz``, ``.jsonl.zst``)."""

    kind: Literal["jsonl"]
    path: str


class ParquetPrompts(_FilePrompts):
    """Prompts from a Parquet file."""

    kind: Literal["parquet"]
    path: str


class HuggingFacePrompts(_FilePrompts):
    """Prompts from a Hugging Face dataset: a hub id or a directory."""

    kind: Literal["hf"]
    path: str
    """Hub id (``openai/gsm8k``) or local directory."""
    name: str | None = None
    """Configuration of the dataset, e.g. ``main``."""
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit on the hub; null: ``main``. The manifest records the commit, and a
    resumed run uses it again."""
    _commit: str | None = PrivateAttr(default=None)

    @property
    def commit(self) -> str | None:
        """The revision to load: the commit that was found on the hub, else `revision`."""
        return self._commit or self.revision

    def at_commit(self, commit: str) -> Self:
        """Copy the section for one commit; a dump of it and the prompts' ids stay the same."""
        pinned = self.model_copy()
        pinned._commit = commit
        return pinned


class TaskPrompts(Schema):
    """Problems of a procedural task. Training and evaluation never share a problem."""

    kind: Literal["task"]
    task: Literal["chain"] = "chain"
    split: Literal["train", "eval"] = "train"
    limit: PositiveInt | None = None
    """Cycle over this many problems; null: an endless supply."""


PromptsConfig: TypeAlias = Annotated[
    JsonlPrompts | ParquetPrompts | HuggingFacePrompts | TaskPrompts, Field(discriminator="kind")
]


class TaskVerifier(Schema):
    """Checks a procedural task's final answer exactly."""

    kind: Literal["task"]
    task: Literal["chain"] = "chain"


class MathVerifier(Schema):
    """Checks mathematical equality with the reference answer, by math-verify."""

    kind: Literal["math"]


VerifierConfig: TypeAlias = Annotated[TaskVerifier | MathVerifier, Field(discriminator="kind")]


class SamplingConfig(Schema):
    """How rollouts are sampled."""

    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """0: no limit."""
    max_new_tokens: PositiveInt = 512

    def spec(self, seed: int) -> SamplingSpec:
        """Return the `SamplingSpec` of one rollout."""
        return SamplingSpec(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
        )


class EvaluationConfig(Schema):
    """Held-out accuracy before, during and after the run."""

    prompts: PromptsConfig
    """Held-out problems; every evaluation takes the same first ones."""
    verifier: VerifierConfig
    """Decides whether an answer is correct."""
    every_steps: PositiveInt = 25
    num_problems: PositiveInt = 500
    """Maximum number of problems; every result states how many there were."""
    final_num_problems: PositiveInt | None = None
    """Number of problems in the evaluations before and after the run and of the teacher; null:
    `num_problems`."""
    samples_per_problem: PositiveInt = 1
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    teacher: bool = True
    """Also evaluate the teacher, once, before the run."""


_TEMPLATE_CALL = {
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}
"""Arguments that `apply_chat_template` keeps for itself and does not pass to the template."""


class StudentConfig(Schema):
    """The model that is trained."""

    model: str
    """The student: a directory (Hugging Face layout), or a hub id such as ``Qwen/Qwen3-4B`` or
    ``Qwen/Qwen3-4B@REVISION``; see guide/hub.md."""
    template_arguments: dict[str, bool | int | str] = Field(default_factory=dict)
    """Passed to the chat template, e.g. ``{enable_thinking: false}`` for Qwen3."""

    @field_validator("template_arguments")
    @classmethod
    def _template_arguments_reach_template(
        cls, arguments: dict[str, bool | int | str]
    ) -> dict[str, bool | int | str]:
        if taken := _TEMPLATE_CALL & arguments.keys():
            raise ValueError(
                f"{', '.join(sorted(taken))} may not be set: the template does not take it, "
                "and prompts are always rendered up to where the answer begins"
            )
        return arguments
