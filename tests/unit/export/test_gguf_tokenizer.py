"""GGUF expresses a tokenizer, or the reason is given why it cannot."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen3_distill.errors import ModelError
from qwen3_distill.export.gguf_tokenizer import GgufTokenizer, TokenType, gguf_tokenizer
from qwen3_distill.modeling.loading import load_tokenizer
from tests.tiny_models import EOS_ID, byte_tokenizer
from tests.unit.export.bpe_models import PLAIN, SPECIAL, VOCAB_SIZE, qwen_like_tokenizer


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def _express(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> GgufTokenizer:
    end: Any = tokenizer.eos_token_id
    return gguf_tokenizer(tokenizer, **{"vocab_size": VOCAB_SIZE, "eos_ids": {end}, **settings})


def test_a_qwen_like_tokenizer_has_merges_types_and_padding() -> None:
    tokenizer = qwen_like_tokenizer()
    found = _express(tokenizer)
    assert (found.pre, len(found.tokens), len(found.types)) == ("qwen2", VOCAB_SIZE, VOCAB_SIZE)
    assert found.merges
    for merge in found.merges:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= set(found.tokens)
    by_token = dict(zip(found.tokens, found.types, strict=True))
    assert {by_token[token] for token in SPECIAL} == {TokenType.CONTROL}
    assert {by_token[token] for token in PLAIN} == {TokenType.USER_DEFINED}
    assert by_token["a"] == TokenType.NORMAL
    used = len(tokenizer)
    assert found.tokens[used:] == [f"[PAD{index}]" for index in range(used, VOCAB_SIZE)]
    assert set(found.types[used:]) == {TokenType.UNUSED}
    assert [_id(tokenizer, token) for token in found.tokens[:used]] == list(range(used))


def test_a_vocabulary_of_bytes_needs_no_merges_and_may_be_split_in_any_way() -> None:
    found = _express(byte_tokenizer(), eos_ids={EOS_ID})
    assert (found.merges, found.eos_id, found.eot_id, found.eom_id) == ([], EOS_ID, EOS_ID, None)
    assert found.chat_template == byte_tokenizer().chat_template


def test_the_lab_pairs_tokenizer_is_one_of_those() -> None:
    found = gguf_tokenizer(load_tokenizer("models/lab/student"), vocab_size=264, eos_ids={257})
    assert (len(found.tokens), found.merges, found.eos_id, found.pad_id) == (264, [], 257, 256)


def test_every_end_of_a_response_has_a_key() -> None:
    tokenizer = qwen_like_tokenizer()
    text_end, turn_end, user = (_id(tokenizer, token) for token in SPECIAL[:3])
    both = _express(tokenizer, eos_ids={text_end, turn_end})
    assert (both.eos_id, both.eot_id, both.eom_id) == (turn_end, turn_end, text_end)
    tokenizer.eos_token = SPECIAL[0]  # a base model's: text ends so, turns do not
    base = _express(tokenizer, eos_ids={text_end, turn_end})
    assert (base.eos_id, base.eot_id, base.eom_id) == (text_end, turn_end, None)
    elsewhere = _express(tokenizer, eos_ids={turn_end})
    assert (elsewhere.eos_id, elsewhere.eot_id) == (turn_end, turn_end)
    with pytest.raises(ModelError, match="more tokens end a response"):
        _express(tokenizer, eos_ids={text_end, turn_end, user, user + 1})


def test_of_several_templates_the_default_is_taken_and_none_is_fine() -> None:
    tokenizer = qwen_like_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tool_use": "x"}
    assert _express(tokenizer).chat_template == template
    tokenizer.chat_template = None
    assert _express(tokenizer).chat_template is None


def _with(change: Callable[[dict[str, Any]], Any]) -> PreTrainedTokenizerFast:
    description = json.loads(qwen_like_tokenizer().backend_tokenizer.to_str())
    change(description)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token=SPECIAL[1]
    )


def _part(part: Any) -> Any:
    """A component of ``tokenizers`` as its JSON."""
    backend = Tokenizer(models.BPE())
    name = "normalizer" if isinstance(part, normalizers.Normalizer) else "pre_tokenizer"
    setattr(backend, name, part)
    return json.loads(backend.to_str())[name]


_BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": SPECIAL[0], "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {SPECIAL[0]: {"id": SPECIAL[0], "ids": [320], "tokens": [SPECIAL[0]]}},
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(normalizer=_part(normalizers.Lowercase())), "normalizer"),
        (lambda d: d.update(normalizer=_part(normalizers.NFKC())), "normalizer"),
        (lambda d: d.update(pre_tokenizer=_part(pre_tokenizers.ByteLevel())), "splits text by"),
        (lambda d: d.update(pre_tokenizer=None), "splits text by"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"].pop(0), "splits text by"),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{N}{1,3}"),
            "splits text by",
        ),
        (lambda d: d.update(post_processor=_BOS), "may add tokens"),
        (lambda d: d["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda d: d["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda d: d["model"].update(dropout=0.5), "dropout"),
        (lambda d: d["model"]["vocab"].pop("Ā"), "1 of the 256 bytes"),
        (lambda d: d["added_tokens"][-1].update(lstrip=True), "lstrip"),
        (lambda d: d["added_tokens"][-1].update(single_word=True), "single_word"),
    ],
)
def test_what_gguf_cannot_express_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        _express(_with(change))
    assert "--to hf" in str(caught.value)


@pytest.mark.parametrize(
    "model", [models.WordLevel({"a": 0}, unk_token="a"), models.Unigram([("a", 0.0)])]
)
def test_other_models_than_bpe_are_refused(model: models.Model) -> None:
    backend = Tokenizer(model)
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[1])
    with pytest.raises(ModelError, match=type(model).__name__):
        _express(tokenizer)


def test_more_tokens_than_the_model_has_rows_are_refused() -> None:
    with pytest.raises(ModelError, match="only 300 rows"):
        _express(qwen_like_tokenizer(), vocab_size=300)
