"""Train the lab models: a small teacher, and a student warm-started on the teacher's samples.

Both are plain `Qwen3ForCausalLM` directories for the task in `qwen3_distill.data.chain_task`. The
script is deterministic for a given seed, thread count and machine:

    python scripts/make_lab_models.py --seed 0
    python scripts/make_lab_models.py --stages student evaluate
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwen3_distill.data.chain_task import ChainTask, Problem

PAD, END, USER, ASSISTANT, SYSTEM = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
# The reserved tokens fill the vocabulary up to a multiple of 8, so that every row of the
# embedding has a token.
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT, SYSTEM, *(f"<|reserved_{i}|>" for i in range(3)))
PAD_ID, END_ID, USER_ID, ASSISTANT_ID = 256, 257, 258, 259
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CONTEXT_LENGTH = 1024
MAX_NEW_TOKENS = 96
GROUPED_BATCHES = 8
SAMPLING_BATCH = 256
SAMPLE_POOL_SIZE = 6144
# The student imitates the teacher's answers drawn at this temperature: it knows the task, and
# makes a mistake every few lines. At temperature 1 it would need the teacher's accuracy to imitate.
WARM_START_TEMPERATURE = 1.95
IGNORED = -100

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '<|system|>' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<|user|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

STAGES = ("tokenizer", "teacher", "student", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a Qwen3 model; head_dim is 32 for both models."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One training run: AdamW with linear warm-up and cosine decay to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    beta2: float = 0.98


TEACHER_SHAPE = Shape(
    hidden_size=256, intermediate_size=384, layers=3, heads=8, kv_heads=4, tied=False
)
STUDENT_SHAPE = Shape(
    hidden_size=128, intermediate_size=256, layers=3, heads=4, kv_heads=2, tied=True
)
TEACHER_SCHEDULE = Schedule(steps=900, batch_size=64, learning_rate=2e-3, warmup_steps=50)
STUDENT_SCHEDULE = Schedule(steps=600, batch_size=64, learning_rate=3e-3, warmup_steps=50)


@dataclass(frozen=True)
class Example:
    """Token ids of one chat and its training targets (`IGNORED` where no loss is taken)."""

    tokens: list[int]
    targets: list[int]


# Tokenizer


def build_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer without merges: the id of a byte is its value."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def byte_alphabet() -> list[str]:
    """Return the printable character that the byte-level scheme uses for each byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    replacement = iter(range(256, 512))
    return [chr(byte if byte in printable else next(replacement)) for byte in range(256)]


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, and check what they load as."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "padding_side": "left",
        "pad_token": PAD,
        "eos_token": END,
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_tokenizer(directory: Path) -> None:
    """Raise RuntimeError unless the directory's tokenizer maps text to bytes and back."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ascii_text = bytes(range(128)).decode()
    for text in ("17+5*3-8=", " a  b\n\tc , d .", "grün 漢字 \U0001f600", ascii_text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != list(text.encode()) or tokenizer.decode(ids) != text:
            raise RuntimeError(f"tokenizer does not round-trip {text!r}")
    chat = [{"role": "user", "content": "1+2="}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    if rendered != prompt_tokens("1+2=") or len(tokenizer) != VOCAB_SIZE:
        raise RuntimeError("chat template and training format differ")


# Models


def build_model(shape: Shape) -> Qwen3ForCausalLM:
    """Return a freshly initialised float32 model; draws from torch's global generator."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=32,
        # The default of 0.02 is for wide models; at these widths it costs hundreds of steps.
        initializer_range=0.06,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def load_model(directory: Path) -> Qwen3ForCausalLM:
    """Load a model directory in float32 and in evaluation mode."""
    return Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def save_model(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Write weights, configuration and the settings for sampling at temperature 1."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
    )
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)


# Data


def prompt_tokens(text: str) -> list[int]:
    """Return the ids of a user message up to the start of the assistant's turn."""
    return [USER_ID, *text.encode(), END_ID, ASSISTANT_ID]


def worked_example(task: ChainTask, index: int, seed: int) -> Example:
    """Return training problem `index` with a worked solution in which errors are repaired."""
    problem = task.problem("train", index)
    rng = random.Random(f"errors/{seed}/{index}")
    prompt = prompt_tokens(problem.text)
    tokens, targets = list(prompt), [IGNORED] * len(prompt)
    for segment in task.solution_segments(problem, rng):
        ids = list(segment.text.encode())
        tokens += ids
        targets += [IGNORED] * len(ids) if segment.is_error else ids
    return Example([*tokens, END_ID], [*targets, END_ID])


