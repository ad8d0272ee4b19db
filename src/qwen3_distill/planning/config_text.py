"""Writes a first config as commented YAML."""

import json
import re
from collections.abc import Sequence

from qwen3_distill.planning.facts import Facts
from qwen3_distill.planning.ladder import Rung

_CUDA_PAGES = {"cuda": "docs/start/x86-gpu.md", "unified": "docs/start/dgx-spark.md"}
_COLUMN = 29
"""Where comments begin, as far as values are shorter."""


def config_text(facts: Facts, rung: Rung, plan_lines: Sequence[str]) -> str:
    """Return the file: what to learn, three engines, memory, evaluation.

    Args:
        plan_lines: what the memory goes to, for the head.
    """
    on_cpu = facts.machine.kind == "cpu"
    lines = [
        *_head(facts, plan_lines),
        *_learning(facts, rung),
        *(_embedded_engines(facts, rung) if on_cpu else _real_engines(facts, rung)),
        *_rest(facts),
    ]
    return "\n".join(lines) + "\n"


def _line(text: str, comment: str = "") -> str:
    """A line with its comment in the common column."""
    return f"{text:<{_COLUMN}}# {comment}" if comment else text


def _text(value: str) -> str:
    """A text as YAML reads it: plain where that is safe, else quoted."""
    plain = all(character.isalnum() or character in "/._-@" for character in value)
    unsafe = not value or value[0] in "-.@0123456789" or value.lower() in _WORDS
    if plain and not unsafe:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


_WORDS = ("true", "false", "null", "yes", "no", "on", "off")


def _head(facts: Facts, plan_lines: Sequence[str]) -> list[str]:
    machine, wishes = facts.machine, facts.wishes
    lines = [
        f"{facts.student.name} from {facts.teacher.name}, for {machine.label}. Written by",
        *_wrapped(wishes.command),
    ]
    if machine.kind == "unified":
        lines += [
            "This project has not been run on such a machine: from the engines' sources and",
            "others' reports. `qwen3-distill plan` predicts its times, `qwen3-distill doctor`",
            "looks at its clock and bandwidth.",
        ]
    if machine.kind == "cpu":
        lines += ["No GPU is used: all engines are PyTorch on the CPU."]
    else:
        lines += [
            "Engines: `qwen3-distill engines install`. Every command in order: "
            f"{_CUDA_PAGES[machine.kind]}.",
        ]
    lines += [*plan_lines, "All settings: docs/configuration.md."]
    # Names and options are the user's: none may end its comment.
    return ["# " + "".join(c if c.isprintable() else "?" for c in line) for line in lines]


def _wrapped(command: str) -> list[str]:
    """The command in lines that a shell takes as one, as long as a comment may be."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > _COMMAND_COLUMNS:
            lines[-1] += " \\"
            lines.append("  " + part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip() if len(lines) == 1 else f"{lines[-1]} {part}"
    return [f"  {line}" for line in lines]


_COMMAND_COLUMNS = 88


def _learning(facts: Facts, rung: Rung) -> list[str]:
    wishes, prompts = facts.wishes, facts.prompts
    lines = [
        f"output_dir: {_text(wishes.output_dir)}",
        _line("seed: 0", "everything random derives from it"),
        f"steps: {wishes.steps}",
        _line(
            f"prompts_per_step: {_prompts_per_step(facts, rung)}",
            "rollouts of a step, with samples_per_prompt",
        ),
        "samples_per_prompt: 1",
        "",
        "student:",
        f"  model: {_text(facts.student.name)}",
    ]
    if facts.student.can_think:
        thinking = "true" if wishes.thinking else "false"
        lines.append(f"  template_arguments: {{enable_thinking: {thinking}}}")
    if prompts.kind == "task":
        lines.append("prompts: {kind: task, split: train}")
    else:
        lines += ["prompts: &prompts", f"  kind: {prompts.kind}", f"  path: {_text(prompts.path)}"]
        if prompts.kind == "hf":
            lines += [f"  name: {_text(prompts.name)}"] if prompts.name else []
            lines += [f"  split: {_text(prompts.split)}"]
        lines.append(f"  prompt_field: {_text(prompts.field)}")
        lines += [f"  answer_field: {_text(prompts.answer_field)}"] if prompts.answer_field else []
        lines += [f"  suffix: {_text(prompts.suffix)}"] if prompts.suffix else []
    return [*lines, f"sampling: {_sampling(facts)}", ""]


def _prompts_per_step(facts: Facts, rung: Rung) -> int:
    """Prompts of a step: as many as are decoded at a time, without streaming's reserve."""
    if facts.machine.kind == "cpu":
        return min(64, rung.max_sequences)
    return rung.max_sequences // 2 if facts.wishes.streaming else rung.max_sequences


