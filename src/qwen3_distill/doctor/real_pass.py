"""A short pass of the loop on the real engines, with what is checked at each stage.

It samples a few rollouts, scores them in several ways, takes one large step, pushes the weights and
samples again. Then the engines are closed.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qwen3_distill.config import RunConfig
from qwen3_distill.config.rollouts import RolloutsConfig
from qwen3_distill.data.rollout_files import read_training
from qwen3_distill.doctor.entropy import full_entropy, lowest_entropy
from qwen3_distill.doctor.examined import has_ensemble
from qwen3_distill.doctor.processes import Process, descendants, left_after
from qwen3_distill.doctor.tolerances import engine_tolerance_nats, teacher_tolerance_nats
from qwen3_distill.errors import EngineError
from qwen3_distill.pipeline.assembly.teachers import asked_at, each_server, output_head
from qwen3_distill.pipeline.finding import Verdict, bad, doubtful, good, skipped
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.requests import request_number
from qwen3_distill.pipeline.step import generate, push_weights
from qwen3_distill.scoring.repeatability import gaps, gaps_alone
from qwen3_distill.types import (
    FinishReason,
    FloatArray,
    HiddenScore,
    Rollout,
    RolloutRequest,
    SampledRequest,
    ScoreFailure,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    TopKScore,
    TrainingRollout,
    UnalignedRollout,
    Update,
)

Say = Callable[[str], None]

OTHER_TEMPERATURE = 0.3
ASLEEP = 0.7
"""A mean entropy above this share of ln V is that of a model without weights."""
FOREIGN = 0.9
"""Below this share of -ln V, the teacher's mean score is one of tokens that it would not write."""
END_PATIENCE_S = 10.0
"""How long a closed engine's processes may take to end."""
_ENGINE_GAP = "health/learner_vs_engine_abs_nats"


