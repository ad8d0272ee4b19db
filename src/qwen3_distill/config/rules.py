"""Rules between the sections of a `RunConfig`: one function each, raising ValueError.

A rule that needs one section only is a validator of that section. `check_rules` runs the rules
below in the order of `RULES`; the first that is broken is reported.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from qwen3_distill.config.cluster_rules import CLUSTER_RULES
from qwen3_distill.config.data import PromptsConfig, VerifierConfig
from qwen3_distill.config.engines import VLLM_MAX_RANK
from qwen3_distill.config.objective import needs_hidden_states
from qwen3_distill.config.self_teacher import TEACHER_RULES
from qwen3_distill.config.several_rules import SEVERAL_RULES
from qwen3_distill.config.student_support import STUDENT_SUPPORT_RULES
from qwen3_distill.config.tokenizer import TOKENIZER_RULES

if TYPE_CHECKING:
    from qwen3_distill.config.run import RunConfig


def check_rules(config: "RunConfig") -> None:
    """Run every rule.

    Raises:
        ValueError: the first rule that is broken, with what to change.
    """
    for rule in RULES:
        rule(config)


def objective_has_its_teacher(config: "RunConfig") -> None:
    objective, source = config.objective, config.rollouts.source
    if config.scoring is not None:
        return
    if objective.score_request is not None:
        raise ValueError(
            f"scoring=null with objective.kind={objective.kind}: the objective compares with the "
            "teacher's scores; add a `scoring` section, or use objective.kind=grpo or sft"
        )
    if "teacher" in config.rollouts.samplers:
        raise ValueError(
            f"scoring=null with rollouts.source={source}: there is no teacher to sample; add a "
            "`scoring` section, or use rollouts.source=file"
        )
    if config.evaluation is not None and config.evaluation.teacher:
        raise ValueError(
            "scoring=null with evaluation.teacher=true: there is no teacher to evaluate; set "
            "evaluation.teacher=false, or add a `scoring` section"
        )


def evaluation_starts_no_server(config: "RunConfig") -> None:
    evaluation, scoring = config.evaluation, config.scoring
    if config.loaded_teachers or evaluation is None or not evaluation.teacher:
        return
    if scoring is not None and any(t.section.kind != "embedded" for t in config.teachers):
        raise ValueError(
            f"evaluation.teacher=true with objective.kind={config.objective.kind}: training needs "
            f"no teacher, and scoring.kind={scoring.kind} would be started for one evaluation "
            "alone; set evaluation.teacher=false, or scoring.kind=embedded"
        )


def objective_learns_from_its_samplers(config: "RunConfig") -> None:
    objective = config.objective
    if config.rollouts.samplers - objective.learns_from:
        raise ValueError(
            f"rollouts.source={config.rollouts.source} with objective.kind={objective.kind}: "
            f"{objective.refusal}"
        )


def harvest_needs_the_student_alone(config: "RunConfig") -> None:
    pipeline = config.pipeline
    if pipeline.kind == "streaming" and pipeline.harvest and config.rollouts.source == "teacher":
        raise ValueError(
            "pipeline.harvest with rollouts.source=teacher: only rollouts of the student are "
            "harvested, and there is none; drop pipeline.harvest"
        )


def replay_keeps_rollouts_of_the_student(config: "RunConfig") -> None:
    if config.replay is None:
        return
    if config.rollouts.source != "student":
        raise ValueError(
            f"replay with rollouts.source={config.rollouts.source}: a kept rollout's age and first "
            "priority come from the student's weights that sampled it, which the teacher's answers "
            "do not have; use pipeline.kind=offline for several epochs, or replay=null"
        )
    if config.pipeline.kind == "offline":
        raise ValueError(
            "replay with pipeline.kind=offline: both train on rollouts again; use one of them"
        )


def offline_needs_ratio(config: "RunConfig") -> None:
    objective = config.objective
    if config.pipeline.kind != "offline":
        return
    if objective.lacks_ratio:
        raise ValueError(
            f"pipeline.kind=offline with objective.{objective.ratio_setting}: the rollouts are "
            "those of the student before the run, and without the ratio the gradient is biased; "
            f"set {objective.ratio_key}"
        )
    if objective.credits_later_tokens:
        raise ValueError(
            f"pipeline.kind=offline with objective.{objective.credit_settings}: a token's ratio "
            "does not correct the tokens after it, which the student sampled before the run, so "
            f"their share of its advantage is biased; use {objective.credit_remedy}, or another "
            "pipeline.kind"
        )


def offline_says_what_it_collects(config: "RunConfig") -> None:
    source, pipeline = config.rollouts.source, config.pipeline
    if source == "file" and pipeline.kind != "offline":
        raise ValueError(
            f"rollouts.source=file with pipeline.kind={pipeline.kind}: nothing is sampled, so "
            "there is no loop to run; use pipeline.kind=offline"
        )
    if pipeline.kind == "offline" and source != "file" and pipeline.collect_steps is None:
        raise ValueError(
            "pipeline.kind=offline without collect_steps: set pipeline.collect_steps to the number "
            "of steps whose rollouts are collected before training, e.g. steps for one epoch"
        )
    if source == "file" and pipeline.kind == "offline" and pipeline.collect_steps is not None:
        raise ValueError(
            f"pipeline.collect_steps={pipeline.collect_steps} with rollouts.source=file: the file "
            "is all there is; drop collect_steps"
        )


def top_p_and_top_k_bias_sampled_tokens(config: "RunConfig") -> None:
    truncated = config.sampling.top_p < 1 or config.sampling.top_k > 0
    if config.objective.needs_ratio and truncated:
        raise ValueError(
            f"objective.kind={config.objective.kind} with sampling.top_p={config.sampling.top_p}, "
            f"top_k={config.sampling.top_k}: tokens that are never sampled get no gradient, and "
            "no importance ratio can bring them back, so the gradient is not that of the "
            f"{'reward' if config.objective.score_request is None else 'reverse KL'}; use top_p=1 "
            "and top_k=0, or objective.kind=full or top_k"
        )


def temperature_needs_ratio(config: "RunConfig") -> None:
    objective = config.objective
    if objective.lacks_ratio and config.sampling.temperature != 1:
        raise ValueError(
            f"objective.{objective.ratio_setting} with "
            f"sampling.temperature={config.sampling.temperature}: "
            "tokens are sampled from another distribution than the one whose KL is minimised, "
            "and without the ratio the gradient is biased; set "
            f"{objective.ratio_key} or temperature=1"
        )


def temperature_excludes_credit_of_later_tokens(config: "RunConfig") -> None:
    objective = config.objective
    if objective.credits_later_tokens and config.sampling.temperature != 1:
        raise ValueError(
            f"sampling.temperature={config.sampling.temperature} with "
            f"{objective.credit_settings}: a token's ratio does not correct the tokens after it, "
            "so their share of its advantage is biased; use temperature=1, or "
            f"{objective.credit_remedy}"
        )


def task_reward_needs_verifier_and_samples(config: "RunConfig") -> None:
    objective = config.objective
    if objective.reward_weight == 0:
        return
    if config.verifier is None:
        raise ValueError(f"objective.{objective.reward_setting} needs a `verifier` section")
    if config.samples_per_prompt < 2:
        raise ValueError(
            f"objective.{objective.reward_setting} with samples_per_prompt=1: the reward is "
            "centred within a prompt's samples, so with one sample it is always 0; use 2 or more"
        )


def full_vocabulary_needs_one_process(config: "RunConfig") -> None:
    objective, scoring, training = config.objective, config.scoring, config.training
    if not needs_hidden_states(objective) or scoring is None:
        return
    if scoring.kind in ("several", "ensemble"):
        return  # refused by a rule of their own
    if scoring.kind != "embedded" or training.kind != "embedded":
        raise ValueError(
            f"objective.kind={objective.kind} over the full vocabulary needs the teacher's "
            "hidden states and output head, which a server does not give: use "
            "scoring.kind=embedded with training.kind=embedded, or objective.kind=top_k, or "
            "objective.kl_baseline.kind=top_k"
        )
    if scoring.own_process or training.own_process:
        raise ValueError(
            f"objective.kind={objective.kind} over the full vocabulary needs teacher and "
            "learner in one process, where the teacher's output head is shared: use "
            "own_process=false for both, or objective.kind=top_k, or "
            "objective.kl_baseline.kind=top_k"
        )


def quantization_needs_ratio(config: "RunConfig") -> None:
    generation, objective = config.generation, config.objective
    if generation.kind != "vllm" or not objective.lacks_ratio:
        return
    for setting, plain in (("quantization", "null"), ("kv_cache_dtype", "auto")):
        value = getattr(generation, setting)
        if value == "fp8":
            raise ValueError(
                f"generation.{setting}={value} with objective.{objective.ratio_setting}: tokens "
                "are sampled from a quantized student, and without the ratio the gradient is "
                f"biased; set {objective.ratio_key} or {setting}={plain}"
            )


def lora_rank_fits_vllm(config: "RunConfig") -> None:
    tuning, generation = config.training.tuning, config.generation
    if generation.kind != "vllm" or generation.adapters != "swap" or tuning.kind != "lora":
        return
    given = generation.engine_arguments.get("max_lora_rank")
    limit = min(given, VLLM_MAX_RANK) if isinstance(given, int) else VLLM_MAX_RANK
    if tuning.rank > limit:
        raise ValueError(
            f"training.tuning.rank={tuning.rank} is above vLLM's limit of {limit}; lower the "
            "rank, or have vLLM serve merged weights with generation.adapters=merge"
        )


def no_ipc_of_weights_in_training(config: "RunConfig") -> None:
    generation, tuning = config.generation, config.training.tuning
    if (
        generation.kind == "vllm"
        and generation.full_weights == "ipc"
        and tuning.kind == "full"
        and config.pipeline.kind == "streaming"
    ):
        raise ValueError(
            "generation.full_weights=ipc with training.tuning.kind=full and "
            "pipeline.kind=streaming: CUDA IPC lends the weights that are being trained, and "
            "an engine that is restarted during a step could not get its version back; "
            "use full_weights=auto or directory"
        )


def in_flight_fits_one_prompt(config: "RunConfig") -> None:
    pipeline = config.pipeline
    if pipeline.kind == "streaming" and config.max_in_flight < config.samples_per_prompt:
        raise ValueError(
            f"samples_per_prompt={config.samples_per_prompt} is more than the "
            f"{config.max_in_flight} rollouts that run at a time, and the samples of a prompt "
            "are started together; raise pipeline.max_in_flight or generation.max_sequences"
        )


def steps_ahead_within_staleness(config: "RunConfig") -> None:
    pipeline = config.pipeline
    if pipeline.kind != "streaming" or pipeline.max_steps_ahead is None:
        return
    if pipeline.max_steps_ahead > pipeline.max_staleness_steps:
        raise ValueError(
            f"pipeline.max_steps_ahead={pipeline.max_steps_ahead} is more than "
            f"max_staleness_steps={pipeline.max_staleness_steps}: rollouts would be sampled to "
            "be dropped; lower the one or raise the other"
        )


def harvest_and_prefix_exclude_credit_of_later_tokens(config: "RunConfig") -> None:
    pipeline, objective = config.pipeline, config.objective
    if pipeline.kind != "streaming" or not objective.credits_later_tokens:
        return
    cut = "harvest" if pipeline.harvest else "prefix" if pipeline.prefix else None
    if cut:
        raise ValueError(
            f"pipeline.{cut} with objective.{objective.credit_settings}: a piece of an answer "
            f"does not know what comes after it; use {objective.credit_remedy}, or whole rollouts"
        )


def replay_age_covers_updates(config: "RunConfig") -> None:
    pipeline, replay = config.pipeline, config.replay
    if pipeline.kind != "streaming" or replay is None:
        return
    needed = pipeline.max_staleness_steps + replay.updates_per_batch - 1
    if replay.max_age_steps < needed:
        raise ValueError(
            f"replay.max_age_steps={replay.max_age_steps} with "
            f"pipeline.max_staleness_steps={pipeline.max_staleness_steps}, "
            f"updates_per_batch={replay.updates_per_batch}: rollouts that arrive as old as "
            f"they may would be dropped before their last update; use at least {needed}, or "
            "lower the others"
        )


def replay_draws_single_rollouts(config: "RunConfig") -> None:
    if config.replay is not None and config.training.shared_prompts:
        raise ValueError(
            "training.shared_prompts=true with replay: kept rollouts are drawn one by one, and "
            "rarely have a prompt in common; set training.shared_prompts=false, or replay=null"
        )


def replay_needs_ratio(config: "RunConfig") -> None:
    objective = config.objective
    if config.replay is not None and objective.lacks_ratio:
        raise ValueError(
            f"replay with objective.{objective.ratio_setting}: replayed tokens were sampled from "
            "older weights, and without the ratio the gradient is biased; set "
            f"{objective.ratio_key}"
        )


def replay_excludes_credit_of_later_tokens(config: "RunConfig") -> None:
    objective = config.objective
    if config.replay is not None and objective.credits_later_tokens:
        raise ValueError(
            f"replay with objective.{objective.credit_settings}: a token's ratio does not correct "
            "the tokens after it, which older weights sampled, so their share of its advantage is "
            f"biased; use {objective.credit_remedy}, or no replay"
        )


def replay_keeps_no_hidden_states(config: "RunConfig") -> None:
    if config.replay is not None and needs_hidden_states(config.objective):
        raise ValueError(
            f"replay with objective.kind={config.objective.kind} over the full vocabulary: the "
            "teacher's hidden states are thousands of numbers a token and are not kept; use "
            "objective.kind=top_k, or objective.kl_baseline.kind=top_k or none"
        )


def replay_capacity_fits_one_step(config: "RunConfig") -> None:
    replay = config.replay
    if replay is None:
        return
    rollouts = config.rollouts_per_step
    if replay.capacity_rollouts is not None and replay.capacity_rollouts < rollouts:
        raise ValueError(
            f"replay.capacity_rollouts={replay.capacity_rollouts} is below one step's "
            f"{rollouts} rollouts (prompts_per_step x samples_per_prompt); raise it"
        )
    least = rollouts * config.sampling.max_new_tokens
    if replay.capacity_tokens < least:
        raise ValueError(
            f"replay.capacity_tokens={replay.capacity_tokens} is below what one step may "
            f"sample: {rollouts} rollouts of up to {config.sampling.max_new_tokens} tokens are "
            f"{least}; raise it, with room for the prompts"
        )


def evaluation_split_is_held_out(config: "RunConfig") -> None:
    evaluation = config.evaluation
    if (
        evaluation is not None
        and evaluation.prompts.kind == "task"
        and config.prompts.kind == "task"
        and evaluation.prompts.split == config.prompts.split
    ):
        raise ValueError(
            f"prompts.split and evaluation.prompts.split are both {config.prompts.split!r}: "
            "the evaluation would not be held out; train on `train`, evaluate on `eval`"
        )


def verifier_fits_prompts(config: "RunConfig") -> None:
    pairs: list[tuple[str, VerifierConfig | None, PromptsConfig]] = [
        ("verifier", config.verifier, config.prompts)
    ]
    if config.evaluation is not None:
        pairs.append(("evaluation", config.evaluation.verifier, config.evaluation.prompts))
    for where, verifier, prompts in pairs:
        if verifier is None:
            continue
        if prompts.kind == "task":
            if verifier.kind not in ("task", "python"):
                article = "an" if verifier.kind[0] in "aeiou" else "a"
                raise ValueError(
                    f"{where}: {article} {verifier.kind} verifier needs prompts with an "
                    "answer_field"
                )
            if verifier.kind == "task" and verifier.task != prompts.task:
                raise ValueError(
                    f"{where}: verifier.task={verifier.task} with prompts.task={prompts.task}: "
                    "it would judge answers to other problems; use the same task for both"
                )
        elif verifier.kind == "task":
            raise ValueError(f"{where}: a task verifier needs prompts of kind `task`")
        elif prompts.answer_field is None and verifier.kind != "python":
            raise ValueError(
                f"{where}: the {verifier.kind} verifier compares with a reference answer; set "
                "answer_field"
            )


RULES: tuple[Callable[["RunConfig"], None], ...] = (
    objective_has_its_teacher,
    evaluation_starts_no_server,
    objective_learns_from_its_samplers,
    offline_says_what_it_collects,
    offline_needs_ratio,
    harvest_needs_the_student_alone,
    replay_keeps_rollouts_of_the_student,
    *SEVERAL_RULES,
    full_vocabulary_needs_one_process,
    quantization_needs_ratio,
    lora_rank_fits_vllm,
    top_p_and_top_k_bias_sampled_tokens,
    temperature_needs_ratio,
    temperature_excludes_credit_of_later_tokens,
    no_ipc_of_weights_in_training,
    in_flight_fits_one_prompt,
    steps_ahead_within_staleness,
    replay_age_covers_updates,
    harvest_and_prefix_exclude_credit_of_later_tokens,
    replay_needs_ratio,
    replay_draws_single_rollouts,
    replay_excludes_credit_of_later_tokens,
    replay_keeps_no_hidden_states,
    replay_capacity_fits_one_step,
    evaluation_split_is_held_out,
    task_reward_needs_verifier_and_samples,
    verifier_fits_prompts,
    *CLUSTER_RULES,
    *TEACHER_RULES,
    *TOKENIZER_RULES,
    *STUDENT_SUPPORT_RULES,
)
"""In the order in which they are checked."""
