"""The roofline: limits by hand, monotonicity, what bounds a stage."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.config import FullTuning, LoraTuning
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.planning import roofline
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import EFFICIENCY, Rates, peak_rates
from qwen3_distill.planning.roofline import Decoding, Model, Training, decode_step
from qwen3_distill.planning.work import Answers, Rollouts, decode_segments, shared_rows

H200 = peak_rates(named_device("h200"))
STUDENT = Model(shape=named_shape("4B"), itemsize=2)
LORA = LoraTuning(kind="lora")


def rollouts(count: int = 64, new: int = 256, tail: float = 1.0, **changes: int) -> Rollouts:
    answers = Answers(median_tokens=new, tail=tail, max_tokens=4096)
    return Rollouts.of(answers, count=count, prompt_tokens=changes.pop("prompt", 128), **changes)


def faster(rates: Rates, **factors: float) -> Rates:
    return replace(rates, **{key: getattr(rates, key) * value for key, value in factors.items()})


# --- Limits -------------------------------------------------------------------------------------


def test_one_sequence_reads_the_weights_and_many_compute() -> None:
    one = decode_step(STUDENT, H200, Decoding(max_sequences=1), 1)
    least = STUDENT.read_bytes / H200.bandwidth / EFFICIENCY.decode_products
    assert one.parts["weight bandwidth"] == pytest.approx(least, rel=1e-3)
    assert one.bound == "weight bandwidth"
    quick = faster(H200, weight_bandwidth=2)  # as a calibration may find
    half = decode_step(STUDENT, quick, Decoding(max_sequences=1), 1)
    assert half.parts["weight bandwidth"] == pytest.approx(least / 2, rel=1e-3)
    many = decode_step(STUDENT, H200, Decoding(max_sequences=4096), 4096)
    shape = STUDENT.shape
    products = 2 * 4096 * (shape.linear_parameters + shape.vocab_size * shape.hidden_size)
    least = products / H200.bf16_flops / EFFICIENCY.decode_products
    assert many.parts["compute"] + many.parts["weight bandwidth"] == pytest.approx(least, rel=0.01)
    assert many.bound == "compute"


def test_cache_reads_grow_with_their_tokens_and_bind_long_contexts() -> None:
    time = roofline.cache_reads(STUDENT, H200, 1000)
    by_hand = 1000 * 147_456 / (EFFICIENCY.kv_reads * 4.8e12)
    assert time.seconds == pytest.approx(by_hand)
    long = roofline.sampling(STUDENT, H200, Decoding(max_sequences=64), rollouts(new=4000))
    assert long.bound == "KV bandwidth"


def test_scoring_is_the_forward_pass_at_the_fp8_rate() -> None:
    shape = named_shape("8B")
    teacher = Model(shape=shape, itemsize=2, fp8=True)
    work = rollouts(count=8, new=100, prompt=100)
    linear = 2 * shape.linear_parameters * 8 * 200 / (EFFICIENCY.score_fp8 * 1978.9e12)
    seconds = roofline.scoring(teacher, H200, work, chunk_tokens=8192).seconds
    assert linear < seconds < 1.2 * linear
    dear = replace(teacher, float32_head=True)
    in_float32 = roofline.scoring(dear, H200, work, chunk_tokens=8192).seconds
    in_tf32 = roofline.scoring(replace(dear, tf32_head=True), H200, work, chunk_tokens=8192).seconds
    assert seconds < in_tf32 < in_float32


def test_fp8_weights_on_a_device_without_fp8_save_reads_and_no_products() -> None:
    a100 = peak_rates(named_device("a100-sxm"))
    assert a100.fp8_flops is None
    fp8 = replace(STUDENT, fp8=True)
    assert fp8.products(a100) == STUDENT.products(a100)
    decoding = Decoding(max_sequences=1)
    assert (
        decode_step(fp8, a100, decoding, 1).seconds
        < decode_step(STUDENT, a100, decoding, 1).seconds
    )


def micro(lengths: list[int], *, tuning: LoraTuning | FullTuning = LORA, **more: int) -> Training:
    return Training(tuning=tuning, micro_batches=[lengths], **more)  # type: ignore[arg-type]


def train_s(work: Training, rates: Rates = H200) -> float:
    return roofline.training(STUDENT.shape, rates, work, rollouts(count=4, new=512)).seconds


def test_lora_trains_faster_than_all_weights_and_recomputing_costs_a_third() -> None:
    lengths = [640] * 16
    lora, full = train_s(micro(lengths)), train_s(micro(lengths, tuning=FullTuning(kind="full")))
    assert 1.3 < full / lora < 1.6  # three products a weight against two
    recomputed = train_s(micro(lengths, recomputed_layers=36))
    assert 1.35 < recomputed / lora < 1.55


def test_padding_costs_and_packing_saves_it() -> None:
    ragged = [4000, 100, 100, 100]
    padded = train_s(micro(ragged))
    packed = train_s(replace(micro(ragged), packed=True))
    assert padded > 3 * packed


def test_a_shared_prompt_counts_once_in_tokens_and_in_pairs() -> None:
    def attention(pairs: int) -> float:
        operations = 4 * shape.query_size * 3 * shape.num_layers * pairs
        return operations / (0.5 * H200.bf16_flops)

    shape, prompt = STUDENT.shape, 20_000
    own = replace(micro([prompt + 512] * 4), packed=True)
    once, every = replace(own, prompts=[1]), replace(own, prompts=[4])

    def seconds(work: Training) -> float:
        asked = rollouts(count=4, new=512, prompt=prompt)
        return roofline.training(shape, H200, work, asked).seconds

    assert seconds(every) == pytest.approx(seconds(own))
    spared_s = seconds(own) - seconds(once)
    linear_s = 3 * prompt * 2 * 2 * shape.linear_parameters / (EFFICIENCY.train * H200.bf16_flops)
    assert spared_s == pytest.approx(
        linear_s + attention(3 * prompt * (prompt + 1) // 2), rel=0.05
    )  # adapters besides
    slower = seconds(replace(once, own_attention=True))
    assert slower * EFFICIENCY.train_own_attention == pytest.approx(seconds(once))


@given(
    responses=st.lists(st.integers(1, 900), min_size=1, max_size=40),
    samples=st.integers(1, 5),
    max_tokens=st.integers(50, 3000),
)
@settings(max_examples=60, deadline=None)
def test_rows_with_shared_prompts_hold_every_answer_and_keep_to_their_size(
    responses: list[int], samples: int, max_tokens: int
) -> None:
    prompt = 100
    rows = shared_rows(responses, prompt, samples, max_tokens)
    assert sorted(tokens for row, _ in rows for tokens in row) == sorted(responses)
    for row, prompts in rows:
        assert sum(row) + prompts * prompt <= max_tokens or (len(row) == 1 and prompts == 1)
    groups = -(-len(responses) // samples)
    assert groups <= sum(prompts for _, prompts in rows) <= len(responses)
    if max_tokens >= prompt + samples * 900:  # no group has to be cut
        assert sum(prompts for _, prompts in rows) == groups


def test_tiny_micro_batches_wait_for_the_host() -> None:
    work = Training(tuning=LORA, micro_batches=[[16]] * 8)
    time = roofline.training(STUDENT.shape, H200, work, rollouts(count=8, new=8, prompt=8))
    assert time.bound == "launches"
    floor = 8 * 36 * 90 * H200.launch_s
    assert time.seconds == pytest.approx(floor, rel=0.01)


def test_publishing_an_adapter_does_not_depend_on_the_model() -> None:
    sizes = (10**9, 10**11)
    small, large = (roofline.publishing(size, H200, adapter=True).seconds for size in sizes)
    assert small == large
    small, large = (roofline.publishing(size, H200, adapter=False).seconds for size in sizes)
    assert large == pytest.approx(100 * small)


# --- Monotonicity -------------------------------------------------------------------------------

SMALL = st.integers(1, 200)


@given(batch=st.integers(1, 2000), more=st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_larger_batches_take_longer_a_step_and_less_a_token(batch: int, more: int) -> None:
    small, large = (
        decode_step(STUDENT, H200, Decoding(max_sequences=n), n).seconds
        for n in (batch, batch + more)
    )
    assert small < large
    assert large / (batch + more) < small / batch


@given(
    key=st.sampled_from(["bf16_flops", "bandwidth", "weight_bandwidth", "fp8_flops"]),
    factor=st.floats(1.1, 5),
    tail=st.sampled_from([1.0, 4.0]),
)
@settings(max_examples=20, deadline=None)
def test_a_faster_device_is_never_slower(key: str, factor: float, tail: float) -> None:
    work, better = rollouts(count=24, new=64, tail=tail), faster(H200, **{key: factor})
    teacher = Model(shape=named_shape("8B"), itemsize=2, fp8=True)
    training = micro([192, 128, 100])
    for rates, other in ((H200, better),):
        for predict in (
            lambda r: roofline.sampling(STUDENT, r, Decoding(max_sequences=8), work).seconds,
            lambda r: roofline.steady_sampling(STUDENT, r, Decoding(max_sequences=8), work).seconds,
            lambda r: roofline.scoring(teacher, r, work, chunk_tokens=512).seconds,
            lambda r: roofline.training(STUDENT.shape, r, training, work).seconds,
        ):
            assert predict(other) <= predict(rates) * (1 + 1e-9)


@given(count=st.integers(1, 60), width=st.integers(1, 80), tail=st.floats(1, 8))
@settings(max_examples=30, deadline=None)
def test_decode_steps_sample_every_token_once(count: int, width: int, tail: float) -> None:
    work = rollouts(count=count, new=20, tail=tail, prompt=7)
    segments = list(decode_segments(work.responses, 7, width))
    assert sum(each.steps * each.batch for each in segments) == sum(work.responses)
    assert max(each.batch for each in segments) == min(width, count)
    # Every token reads its prompt and all tokens before it, itself included.
    reads = sum(tokens * 7 + tokens * (tokens + 1) // 2 for tokens in work.responses)
    assert sum(each.read_tokens for each in segments) == reads


def test_a_wave_takes_as_many_steps_as_its_longest_answer() -> None:
    segments = list(decode_segments([3, 5, 5], 0, 3))
    assert [(each.steps, each.batch) for each in segments] == [(3, 3), (2, 2)]


def test_more_rollouts_in_flight_never_take_longer_in_all() -> None:
    work = rollouts(count=256, new=128, tail=4)
    times = [
        roofline.sampling(STUDENT, H200, Decoding(max_sequences=n), work).seconds
        for n in (8, 32, 64, 128, 256, 512)
    ]
    assert times == sorted(times, reverse=True)


# --- Lengths ------------------------------------------------------------------------------------


def test_lengths_have_their_median_and_their_tail() -> None:
    answers = Answers(median_tokens=256, tail=8, max_tokens=100_000)
    lengths = sorted(answers.lengths(1001))
    assert lengths[500] == 256
    assert lengths[990] == pytest.approx(8 * 256, rel=0.03)
    assert max(Answers(median_tokens=256, tail=8, max_tokens=512).lengths(100)) == 512
    assert set(Answers(median_tokens=9, max_tokens=9).lengths(5)) == {9}


def test_many_rollouts_are_taken_in_proportion() -> None:
    work = rollouts(count=40_960, new=16)
    assert len(work.responses) == 4096
    assert work.new_tokens == 40_960 * 16
    one = roofline.sampling(STUDENT, H200, Decoding(max_sequences=256), rollouts(4096, new=16))
    ten = roofline.sampling(STUDENT, H200, Decoding(max_sequences=256), work)
    assert ten.seconds == pytest.approx(10 * one.seconds, rel=0.01)


def test_parts_add_up() -> None:
    time = roofline.sampling(STUDENT, H200, Decoding(max_sequences=16), rollouts())
    assert time.seconds == pytest.approx(math.fsum(time.parts.values()))
    assert all(seconds >= 0 for seconds in time.parts.values())
    assert time.times(2).seconds == pytest.approx(2 * time.seconds)