@dataclass
class RealPass:
    """The engines of a config, and what was learned of them so far."""

    parts: Parts
    config: RunConfig
    num_rollouts: int
    say: Say
    request: ScoreRequest | None
    """None: the objective needs no scores, and no stage that scores is made."""
    requests: list[RolloutRequest] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    answers: list[Rollout] = field(default_factory=list)
    """The teacher's, where it samples."""
    results: list[ScoreResult] = field(default_factory=list)
    grad_norm: float = math.nan
    """The step's gradient norm, once it was taken."""
    processes: set[Process] = field(default_factory=set)
    before: set[Process] = field(default_factory=descendants)
    is_closed: bool = False

    # --- Engines and weights ----------------------------------------------------------------------

    async def start(self) -> Verdict:
        """Start the engines.

        Raises:
            EngineStartError: one does not start.
        """
        await self.parts.start(self.say)
        self.processes = descendants() - self.before
        here = f"{len(self.processes)} processes" if self.processes else "all in this process"
        teacher = self.parts.teacher
        named = "no teacher" if teacher is None else f"{teacher.teacher_id} as the teacher"
        return good(f"{named}; {here}")

    async def first_push(self) -> Verdict:
        """Push the student's weights into the rollout engine, which reads them back.

        Raises:
            WeightVersionError: the weights in use are others.
        """
        await push_weights(self.parts)
        version = self.parts.engine.version
        if version != self.parts.learner.version:
            return bad(
                f"the engine serves {version}, the learner has {self.parts.learner.version}",
                "see docs/engines/weights.md",
            )
        return good(f"digest {version.digest[:12]} was read back from the weights in use")

    async def close(self) -> Verdict:
        """Close the engines, and see that none of their processes is left."""
        self.is_closed = True
        self.processes |= descendants() - self.before
        await self.parts.close()
        left = await left_after(self.processes, END_PATIENCE_S)
        if left:
            pids = ", ".join(str(process.pid) for process in sorted(left, key=lambda p: p.pid))
            return bad(f"processes {pids} still run", f"end them: kill {pids.replace(',', '')}")
        return good(f"{len(self.processes)} processes have ended")

    # --- Rollouts ---------------------------------------------------------------------------------

    async def sample(self) -> Verdict:
        """Sample a few rollouts, and compare each with its request."""
        self.requests = sample_requests(self.config, self.parts, self.num_rollouts)
        self.rollouts = await generate(self.parts.engine, self.requests)
        for rollout in self.rollouts:
            if problem := self._misfit(rollout):
                return bad(
                    f"rollout {rollout.rollout_id} {problem}",
                    "use a tested version of the engine (docs/engines/install.md)",
                )
        tokens = sum(rollout.num_tokens for rollout in self.rollouts)
        return good(f"{len(self.rollouts)} rollouts of {tokens:,} tokens, all as asked for")

    def _misfit(self, rollout: Rollout) -> str:
        """Name what makes a rollout another than its request asked for; empty: nothing."""
        identity = self.parts.learner.identity
        ids, limit = rollout.response_ids.tolist(), rollout.sampling.max_new_tokens
        served = {span.version for span in rollout.versions}
        if rollout.sampled_by == "student" and served != {self.parts.learner.version}:
            return "was sampled by other weights than the learner's"
        if identity.eos_ids & set(ids[:-1]):
            return "goes on after an end-of-sequence token"
        if rollout.finish_reason is FinishReason.STOP and ids[-1] not in identity.eos_ids:
            return f"stopped at token {ids[-1]}, which is no end-of-sequence token"
        if rollout.finish_reason is FinishReason.LENGTH and len(ids) != limit:
            return f"was cut after {len(ids)} tokens, not at {limit}"
        if max(ids) >= identity.vocab_size:
            return f"has token {max(ids)}, the vocabulary has {identity.vocab_size}"
        return ""

    async def ends(self) -> Verdict:
        """Count the rollouts that ended by themselves."""
        stopped = [r for r in self.rollouts if r.finish_reason is FinishReason.STOP]
        limit = self.config.sampling.max_new_tokens
        if stopped:
            names = {self.parts.text.decode_each([int(r.response_ids[-1])])[0] for r in stopped}
            return good(
                f"{len(stopped)} of {len(self.rollouts)} answers ended with "
                f"{', '.join(sorted(names))}, within {limit} tokens"
            )
        return doubtful(
            f"none of {len(self.rollouts)} answers ended within sampling.max_new_tokens={limit}",
            "raise it; if answers never end, see that eos_token_id in generation_config.json is "
            "the template's end of a turn. A student learns to stop only where it stops",
        )

    async def teacher_answers(self) -> Verdict:
        """Let the teacher answer the same requests, where it samples what is trained on."""
        if self.parts.teacher_rollouts is None:
            return skipped("the teacher samples nothing that is trained on")
        temperature = self.config.rollouts.teacher_temperature
        requests = [
            request
            if temperature is None
            else replace(request, sampling=replace(request.sampling, temperature=temperature))
            for request in self.requests
        ]
        self.answers = await generate(self.parts.teacher_rollouts, requests)
        for answer in self.answers:
            if problem := self._misfit(answer):
                return bad(
                    f"the teacher's answer {answer.rollout_id} {problem}",
                    "use a tested version of the engine (docs/engines/install.md)",
                )
        tokens = sum(answer.num_tokens for answer in self.answers)
        return good(f"{len(self.answers)} answers of {tokens:,} tokens, all as asked for")

    # --- Scores -----------------------------------------------------------------------------------

    @property
    def _jobs(self) -> list[ScoringJob]:
        return self._jobs_of(self.rollouts)

    def _jobs_of(self, rollouts: list[Rollout]) -> list[ScoringJob]:
        """Return the jobs of rollouts.

        Raises:
            EngineError: one cannot be aligned with the teacher's tokens.
        """
        asked = self.parts.view.jobs(rollouts)
        for job in asked:
            if isinstance(job, UnalignedRollout):
                raise EngineError(
                    f"rollout {job.rollout_id} cannot be aligned with the teacher's tokens: "
                    f"{job.reason}"
                )
        return [job for job in asked if isinstance(job, ScoringJob)]

    async def score(self) -> Verdict:
        """Score all rollouts in one call."""
        self.results = await self.parts.required_teacher.score(self._jobs)
        failed = [result for result in self.results if isinstance(result, ScoreFailure)]
        if failed:
            return bad(
                f"{len(failed)} of {len(self.results)} rollouts got no score: {failed[0].reason}",
                "see the server's log, and docs/engines/failures.md",
            )
        tags = Counter(job.tag for job in self._jobs if job.tag is not None)
        whose = ", ".join(f"{count} from {tag}" for tag, count in tags.items())
        found = f"{len(self.results)} of {len(self.results)} rollouts got one"
        found += f" ({whose})" if whose else ""
        if silent := [tag for tag in self.config.tags if tag not in tags]:
            change = "raise --rollouts, or see that the prompts have rows of every tag"
            return doubtful(f"{found}, none from {', '.join(silent)}", change)
        return good(found)

    async def score_alone(self) -> Verdict:
        """Score each rollout again, alone."""
        found_N = await gaps_alone(self.parts.required_teacher, self._jobs, self.results)
        return self._compared(
            found_N,
            "the same tokens alone and in a batch",
            "the scores depend on the batch: update the server, or set scoring.attention_backend, "
            "e.g. triton (vLLM: server_arguments.attention-backend)",
        )

    async def score_by_each_server(self) -> Verdict:
        """Score all rollouts with every existing server by itself."""
        assert self.request is not None, "there are scores"
        servers = each_server(self.config, self.request)
        if len(servers) < 2:
            return skipped("there is one server")
        found: list[FloatArray] = []
        for url, teacher in servers.items():
            self.say(f"scoring with {url}")
            try:
                await teacher.start()
                one = await teacher.score(self._jobs)
            finally:
                await teacher.close()
            found.append(gaps(url, one, self.results))
        return self._compared(
            np.concatenate(found),
            f"{len(servers)} servers",
            "the servers serve different weights or precisions: start them alike",
        )

    async def score_at_other_temperature(self) -> Verdict:
        """Score all rollouts with another temperature in the request, which must not matter."""
        teacher = asked_at(self.parts.required_teacher, OTHER_TEMPERATURE)
        if teacher is None:
            return skipped("an embedded teacher is asked for no temperature")
        other = await teacher.score(self._jobs)
        return self._compared(
            gaps(teacher.teacher_id, other, self.results),
            f"temperature 1 and {OTHER_TEMPERATURE} in the request",
            "the server applies a temperature to the logprobs of given tokens: use a tested "
            "version of its engine (docs/engines/install.md)",
        )

    def _compared(self, gap_N: FloatArray, what: str, change: str) -> Verdict:
        tolerance = teacher_tolerance_nats(self.config)
        mean = float(gap_N.mean())
        found = (
            f"{what}: {mean:.2g} nats apart on average, {float(gap_N.max()):.2g} at most "
            f"(rounding explains {tolerance:g})"
        )
        return good(found) if mean <= tolerance else bad(found, change)

    async def teacher_is_awake(self) -> Verdict:
        """Compare the teacher's scores and entropy with those of a model without weights."""
        if has_ensemble(self.config) and isinstance(self.request, SampledRequest):
            return skipped("an ensemble was asked for no candidates, so its entropy is not known")
        scores = [result for result in self.results if isinstance(result, TeacherScore)]
        uniform = math.log(self.parts.required_teacher.identity.vocab_size)
        mean = float(np.concatenate([score.logprobs for score in scores]).mean())
        entropy = float(np.concatenate([self._entropy(score) for score in scores]).mean())
        found = (
            f"mean score {mean:.2f} nats, entropy {entropy:.2f}; a model that knows nothing has "
            f"{-uniform:.2f} and {uniform:.2f}"
        )
        if entropy > ASLEEP * uniform:
            return bad(
                found,
                "the teacher predicts nearly nothing: see that scoring.model is a trained model "
                "and that its weights were read",
            )
        if mean < -FOREIGN * uniform:
            return doubtful(
                f"{found}: it would hardly write what the student writes",
                "see that the chat template and template_arguments suit both models",
            )
        return good(found)

    def _entropy(self, score: TeacherScore) -> FloatArray:
        """Return [S] nats: the entropy of each distribution, or a lower bound of it."""
        head = output_head(self.parts.teacher)
        if isinstance(score, HiddenScore) and head is not None:
            return full_entropy(score, head)
        if isinstance(score, TopKScore):
            return lowest_entropy(score)
        raise EngineError(f"{score.teacher_id} gave no candidates, though {self.request} was asked")

    # --- The learner ------------------------------------------------------------------------------

    async def learner_against_engine(self) -> Verdict:
        """Take a step on the rollouts, which compares the learner's logprobs with the engine's."""
        gap, update = await self._trained(self.rollouts, self.results)
        self.grad_norm = update.grad_norm
        norm = f"over {update.num_loss_tokens:,} tokens, gradient norm {update.grad_norm:.3g}"
        if gap is None:
            return good(f"not compared: the step was on the teacher's answers, {norm}")
        tolerance = engine_tolerance_nats(self.config)
        found = f"{gap:.2g} nats apart on average (rounding explains {tolerance:g}) {norm}"
        if gap > tolerance:
            return bad(
                found,
                "sampling and training do not see the same model: compare dtype, quantization and "
                "temperature of both, and use tested versions (docs/engines/install.md)",
            )
        if self._learned_nothing:
            return doubtful(
                f"{found}: all answers to a prompt have the same reward, which teaches nothing",
                "more answers with --rollouts and samples_per_prompt, or prompts that the student "
                "answers correctly at times",
            )
        return good(found)

    @property
    def _learned_nothing(self) -> bool:
        """Whether the step left the weights as they were, for want of rewards that differ."""
        return self.request is None and self.grad_norm == 0

    async def push_after_step(self) -> Verdict:
        """Push the weights of the step.

        Raises:
            WeightVersionError: the weights in use are others.
        """
        if self._learned_nothing:
            return skipped("the step changed nothing")
        before = self.parts.engine.version
        await push_weights(self.parts)
        after = self.parts.engine.version
        if after.digest == before.digest or after != self.parts.learner.version:
            return bad(f"the engine serves {after} after the step", "see docs/engines/weights.md")
        return good(f"step {after.step}, digest {after.digest[:12]} was read back")

    async def sample_after_step(self) -> Verdict:
        """Sample the same requests with the new weights, and compare with the learner again."""
        rollouts = await generate(self.parts.engine, self.requests)
        for rollout in rollouts:
            if problem := self._misfit(rollout):
                return bad(f"rollout {rollout.rollout_id} {problem}", "see docs/engines/weights.md")
        results: list[ScoreResult] = []
        if self.request is not None:
            results = await self.parts.required_teacher.score(self._jobs_of(rollouts))
        moved = _moved(self.rollouts, rollouts)
        gap, _ = await self._trained(rollouts, results)
        tolerance = engine_tolerance_nats(self.config)
        found = f"the engine's logprobs moved by {moved:.2g} nats"
        if math.isinf(moved):
            found = "every answer differs from its first token on"
        if gap is not None:
            found += f", and are {gap:.2g} from the learner's"
        if gap is not None and gap > tolerance:
            return bad(
                found,
                "the engine samples with older weights, or with keys and values that older ones "
                "computed: use a tested version (docs/engines/weights.md)",
            )
        if moved <= tolerance:
            return doubtful(
                f"{found}: so little would not show older weights",
                "nothing, if the digest above was read back",
            )
        return good(found)

    async def _trained(
        self, rollouts: list[Rollout], results: list[ScoreResult]
    ) -> tuple[float | None, Update]:
        """Take a step; return the mean distance in nats of learner and engine before it.

        An objective that learns from the teacher's answers alone takes it on those: None.
        """
        if "student" not in self.config.objective.learns_from:
            given = self._given()
            if not given:
                raise EngineError("there are no answers of the teacher to train on")
            return None, await self._step([TrainingRollout(rollout=answer) for answer in given])
        if self.request is None:
            update = await self._step([TrainingRollout(rollout=rollout) for rollout in rollouts])
        else:
            view = self.parts.view
            pairs = zip(rollouts, results, strict=True)
            scored = [view.scored(rollout, self._needed(score)) for rollout, score in pairs]
            failed = [item for item in scored if isinstance(item, ScoreFailure)]
            if failed:
                raise EngineError(
                    f"rollout {failed[0].rollout_id} got no score: {failed[0].reason}"
                )
            update = await self._step([s for s in scored if isinstance(s, TrainingRollout)])
        found = [metric.value for metric in update.metrics if metric.key == _ENGINE_GAP]
        if not found:
            raise EngineError(f"the learner reports no {_ENGINE_GAP}")
        return found[0], update

    async def _step(self, rollouts: Sequence[TrainingRollout]) -> Update:
        return await self.parts.learner.update(self.parts.make_batch(rollouts))

    def _given(self) -> list[Rollout]:
        """Return answers of the teacher: those that it sampled, or the first of the file."""
        if (file := self.config.rollouts.file) is None:
            return self.answers
        rows = read_training(file, vocab_size=self.parts.learner.identity.vocab_size)
        return [item.rollout for _, item in rows[: self.num_rollouts]]

    def _needed(self, score: ScoreResult) -> ScoreResult:
        """Return the score as the objective asks for it: the doctor asked for more."""
        is_plain = isinstance(self.config.objective.score_request, SampledRequest)
        if is_plain and isinstance(score, TopKScore):
            return TeacherScore(teacher_id=score.teacher_id, logprobs=score.logprobs)
        return score


