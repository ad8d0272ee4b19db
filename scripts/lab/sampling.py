"""Sampling from the models, and their accuracy."""

import torch
from transformers import DynamicCache, Qwen3ForCausalLM

from lab.settings import MAX_NEW_TOKENS
from lab.tokenizer import END_ID, PAD_ID, prompt_tokens, response_text
from qwen3_distill.data.chain_task import ChainTask


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
    model: Qwen3ForCausalLM,
    task: ChainTask,
    *,
    problems: int,
    seed: int,
    batch_size: int = 500,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Return exact-match accuracy and response statistics on held-out problems."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    correct, repaired, lengths = 0, 0, 0
    for start in range(0, problems, batch_size):
        batch = [task.problem("eval", i) for i in range(start, min(start + batch_size, problems))]
        responses = sample(model, [prompt_tokens(p.text) for p in batch], generator, temperature)
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