def sampled_example(problem: Problem, response: list[int]) -> Example:
    """Return a problem with a sampled response, all of whose tokens are targets."""
    prompt = prompt_tokens(problem.text)
    return Example([*prompt, *response], [*[IGNORED] * len(prompt), *response])


def worked_batches(task: ChainTask, schedule: Schedule, seed: int) -> Iterator[list[Example]]:
    """Yield batches of fresh training problems with worked solutions."""
    indices = range(schedule.steps * schedule.batch_size)
    examples = (worked_example(task, index, seed) for index in indices)
    return length_grouped(examples, schedule.batch_size, seed)


def length_grouped(
    examples: Iterable[Example], batch_size: int, seed: int
) -> Iterator[list[Example]]:
    """Yield full batches of similar length, in random order within every `GROUPED_BATCHES`.

    Padding would otherwise be more than a quarter of all positions.
    """
    rng = random.Random(seed)
    source = iter(examples)
    while group := list(islice(source, GROUPED_BATCHES * batch_size)):
        group.sort(key=lambda example: len(example.tokens))
        batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        rng.shuffle(batches)
        yield from batches


def draw_sample_pool(
    teacher: Qwen3ForCausalLM, task: ChainTask, size: int, seed: int
) -> list[Example]:
    """Return the teacher's tempered samples, right or wrong, on the first training problems."""
    generator = torch.Generator().manual_seed(seed)
    pool: list[Example] = []
    started = time.perf_counter()
    while len(pool) < size:
        indices = range(len(pool), min(len(pool) + SAMPLING_BATCH, size))
        problems = [task.problem("train", index) for index in indices]
        prompts = [prompt_tokens(p.text) for p in problems]
        responses = sample(teacher, prompts, generator, WARM_START_TEMPERATURE)
        pool += [sampled_example(p, r) for p, r in zip(problems, responses, strict=True)]
        report("samples", len(pool), size, started)
    return pool


def pool_batches(pool: list[Example], schedule: Schedule, seed: int) -> Iterator[list[Example]]:
    """Yield batches out of a pool, reshuffled after every full pass."""
    rng = random.Random(seed)
    passes = (example for _ in count() for example in rng.sample(pool, len(pool)))
    examples = islice(passes, schedule.steps * schedule.batch_size)
    return length_grouped(examples, schedule.batch_size, seed)


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right to two int64 tensors [batch, time] of inputs and next-token targets."""
    width = max(len(example.tokens) for example in examples) - 1
    inputs = torch.full((len(examples), width), PAD_ID)
    targets = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.tokens) - 1
        inputs[row, :length] = torch.tensor(example.tokens[:-1])
        targets[row, :length] = torch.tensor(example.targets[1:])
    return inputs, targets


# Sampling and evaluation


@torch.inference_mode()
def sample(
    model: Qwen3ForCausalLM,
    prompts: list[list[int]],
    generator: torch.Generator,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Sample one response per prompt, each ending in `END_ID` or cut off."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[PAD_ID] * (width - len(p)) + p for p in prompts])
    mask = (tokens != PAD_ID).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    columns: list[torch.Tensor] = []
    while len(columns) < MAX_NEW_TOKENS and not done.all():
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        drawn = draw(logits / temperature, generator).masked_fill(done, PAD_ID)
        columns.append(drawn)
        done = done | (drawn == END_ID)
        tokens = drawn[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    rows = torch.stack(columns, dim=1).tolist()
    return [[token for token in row if token != PAD_ID] for row in rows]


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one token per row of [batch, vocabulary] by inverting the cumulative distribution."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
    # Scaling by the last entry keeps rounding from pushing a draw past the vocabulary.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)


def evaluate(
    model: Qwen3ForCausalLM, task: ChainTask, *, problems: int, seed: int, batch_size: int = 500
) -> dict[str, float]:
    """Return exact-match accuracy and response statistics on held-out problems at temperature 1."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    correct, repaired, lengths = 0, 0, 0
    for start in range(0, problems, batch_size):
        batch = [task.problem("eval", i) for i in range(start, min(start + batch_size, problems))]
        responses = sample(model, [prompt_tokens(p.text) for p in batch], generator)
        for problem, response in zip(batch, responses, strict=True):
            text = response_text(response)
            right = task.check(problem, text)
            correct += right
            repaired += right and "!" in text
            lengths += len(response)
    model.train(was_training)
    return {
        "accuracy": correct / problems,
        "correct_after_repair": repaired / problems,
        "mean_response_tokens": lengths / problems,
    }


