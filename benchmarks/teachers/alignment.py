"""Measures the host time of lining a step's answers up with a teacher of another tokenizer.

    python -m benchmarks.teachers.alignment

Two byte-level tokenizers are trained on this repository's text, with vocabularies and splitting
rules of their own. The answers are pieces of that text in the student's tokens, as many and as long
as those of a step. No model and no GPU is used: what is timed is what `scoring.tokenizer: own` adds
to a step, before scoring (the teacher's prompt and tokens) and after it (a score for every span).

Figures: ``alignment_ms_per_step``; ``alignment_percent_of_step``, of a step of one stage after
another on an H200 with as many new tokens (``opd_sequential_tok_s`` of h200_stages.json), or of
``--step-s`` seconds; ``alignment_tokens_per_span``; ``alignment_unaligned_percent``, of the tokens.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from benchmarks.lib.common import RESULTS, Report
from benchmarks.teachers.merged_pairs import SPECIAL, TEMPLATE
from qwen3_distill.scoring.aligned_view import own_tokenizer_view
from qwen3_distill.scoring.views import TeacherView
from qwen3_distill.types import (
    AlignedRollout,
    FinishReason,
    Prompt,
    Rollout,
    SamplingSpec,
    ScoringJob,
    TeacherScore,
    VersionSpan,
    WeightVersion,
)
from scripts.make_shape_model import CHAT_TEMPLATE

ROOT = Path(__file__).parents[2]
STUDENT_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = {"student": 16_384, "teacher": 12_288}


def repository_text() -> list[str]:
    """Return the repository's documentation and source, file by file."""
    files = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("src/**/*.py"))]
    return [file.read_text(encoding="utf-8") for file in files]


def make_model(
    folder: Path, texts: Sequence[str], *, vocabulary: int, special: Sequence[str], end: str
) -> Tokenizer:
    """Train a tokenizer and write it as a model directory without weights."""
    tokenizer = Tokenizer(models.BPE())
    one_digit = end != "<|im_end|>"  # the teacher's: digits are never merged
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")] if one_digit else []),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        chat_template=TEMPLATE if one_digit else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=tokenizer.token_to_id(end),
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    return tokenizer


def answers(
    tokenizer: Tokenizer, texts: Sequence[str], count: int, tokens: int, seed: int
) -> list[Rollout]:
    """Cut answers of a length out of the text; half of them end their turn."""
    ids = np.array(tokenizer.encode("\n".join(texts), add_special_tokens=False).ids)
    rng = np.random.default_rng(seed)
    version = WeightVersion(step=0, digest="text")
    found: list[Rollout] = []
    for number in range(count):
        start = int(rng.integers(0, ids.size - tokens))
        response = ids[start : start + tokens].astype(np.int32)
        ends = number % 2 == 0
        if ends:
            response[-1] = STUDENT_SPECIAL.index("<|im_end|>")
        question = tokenizer.decode(ids[start : start + 64].tolist())
        prompt = Prompt(
            prompt_id=f"{seed}:{number}",
            token_ids=np.array(tokenizer.encode(question).ids),
            messages=(("user", question),),
        )
        found.append(
            Rollout(
                rollout_id=f"{seed}:{number}",
                prompt=prompt,
                sampling=SamplingSpec(
                    temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=tokens, seed=number
                ),
                response_ids=response,
                behavior_logprobs=np.full(tokens, -1.0),
                versions=(VersionSpan(start=0, stop=tokens, version=version),),
                finish_reason=FinishReason.STOP if ends else FinishReason.LENGTH,
            )
        )
    return found


def aligned(view: TeacherView, rollouts: Sequence[Rollout]) -> tuple[float, list[AlignedRollout]]:
    """Return the seconds of the view's work for a step, and the scored rollouts."""
    began = time.perf_counter()
    jobs = view.jobs(rollouts)
    spent = time.perf_counter() - began
    scores: list[TeacherScore] = []
    for job in jobs:
        assert isinstance(job, ScoringJob), job
        size = sum(span.stop - span.start for span in job.scored)
        scores.append(TeacherScore(teacher_id="none", logprobs=np.full(size, -1.0)))
    began = time.perf_counter()
    found = [view.scored(*pair) for pair in zip(rollouts, scores, strict=True)]
    spent += time.perf_counter() - began
    return spent, [one for one in found if isinstance(one, AlignedRollout)]


def step_of_an_h200(new_tokens: int) -> float:
    """Return the seconds of a sequential step with as many new tokens, as measured on an H200."""
    figures = json.loads((RESULTS / "h200_stages.json").read_text())["figures"]
    return new_tokens / figures["opd_sequential_tok_s"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=256, help="answers of a step")
    parser.add_argument("--new-tokens", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=6, help="the first one is a warm-up")
    parser.add_argument("--step-s", type=float, help="seconds of a step; default: see above")
    parser.add_argument("--name", default="h200_teachers", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    texts = repository_text()
    sizes = VOCABULARY
    with tempfile.TemporaryDirectory() as text:
        student, teacher = Path(text, "student"), Path(text, "teacher")
        tokenizer = make_model(
            student, texts, vocabulary=sizes["student"], special=STUDENT_SPECIAL, end="<|im_end|>"
        )
        make_model(teacher, texts, vocabulary=sizes["teacher"], special=SPECIAL, end="<|stop|>")
        view = own_tokenizer_view(student, teacher, special_tokens={}, template_arguments={})
    count, tokens = arguments.sequences, arguments.new_tokens
    spent: list[float] = []
    spans = in_spans = 0
    for step in range(arguments.steps):
        seconds, scored = aligned(view, answers(tokenizer, texts, count, tokens, step))
        spent.append(seconds)
        spans += sum(one.score.span_tokens.size for one in scored)
        in_spans += sum(int(one.score.span_tokens.sum()) for one in scored)
    step_s = arguments.step_s or step_of_an_h200(count * tokens)
    Report(arguments.name, arguments.results).add(
        "alignment",
        {
            "alignment_ms_per_step": 1000 * fmean(spent[1:]),
            "alignment_percent_of_step": 100 * fmean(spent[1:]) / step_s,
            "alignment_tokens_per_span": in_spans / spans,
            "alignment_unaligned_percent": 100 - 100 * in_spans / (len(spent) * count * tokens),
        },
        sequences=count,
        new_tokens=tokens,
        step_s=step_s,
        seconds=spent[1:],
        vocabularies=sizes,
    )


if __name__ == "__main__":
    main()
