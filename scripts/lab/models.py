"""How the models are initialised, loaded and saved."""

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from lab.settings import Shape
from lab.tokenizer import CONTEXT_LENGTH, END_ID, PAD_ID, VOCAB_SIZE


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
