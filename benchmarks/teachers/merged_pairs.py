"""A lab teacher with another tokenizer: it merges pairs, names its special tokens otherwise and has
a chat template of its own.

A number of two digits, and an operator with the digit after it, are one token each. Special tokens
come first in the vocabulary, so no id means the same as in the lab student's.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.evidence.training import IGNORED, Schedule, train
from qwen3_distill.data.tasks import TASKS
from qwen3_distill.scoring.token_bytes import byte_of_letter

SPECIAL = ("<|bos|>", "<|turn|>", "<|stop|>", "<|reply|>")
TEMPLATE = (
    "<|bos|>{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<|turn|>' + message['content'] -}}"
    "{%- else -%}{{- '<|reply|>' + message['content'] -}}{%- endif -%}{{- '<|stop|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|reply|>' -}}{%- endif -%}"
)
MERGES = tuple((a, b) for a in "1+-*" for b in "0123456789")
SEED = 0
ROWS = 64
_Batch: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]


def build_tokenizer() -> Tokenizer:
    """Return the byte-level tokenizer with the merges."""
    vocab = {name: index for index, name in enumerate(SPECIAL)}
    for letter in (*sorted(byte_of_letter()), *("".join(pair) for pair in MERGES)):
        vocab.setdefault(letter, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[*MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def _batches(tokenizer: Tokenizer, steps: int) -> Iterator[_Batch]:
    """Yield [B, T] inputs and targets of worked solutions, in the teacher's own tokens."""
    task = TASKS["chain"]
    bos, turn, stop, reply = range(len(SPECIAL))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for step in range(steps):
        rows: list[tuple[list[int], list[int]]] = []
        for index in range(step * ROWS, (step + 1) * ROWS):
            problem = task.problem("train", index)
            tokens = [bos, turn, *ids(problem.text), stop, reply]
            targets = [IGNORED] * len(tokens)
            rng = random.Random(f"errors/{SEED}/{index}")
            segments = task.solution_segments(problem, rng)
            for segment in segments:
                part = ids(segment.text)
                tokens += part
                targets += [IGNORED] * len(part) if segment.is_error else part
            rows.append(([*tokens, stop], [*targets, stop]))
        width = max(len(tokens) for tokens, _ in rows) - 1
        inputs = np.full((ROWS, width), bos, dtype=np.int64)
        wanted = np.full((ROWS, width), IGNORED, dtype=np.int64)
        for row, (tokens, targets) in enumerate(rows):
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            wanted[row, : len(targets) - 1] = targets[1:]
        yield inputs, wanted


def make_teacher(directory: Path, steps: int) -> None:
    """Train the teacher on worked solutions and save it; a finished one is left as it is."""
    done = directory / "trained.json"
    if done.is_file() and json.loads(done.read_text())["steps"] == steps:
        return
    tokenizer = build_tokenizer()
    end = SPECIAL.index("<|stop|>")
    torch.manual_seed(SEED)
    model: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            initializer_range=0.06,
            max_position_embeddings=1024,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=end,
            bos_token_id=None,
        )
    )
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    schedule = Schedule(steps=steps, learning_rate=2e-3, warmup_steps=50)
    train(model, _batches(tokenizer, steps), schedule, "teacher")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0, eos_token_id=end
    )
    model.cpu().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "eos_token": "<|stop|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    done.write_text(json.dumps({"steps": steps}) + "\n")
