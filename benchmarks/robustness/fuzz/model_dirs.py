"""Kind ``model_dirs``: model directories with a damaged, hostile or foreign file, read and loaded.

A directory whose config, tokenizer or weights were changed may be read only as what it then says;
templates may not run for long, take much memory or raise.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness.fuzz.counts import Counts, Progress
from benchmarks.robustness.fuzz.odd_values import mutated_bytes, mutated_json, odd_value
from benchmarks.robustness.fuzz.watch import over_time, raised
from qwen3_distill.data.prompt_view import end_of_turn, without_effect
from qwen3_distill.data.prompts import check_roles, render
from qwen3_distill.data.sources import Message, RawPrompt
from qwen3_distill.data.template_arguments import arguments_read
from qwen3_distill.errors import DistillError
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.modeling.known_answer import known_answer
from qwen3_distill.modeling.loading import load_identity, load_model, load_tokenizer
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.modeling.student_directory import check_student
from tests.tiny_models import write_model

_LIMIT_S = 120.0
"""Above the limits on a template's first rendering and on every other."""
_TEMPLATES = (
    "{{ 1 / 0 }}",
    "{{ 1 // 0 }}{{ messages }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'x' * 10 ** 11 }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "{{ messages[99].content }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ undefined_thing.attribute }}",
    "{% if %}",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('\x1b[31m no') }}",
    "{{ messages | tojson | int }}",
    "{{ ''.format(**messages) }}",
    "",
    "{{ '%99999999999d' % 1 }}",
)
_QUANTIZED: tuple[Any, ...] = (
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": ["fp8"]},
    {},
    "awq",
    [],
    7,
)


def run(seed: int, count: int) -> Counts:
    """Try ``count`` directories."""
    counts, progress, rng = Counts(), Progress("model_dirs", count), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        whole = write_model(Path(name) / "whole", seed=0)
        damages = list(_DAMAGES)
        for number in range(count):
            directory = Path(name) / "model"
            shutil.copytree(whole, directory)
            damage = damages[number % len(damages)]
            what = _DAMAGES[damage](rng, directory)
            _try(directory, f"{damage}: {what}", counts)
            shutil.rmtree(directory)
            progress.show(counts)
    return counts


def _try(directory: Path, example: str, counts: Counts) -> None:
    counts.tried += 1
    readers: tuple[Callable[[Path], object], ...] = (
        read_shape,
        check_student,
        load_identity,
        directory_digest,
        known_answer,
        lambda path: load_model(path, device=torch.device("cpu"), dtype=torch.float32),
        _render,
    )
    for reader in readers:
        try:
            with over_time(_LIMIT_S):
                reader(directory)
        except TimeoutError:
            counts.hang(example)
        except DistillError as error:
            if len(str(error)) > 4_000:
                counts.mistake(f"a message of {len(str(error))} characters: {example}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            counts.traceback(f"{raised(error)}: {example}")


def _render(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    raw = RawPrompt(prompt_id="p", messages=(Message(role="user", content="Hello"),))
    render(raw, tokenizer, 256, 16)
    check_roles(raw, tokenizer)
    end_of_turn(tokenizer, {})
    without_effect(tokenizer, [{"role": "user", "content": "Hello"}], {"enable_thinking": False})
    arguments_read(str(tokenizer.chat_template))


def _changed_json(name: str) -> Callable[[random.Random, Path], str]:
    def damage(rng: random.Random, directory: Path) -> str:
        file = directory / name
        content = json.loads(file.read_bytes()) if file.exists() else {"eos_token_id": 1}
        new = mutated_json(rng, content)
        file.write_text(json.dumps(new))
        return f"{name} {json.dumps(new)[:200]}"

    return damage


def _changed_bytes(name: str) -> Callable[[random.Random, Path], str]:
    def damage(rng: random.Random, directory: Path) -> str:
        file = directory / name
        new = mutated_bytes(rng, file.read_bytes() if file.exists() else b"{}")
        file.write_bytes(new)
        return f"{name} {new[:80]!r}"

    return damage


def _template(rng: random.Random, directory: Path) -> str:
    template = rng.choice(_TEMPLATES)
    (directory / "chat_template.jinja").write_text(template)
    return template[:100]


def _set(rng: random.Random, directory: Path, name: str, values: dict[str, Any]) -> str:
    file = directory / name
    content = json.loads(file.read_bytes()) if file.exists() else {}
    file.write_text(json.dumps(content | values))
    return json.dumps(values)[:200]


def _quantized(rng: random.Random, directory: Path) -> str:
    return _set(rng, directory, "config.json", {"quantization_config": rng.choice(_QUANTIZED)})


def _attention(rng: random.Random, directory: Path) -> str:
    key = rng.choice(["attn_implementation", "_attn_implementation"])
    value = rng.choice(["kernels-community/flash-attn", "flash_attention_2", "no", 7, ["sdpa"]])
    return _set(rng, directory, "config.json", {key: value})


def _sizes(rng: random.Random, directory: Path) -> str:
    key = rng.choice(["vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "rope_theta"])
    return _set(rng, directory, "config.json", {key: odd_value(rng)})


def _eos(rng: random.Random, directory: Path) -> str:
    file = rng.choice(["generation_config.json", "config.json"])
    value = rng.choice([[], [[]], None, -1, 10**9, True, "1", 1.0, [1, None], odd_value(rng)])
    return _set(rng, directory, file, {"eos_token_id": value})


def _index(rng: random.Random, directory: Path) -> str:
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    name = rng.choice(
        ["../whole/model.safetensors", "gone.safetensors", "", 7, None, "/etc/passwd"]
    )
    index: Any = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    if rng.random() < 0.4:
        index = mutated_json(rng, index)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return json.dumps(index)[:200]


_DAMAGES: dict[str, Callable[[random.Random, Path], str]] = {
    "config": _changed_json("config.json"),
    "sizes": _sizes,
    "template": _template,
    "eos": _eos,
    "index": _index,
    "quantized": _quantized,
    "attention": _attention,
    "generation config": _changed_json("generation_config.json"),
    "tokenizer": _changed_json("tokenizer.json"),
    "tokenizer config": _changed_json("tokenizer_config.json"),
    "config bytes": _changed_bytes("config.json"),
    "tokenizer bytes": _changed_bytes("tokenizer.json"),
    "weights": _changed_bytes("model.safetensors"),
}
