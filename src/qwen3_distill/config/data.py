"""The student, its prompts, how answers are sampled, checked and evaluated."""

import re
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import PathText, PositiveInt, Schema, Seconds
from qwen3_distill.types import SamplingSpec
from qwen3_distill.utils.paths import plain_path


class Tagging(NamedTuple):
    """How a prompt's row names its teacher."""

    field: str
    known: tuple[str, ...]
    """The tags that have a teacher."""


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
    _tagging: Tagging | None = PrivateAttr(default=None)

    @property
    def tagging(self) -> Tagging | None:
        """How a row names its teacher; None: there are not several."""
        return self._tagging

    def tagged(self, tagging: Tagging) -> Self:
        """Copy the section for a run with several teachers; a dump of it stays the same."""
        copied = self.model_copy()
        copied._tagging = tagging
        return copied


class JsonlPrompts(_FilePrompts):
    """Prompts from a JSON Lines file, which may be compressed (``.jsonl.gz``, ``.jsonl.zst``)."""

    kind: Literal["jsonl"]
    path: PathText


class ParquetPrompts(_FilePrompts):
    """Prompts from a Parquet file."""

    kind: Literal["parquet"]
    path: PathText


class HuggingFacePrompts(_FilePrompts):
    """Prompts from a Hugging Face dataset: a hub id or a directory."""

    kind: Literal["hf"]
    path: PathText
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


TaskName: TypeAlias = Literal["chain", "long_chain", "multiply", "sum"]


class TaskPrompts(Schema):
    """Problems of a procedural task. Training and evaluation never share a problem."""

    kind: Literal["task"]
    task: TaskName = "chain"
    """`chain`: arithmetic in 4 to 6 steps, the task of the shipped lab models. `long_chain`: 10 to
    16 steps. `multiply`: a product with every carry. `sum`: an answer without steps."""
    split: Literal["train", "eval"] = "train"
    first: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Number of the first problem: other numbers are other draws, e.g. for choosing settings."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Cycle over this many problems; null: an endless supply."""


PromptsConfig: TypeAlias = Annotated[
    JsonlPrompts | ParquetPrompts | HuggingFacePrompts | TaskPrompts, Field(discriminator="kind")
]


class TaskVerifier(Schema):
    """Checks a procedural task's final answer exactly."""

    kind: Literal["task"]
    task: TaskName = "chain"
    """The task of the prompts; see there."""


class MathVerifier(Schema):
    """Checks mathematical equality with the reference answer, by math-verify."""

    kind: Literal["math"]


class ExactVerifier(Schema):
    """Checks that the response, as text, equals the reference answer."""

    kind: Literal["exact"]
    strip: bool = True
    """Compare without white space at both ends."""
    case_sensitive: bool = True
    """false: upper and lower case are equal."""


class ChoiceVerifier(Schema):
    """Checks the letter of a multiple choice: ``B``, ``(B)``, ``Answer: B``, boxed."""

    kind: Literal["choice"]
    options: Annotated[int, Field(ge=2, le=26)] = 4
    """Number of options; the letters are the first ones, from A on."""


class RegexVerifier(Schema):
    """Checks what the one group of a pattern finds last in the response against the reference."""

    kind: Literal["regex"]
    pattern: str
    """Python regular expression with one group; the last match in the response counts."""
    case_sensitive: bool = True
    """false: upper and lower case are equal, in the pattern and in the comparison."""

    @field_validator("pattern")
    @classmethod
    def _pattern_has_one_group(cls, pattern: str) -> str:
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{pattern!r} is no regular expression ({error}), expected one of Python's re; "
                "correct it"
            ) from None
        if compiled.groups != 1:
            raise ValueError(
                f"{pattern!r} has {compiled.groups} groups, expected one: the answer, as in "
                "'answer: (.*)'; write the others as (?:...)"
            )
        return pattern


class PythonVerifier(Schema):
    """Asks a function of yours, in a process of its own, for true, false or a reward in [0, 1]."""

    kind: Literal["python"]
    function: str
    """``path/to/file.py:name``; called with the prompt's row (a dict) and the response's text."""
    timeout_s: Seconds = 10.0
    """Seconds that one call may take; a longer one is an error."""

    @field_validator("function")
    @classmethod
    def _function_is_file_and_name(cls, function: str) -> str:
        path, _, name = function.rpartition(":")
        if not path.endswith(".py") or not name.isidentifier():
            raise ValueError(
                f"{function!r} is not a function of a file, expected path/to/file.py:name; "
                "correct it"
            )
        return f"{plain_path(path)}:{name}"