def _sampling(facts: Facts) -> str:
    return f"{{temperature: 1.0, max_new_tokens: {facts.wishes.max_new_tokens}}}"


def _model_tokens(facts: Facts) -> int:
    """Longest prompt and answer: 1,536 tokens for the prompt, in whole thousands, at most all."""
    longest = -(-(facts.wishes.max_new_tokens + 1536) // 1024) * 1024
    return min(longest, facts.student.shape.context_length, facts.teacher.shape.context_length)


# --- Engines ------------------------------------------------------------------------------------


def _real_engines(facts: Facts, rung: Rung) -> list[str]:
    return [
        *_generation(facts, rung),
        *_scoring(facts, rung),
        *_training(facts, rung),
        "objective: {kind: top_k, k: 16}",
        *_pipeline(facts),
        *_planning(facts),
    ]


def _generation(facts: Facts, rung: Rung) -> list[str]:
    unified = facts.machine.kind == "unified"
    lines = ["generation:", "  kind: vllm"]
    if unified:
        lines += [
            "  # As the learner computes. `quantization: fp8` would halve the reads of weights; it",
            "  # was not tried on this GPU.",
            "  dtype: bfloat16",
        ]
    else:
        lines.append("  dtype: bfloat16")
    if not unified and facts.trains_adapters:
        lines.append(
            _line("  adapters: merge", "full decode speed; a push of whole weights is short")
        )
    why = "twice a step's, so that decoding stays full"
    if not facts.wishes.streaming:
        why = "all rollouts of a step; raise it together with prompts_per_step"
    lines.append(_line(f"  max_sequences: {rung.max_sequences}", why))
    lines.append(_line(f"  max_model_tokens: {_model_tokens(facts)}", "prompt and answer"))
    if unified:
        lines.append(_line("  float32_head: true", "logprobs with less noise; free in vLLM 0.26"))
    return lines


def _scoring(facts: Facts, rung: Rung) -> list[str]:
    unified = facts.machine.kind == "unified"
    lines = [
        "scoring:",
        "  kind: sglang",
        "  device: cuda",
        f"  model: {_text(facts.teacher.name)}",
    ]
    if facts.teacher.shape.fp8_checkpoint:
        lines.append(_line("  quantization: null", "the checkpoint is in FP8"))
    elif unified:
        lines += [
            "  # Made at start from the bfloat16 weights, per channel: kernels that work here.",
            "  # For that the whole bfloat16 weights are loaded: drop the page cache before a run.",
            "  # Qwen's own FP8 checkpoints load in half the memory, but use blocks: their kernels",
            "  # are unproven on this GPU. docs/guide/teachers.md makes one per channel.",
            "  quantization: fp8",
        ]
    else:
        lines.append(_line("  quantization: fp8", "made at start from the bfloat16 weights"))
    if unified:
        lines += [
            "  attention_backend: flashinfer",
            _line("  float32_head: true", "less noise, and dear here: enable-tf32-matmul below"),
        ]
    lines += [
        f"  request_tokens: {rung.request_tokens}",
        f"  max_in_flight: {rung.max_in_flight}",
    ]
    if rung.chunked_prefill_tokens != 8192:  # the default
        lines.append(f"  chunked_prefill_tokens: {rung.chunked_prefill_tokens}")
    comment = "rows of logits; SGLang waits for the GPU at every part"
    lines.append(_line(f"  chunk_tokens: {rung.chunk_tokens}", comment))
    if unified:
        lines += [
            "  environment:",
            '    SGLANG_ENABLE_JIT_DEEPGEMM: "0"    # it takes this GPU for one it has kernels for',
            "  # The float32 head multiplies bfloat16 values, which TF32 holds exactly.",
            "  server_arguments: {watchdog-timeout: 600, enable-tf32-matmul: true}",
        ]
    return lines


def _training(facts: Facts, rung: Rung) -> list[str]:
    unified = facts.machine.kind == "unified"
    why = (
        "larger ones gain nothing here" if unified else "with small ones the GPU waits for the host"
    )
    lines = ["training:", "  kind: unsloth"]
    if facts.trains_adapters:
        lines += [
            "  dtype: bfloat16",
            "  tuning: {kind: lora, rank: 32, alpha: 32.0}",
            "  optimizer: {learning_rate: 1.0e-4}",
        ]
    else:
        lines += ["  dtype: float32", *_full_tuning()]
    lines += [
        f"  max_model_tokens: {_model_tokens(facts)}",
        _line(f"  micro_batch_tokens: {rung.micro_batch_tokens}", why),
    ]
    if unified:
        lines.append(
            "  # Not `unsloth`: it moves activations to the host's memory, which here is the same."
        )
    return [*lines, "  gradient_checkpointing: auto"]


def _full_tuning() -> list[str]:
    return [
        "  tuning: {kind: full}",
        "  optimizer: {learning_rate: 1.0e-3, betas: [0.9, 0.95]}",
    ]


def _embedded_engines(facts: Facts, rung: Rung) -> list[str]:
    training = ["training:", "  kind: embedded", "  device: cpu"]
    if facts.trains_adapters:
        training += [
            "  tuning: {kind: lora, rank: 32, alpha: 32.0}",
            "  optimizer: {learning_rate: 1.0e-4}",
        ]
    else:
        training += _full_tuning()
    return [
        f"generation: {{kind: embedded, device: cpu, max_sequences: {rung.max_sequences}}}",
        "scoring:",
        "  kind: embedded",
        "  device: cpu",
        f"  model: {_text(facts.teacher.name)}",
        _line(f"  batch_tokens: {rung.request_tokens}", "padded tokens of a pass"),
        *training,
        _line(
            f"  micro_batch_tokens: {rung.micro_batch_tokens}", "memory and speed, not the result"
        ),
        "objective: {kind: top_k, k: 16}",
    ]


# --- The rest -----------------------------------------------------------------------------------


def _pipeline(facts: Facts) -> list[str]:
    if not facts.wishes.streaming:
        return [
            "# One stage after another: strictly on-policy. Concurrent stages (`init --streaming`)",
            "# are faster where answers differ in length: docs/guide/streaming.md.",
            "pipeline: {kind: sequential}",
        ]
    return [
        "# Concurrent stages; a token may be 8 steps old when it is trained on.",
        "pipeline: {kind: streaming, mps: true, max_staleness_steps: 8, max_steps_ahead: 3}",
    ]


def _planning(facts: Facts) -> list[str]:
    if facts.machine.kind != "unified":
        return []
    return [
        "planning:",
        "  # The system hangs or restarts when its memory runs out, instead of ending a process.",
        "  reserve_gib: 14.0",
    ]


def _rest(facts: Facts) -> list[str]:
    every = {"cuda": 10, "unified": 5, "cpu": 10}[facts.machine.kind]
    lines = [""]
    if facts.prompts.verifier is not None:
        lines.append(f"verifier: {{kind: {facts.prompts.verifier}}}")
    return [*lines, *_evaluation(facts), f"checkpoint: {{every_steps: {every}}}"]


def _evaluation(facts: Facts) -> list[str]:
    prompts = facts.prompts
    if prompts.held_out is None or prompts.verifier is None:
        return ["evaluation: null             # held-out accuracy: docs/guide/evaluation.md"]
    lines = ["evaluation:"]
    if prompts.kind == "task":
        lines.append("  prompts: {kind: task, split: eval}")
    else:
        key = "split" if prompts.kind == "hf" else "path"
        lines += ["  prompts:", "    <<: *prompts", f"    {key}: {_text(prompts.held_out)}"]
    return [
        *lines,
        f"  verifier: {{kind: {prompts.verifier}}}",
        f"  sampling: {_sampling(facts)}",
        "  every_steps: 20",
        "  num_problems: 200",
        _line("  final_num_problems: 1500", "at most: before and after the run"),
    ]