def sample_requests(config: RunConfig, parts: Parts, count: int) -> list[RolloutRequest]:
    """Build about so many requests to the student: one of each prompt, or a prompt's whole group.

    Rewards are compared within the samples of a prompt, so an objective of rewards needs several.
    """
    each = min(config.samples_per_prompt, count) if config.objective.reward_weight else 1
    prompts = parts.prompts.take(0, max(1, count // each))
    students = config.model_copy(update={"rollouts": RolloutsConfig()})
    return [
        request_number(students, prompt, index * config.samples_per_prompt + sample)
        for index, prompt in enumerate(prompts)
        for sample in range(each)
    ]


def _moved(before: list[Rollout], after: list[Rollout]) -> float:
    """Return the mean distance in nats of the tokens that two answers to a request begin with."""
    found: list[FloatArray] = []
    for old, new in zip(before, after, strict=True):
        size = min(old.num_tokens, new.num_tokens)
        same = old.response_ids[:size] == new.response_ids[:size]
        shared = size if same.all() else int(same.argmin())
        # The first token that differs has the same context, but is another token.
        found.append(np.abs(old.behavior_logprobs[:shared] - new.behavior_logprobs[:shared]))
    gap_N = np.concatenate(found)
    return float(gap_N.mean()) if gap_N.size else math.inf
