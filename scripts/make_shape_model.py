"""Writes a random Qwen3 of a real model's shape, to measure speed and memory without its weights.

    python scripts/make_shape_model.py --shape 4B models/random-4B --device cuda
    python scripts/make_shape_model.py --shape 32B models/random-32B-FP8 --fp8 --device cuda

It samples noise and hardly ever stops by itself. All shapes share one tokenizer (bytes; every id of
the vocabulary has a text) and one chat template, so any two of them pass for student and teacher.
Weights are drawn and written layer by layer: memory for one layer and the embedding is enough.

Its distributions are nearly uniform, as those of a model whose weights were never read. With
``--logit-scale 2.5`` they are not: the final norm multiplies all logits. With a small
``--branch-scale`` the layers add less to the embedding, so that rounding adds up to less, as in a
trained model.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from qwen3_distill.modeling.shapes import QWEN3_SHAPES, ModelShape

STANDARD_DEVIATION = 0.02
FP8_BLOCK = 128
FP8_MAX = 448.0
SHARD_BYTES = 4 * 2**30
PAD_ID, EOS_ID = 151643, 151645
SPECIAL = {"<|endoftext|>": PAD_ID, "<|im_start|>": 151644, "<|im_end|>": EOS_ID}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
"""Takes the template argument that the shipped configs pass (`enable_thinking`)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=QWEN3_SHAPES, required=True)
    parser.add_argument("--fp8", action="store_true", help="blocks of 128 x 128 with a scale each")
    parser.add_argument("--device", default="cpu", help="where numbers are drawn, e.g. cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logit-scale", type=float, default=1.0, help="of all logits")
    parser.add_argument("--branch-scale", type=float, default=1.0, help="of what a layer adds")
    arguments = parser.parse_args()
    try:
        write_model(
            arguments.out,
            QWEN3_SHAPES[arguments.shape],
            fp8=arguments.fp8,
            device=torch.device(arguments.device),
            seed=arguments.seed,
            scales=Scales(logits=arguments.logit_scale, branches=arguments.branch_scale),
        )
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    print(arguments.out)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Factors of weights that are drawn alike otherwise."""

    logits: float = 1.0
    branches: float = 1.0


def write_model(
    out: Path,
    shape: ModelShape,
    *,
    fp8: bool,
    device: torch.device,
    seed: int,
    scales: Scales = Scales(),
) -> None:
    """Write config, tokenizer and weights in Hugging Face layout; the directory appears when whole.

    Raises:
        FileExistsError: ``out`` is there, and not empty.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is there; remove it, or choose another directory")
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_config(unfinished, shape, fp8=fp8)
    make_tokenizer(shape.vocab_size).save_pretrained(unfinished)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        write_shards(unfinished, weights(shape, generator, fp8=fp8, scales=scales))
    unfinished.rename(out)


def write_config(out: Path, shape: ModelShape, *, fp8: bool) -> None:
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-6,
        bos_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    values = json.loads(config.to_json_string(use_diff=False))
    # The key that engines before transformers 5 read.
    values["rope_theta"] = 1_000_000.0
    values["torch_dtype"] = "bfloat16"
    if fp8:
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    GenerationConfig(
        bos_token_id=PAD_ID, eos_token_id=[EOS_ID, PAD_ID], pad_token_id=PAD_ID
    ).save_pretrained(out)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per byte. The other ids have texts too, but no text is encoded to them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    named = {index: token for token, index in SPECIAL.items()}
    for index in range(len(letters), vocab_size):
        vocab[named.get(index, f"t{index}")] = index
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def weights(
    shape: ModelShape,
    generator: torch.Generator,
    *,
    fp8: bool,
    scales: Scales = Scales(),
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint."""

    def matrix(rows: int, columns: int) -> Tensor:
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16, device=generator.device)
        return drawn.normal_(std=STANDARD_DEVIATION, generator=generator)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", matrix(shape.vocab_size, shape.hidden_size)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", ones(shape.hidden_size)
        yield f"{prefix}.post_attention_layernorm.weight", ones(shape.hidden_size)
        yield f"{prefix}.self_attn.q_norm.weight", ones(shape.head_dim)
        yield f"{prefix}.self_attn.k_norm.weight", ones(shape.head_dim)
        for name, (rows, columns) in shape.linear_layers.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            full_name = f"{prefix}.{block}.{name}.weight"
            drawn = matrix(rows, columns)
            if name in ("o_proj", "down_proj"):
                drawn *= scales.branches
            if not fp8:
                yield full_name, drawn
                continue
            quantized, scale = quantize(drawn)
            yield full_name, quantized
            yield f"{full_name}_scale_inv", scale
    yield "model.norm.weight", ones(shape.hidden_size) * scales.logits
    if not shape.tied:
        yield "lm_head.weight", matrix(shape.vocab_size, shape.hidden_size)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values, and the scale of each block of 128 x 128 by which they are multiplied."""
    rows, columns = weight.shape
    down, across = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = torch.zeros(down * FP8_BLOCK, across * FP8_BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, FP8_BLOCK, across, FP8_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_MAX
    scaled = (blocks / scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scale


def write_shards(out: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write files of some gigabytes, and the index of the tensors in them."""
    where: dict[str, str] = {}
    total, pending, pending_bytes = 0, {}, 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(pending, out / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(pending, file))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > SHARD_BYTES:
            flush()
        pending[name] = tensor.cpu()
        pending_bytes += size
        total += size
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    file = out / "model.safetensors.index.json"
    file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