def response_text(response: list[int]) -> str:
    """Return a finished response's text; a special token before the end stays visible."""
    body = response[:-1] if response and response[-1] == END_ID else [*response, PAD_ID]
    return "".join(chr(t) if t < 256 else "\N{REPLACEMENT CHARACTER}" for t in body)


# Training


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate used at a step."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: Qwen3ForCausalLM,
    batches: Iterator[list[Example]],
    schedule: Schedule,
    name: str,
) -> None:
    """Minimise the next-token cross entropy over the targets of each batch."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.learning_rate,
        betas=(0.9, schedule.beta2),
        weight_decay=schedule.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, schedule)
    )
    model.train()
    started = time.perf_counter()
    for step, examples in enumerate(batches, start=1):
        inputs, targets = collate(examples)
        # Padding is on the right, so causal attention alone keeps it out of every loss position.
        logits = model(input_ids=inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == schedule.steps:
            report(name, step, schedule.steps, started, f"  loss {float(loss.detach()):.4f}")
    model.eval()


def report(name: str, done: int, total: int, started: float, extra: str = "") -> None:
    """Print progress with the rate since `started` and the estimated time left."""
    rate = done / (time.perf_counter() - started)
    left = (total - done) / rate
    print(f"{name}: {done}/{total}  {rate:.2f}/s  ETA {left:.0f} s{extra}", flush=True)


# Stages


def make_teacher(directory: Path, task: ChainTask, seed: int) -> None:
    """Train the teacher on worked solutions, with repaired errors, and save it."""
    torch.manual_seed(seed)
    model = build_model(TEACHER_SHAPE)
    train(model, worked_batches(task, TEACHER_SCHEDULE, seed), TEACHER_SCHEDULE, "teacher steps")
    save_model(model, directory)


def make_student(directory: Path, teacher_directory: Path, task: ChainTask, seed: int) -> None:
    """Train the student on the teacher's tempered samples and save it."""
    pool = draw_sample_pool(load_model(teacher_directory), task, SAMPLE_POOL_SIZE, seed)
    torch.manual_seed(seed + 1)
    model = build_model(STUDENT_SHAPE)
    batches = pool_batches(pool, STUDENT_SCHEDULE, seed)
    train(model, batches, STUDENT_SCHEDULE, "student steps")
    save_model(model, directory)


def evaluate_pair(output: Path, task: ChainTask, seed: int, problems: int) -> dict[str, Any]:
    """Evaluate both saved models and write metrics.json next to them."""
    metrics: dict[str, Any] = {
        "seed": seed,
        "temperature": 1.0,
        "warm_start_temperature": WARM_START_TEMPERATURE,
        "eval_problems": problems,
        "task": asdict(task),
    }
    for name, schedule in (("teacher", TEACHER_SCHEDULE), ("student", STUDENT_SCHEDULE)):
        model = load_model(output / name)
        metrics[name] = {
            **evaluate(model, task, problems=problems, seed=seed),
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": (output / name / "model.safetensors").stat().st_size,
            "schedule": asdict(schedule),
        }
        print(f"{name}: {metrics[name]}", flush=True)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("models/lab"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="part of what fixes the result")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--eval-problems", type=int, default=2000)
    return parser.parse_args()


def main() -> None:
    """Run the chosen stages in order."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    task = ChainTask()
    teacher, student = arguments.output / "teacher", arguments.output / "student"
    if "tokenizer" in arguments.stages:
        for directory in (teacher, student):
            write_tokenizer(directory)
    if "teacher" in arguments.stages:
        make_teacher(teacher, task, arguments.seed)
    if "student" in arguments.stages:
        make_student(student, teacher, task, arguments.seed)
    if "evaluate" in arguments.stages:
        for directory in (teacher, student):
            check_tokenizer(directory)
        evaluate_pair(arguments.output, task, arguments.seed, arguments.eval_problems)


if __name__ == "__main__":
    main()