VerifierConfig: TypeAlias = Annotated[
    TaskVerifier | MathVerifier | ExactVerifier | ChoiceVerifier | RegexVerifier | PythonVerifier,
    Field(discriminator="kind"),
]


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


def _greedy_or_positive(temperature: float) -> float:
    if 0 < temperature < 1e-3:
        raise ValueError("expected 0 for greedy answers, or at least 0.001")
    return temperature


EvaluationTemperature: TypeAlias = Annotated[
    float, Field(ge=0, le=1e3), AfterValidator(_greedy_or_positive)
]


class EvaluationSamplingConfig(SamplingConfig):
    """How answers are sampled in an evaluation, which may be greedy."""

    temperature: EvaluationTemperature = 1.0
    """0: greedy, always the most likely token. A problem then has one answer, whatever
    `samples_per_problem` says."""


NumProblems: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]


class EvaluationConfig(Schema):
    """Held-out accuracy before, during and after the run."""

    prompts: PromptsConfig
    """Held-out problems; every evaluation takes the same first ones."""
    verifier: VerifierConfig
    """Decides whether an answer is correct, or how good it is."""
    every_steps: PositiveInt = 25
    at_steps: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Evaluate after these steps instead of every `every_steps`, e.g. ``[0, 5, 10, 20, 40]``; after
    the last step in any case. Null: every `every_steps`."""
    num_problems: NumProblems = 500
    """Maximum number of problems; every result states how many there were."""
    final_num_problems: NumProblems | None = None
    """Number of problems when the student is evaluated before and after training, and the teacher;
    null: `num_problems`."""
    samples_per_problem: Annotated[int, Field(ge=1, le=10_000)] = 1
    sampling: EvaluationSamplingConfig = Field(default_factory=EvaluationSamplingConfig)
    second_temperature: EvaluationTemperature | None = None
    """Measure every model at this temperature as well, on the same problems; 0 is greedy. A student
    that only sharpened is better at `sampling.temperature` and no better here. Null: not measured.
    """
    teacher: bool = True
    """Also evaluate the teacher, once, before the run."""

    @model_validator(mode="after")
    def _second_temperature_is_another(self) -> Self:
        if self.second_temperature == self.sampling.temperature:
            raise ValueError(
                f"second_temperature={self.second_temperature:g} is sampling.temperature: the same "
                "would be measured twice; choose another, e.g. 0, or null"
            )
        return self

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether the student is evaluated after this step of a run of so many."""
        if step == total_steps:
            return True
        return step % self.every_steps == 0 if self.at_steps is None else step in self.at_steps

    def at_temperature(self, temperature: float) -> "EvaluationConfig":
        """Return the same evaluation at one temperature, with one answer per problem if greedy."""
        sampling = self.sampling.model_copy(update={"temperature": temperature})
        samples = 1 if temperature == 0 else self.samples_per_problem
        return self.model_copy(
            update={
                "sampling": sampling,
                "samples_per_problem": samples,
                "second_temperature": None,
            }
        )


_TEMPLATE_CALL = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
"""Arguments of `apply_chat_template` that do not reach the template, or that rendering sets."""


def refuse_template_call(arguments: dict[str, bool | int | str]) -> dict[str, bool | int | str]:
    """Return arguments of a chat template unchanged.

    Raises:
        ValueError: one of them is the call's own, and does not reach the template.
    """
    if taken := _TEMPLATE_CALL & arguments.keys():
        raise ValueError(
            f"{', '.join(sorted(taken))} may not be set: the template does not take it, "
            "and prompts are always rendered up to where the answer begins"
        )
    return arguments


class StudentConfig(Schema):
    """The model that is trained."""

    model: PathText
    """The student: a directory (Hugging Face layout), or a hub id such as ``Qwen/Qwen3-4B`` or
    ``Qwen/Qwen3-4B@REVISION``; see guide/hub.md."""
    template_arguments: dict[str, bool | int | str] = Field(default_factory=dict)
    """Passed to the chat template, e.g. ``{enable_thinking: false}`` for Qwen3. A name that the
    template does not read is refused, and text where the template asks for true or false."""

    @field_validator("template_arguments")
    @classmethod
    def _template_arguments_reach_template(
        cls, arguments: dict[str, bool | int | str]
    ) -> dict[str, bool | int | str]:
        return refuse_template_call(arguments)
