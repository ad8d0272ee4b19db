"""The student, its prompts, how answers are sampled, checked and evaluated."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from qwen3_distill.config.base import PositiveInt, Schema
from qwen3_distill.types import SamplingSpec


class _FilePrompts(Schema):
    prompt_field: str = "prompt"
    """Column with the prompt: a string, or a list of ``{"role", "content"}`` messages."""
    answer_field: str | None = None
    """Column with the reference answer that the verifier compares with."""
    system: str | None = None
    """System message put before every prompt."""
    suffix: str = ""
    """Text appended to every last user message, e.g. an instruction about the answer's form."""
    limit: PositiveInt | None = None
    """Use only the first so many rows."""


class JsonlPrompts(_FilePrompts):
    """Prompts from a JSON Lines file."""

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
    """Commit of the dataset; pin it for a run that can be made again."""


class TaskPrompts(Schema):
    """Problems of a procedural task. Training and evaluation never share a problem."""

    kind: Literal["task"]
    task: Literal["chain"] = "chain"
    split: Literal["train", "eval"] = "train"
    limit: PositiveInt | None = None
    """Cycle over the first so many problems instead of an endless supply."""


PromptsConfig: TypeAlias = Annotated[
    JsonlPrompts | ParquetPrompts | HuggingFacePrompts | TaskPrompts, Field(discriminator="kind")
]


class TaskVerifier(Schema):
    """Exact check of a procedural task's final answer."""

    kind: Literal["task"]
    task: Literal["chain"] = "chain"


class MathVerifier(Schema):
    """Mathematical equality with the reference answer, by math-verify."""

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
        """One rollout's `SamplingSpec`."""
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
    """Held-out problems, always the same first ones."""
    verifier: VerifierConfig
    """What counts as correct."""
    every_steps: PositiveInt = 25
    num_problems: PositiveInt = 500
    """At most; fewer where there are fewer. Every result says over how many."""
    final_num_problems: PositiveInt | None = None
    """Problems before, after and for the teacher; null: `num_problems`."""
    samples_per_problem: PositiveInt = 1
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    teacher: bool = True
    """Also measure the teacher, once, before the run."""


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
"""Arguments of `apply_chat_template` that are none of the template's."""


class StudentConfig(Schema):
    """The model that is distilled into."""

    model: str
    """Directory of the student (Hugging Face layout)."""
    template_arguments: dict[str, bool | int | str] = Field(default_factory=dict)
    """Passed to the chat template, e.g. ``{enable_thinking: false}`` for Qwen3."""

    @field_validator("template_arguments")
    @classmethod
    def _are_the_templates_own(
        cls, arguments: dict[str, bool | int | str]
    ) -> dict[str, bool | int | str]:
        if taken := _TEMPLATE_CALL & arguments.keys():
            raise ValueError(
                f"{', '.join(sorted(taken))} may not be set: the template does not take it, "
                "and prompts are always rendered up to where the answer begins"
            )
        return arguments
