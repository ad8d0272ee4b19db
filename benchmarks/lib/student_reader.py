"""Reads model directories with this interpreter's transformers, and with nothing of this project.

    PYTHON benchmarks/lib/student_reader.py OUT.safetensors TEXT DIRECTORY [DIRECTORY ...]

Writes the logits [T, V] of each directory, on the text's own token ids, under the directory's
number. Prints a JSON object: the version of transformers, and for each directory what was read.
"""

import json
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    out, text, *directories = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    logits: dict[str, torch.Tensor] = {}
    read: list[dict[str, Any]] = []
    for number, directory in enumerate(directories):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text)["input_ids"]
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        model, info = loaded
        with torch.no_grad():
            logits[str(number)] = model.eval()(torch.tensor([ids])).logits[0].float().contiguous()
        chat = [{"role": "user", "content": text}]
        read.append(
            {
                "ids": ids,
                "chat": tokenizer.apply_chat_template(chat, tokenize=False),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "rope_theta": _rope_theta(AutoConfig.from_pretrained(directory)),
                "eos_token_id": GenerationConfig.from_pretrained(directory).eos_token_id,
                "missing": sorted(info["missing_keys"]),
            }
        )
    save_file(logits, out)
    print(json.dumps({"transformers": transformers.__version__, "read": read}))


def _rope_theta(config: Any) -> float:
    """The name by which this generation of transformers computes."""
    is_old = transformers.__version__.startswith("4.")
    return config.rope_theta if is_old else config.rope_parameters["rope_theta"]


if __name__ == "__main__":
    main()
