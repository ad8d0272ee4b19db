"""`plan --suggest` lays the cards of a cluster out in other ways, and plans every kind of card."""

from dataclasses import replace
from typing import Any

import pytest

from qwen3_distill.config import ClusterConfig, RunConfig
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning.cards import plan_cards
from qwen3_distill.planning.device import stated_memory
from qwen3_distill.planning.layouts import layouts
from qwen3_distill.planning.suggest import Situation, suggest
from qwen3_distill.planning.time_plan import Planned, assumed_lengths, plan_time
from tests.unit.planning.test_suggest import situation

_SHARED = "{replicas: 4, where: with_learner}"
EACH = f"cluster={{rollouts: {_SHARED}, teachers: {_SHARED}, learner: {{ranks: 4}}}}"
ROLES = "cluster={rollouts: {}, teachers: {}, learner: {ranks: 2}}"


def cards(*overrides: str, gib: float = 79.6, teacher: str = "8B") -> Situation:
    return situation("h100x2", gib, *overrides, device="h100-sxm", teacher=teacher)


def placed(config: RunConfig) -> dict[str, tuple[int, str]]:
    cluster = config.cluster
    assert cluster is not None
    assert cluster.learner is not None
    found = {"learner": (cluster.learner.ranks, "")}
    for name, fleet in (("rollouts", cluster.rollouts), ("teachers", cluster.teachers)):
        assert fleet is not None
        found[name] = (fleet.replicas, fleet.where)
    return found


def typed(situation: Situation) -> list[tuple[RunConfig, list[str]]]:
    return [
        (each.config, [word.replace("'", "") for word in each.overrides])
        for each in suggest(situation)
    ]


def test_all_engines_go_onto_each_card_and_the_words_say_so() -> None:
    found = typed(cards(ROLES))
    assert found
    best, words = found[0]
    shared = (4, "with_learner")
    assert placed(best) == {"learner": (4, ""), "rollouts": shared, "teachers": shared}
    for config, overrides in found:
        assert cards(ROLES, *overrides).config == config, words


def test_a_teacher_that_fits_beside_nothing_gets_cards_of_its_own() -> None:
    given = cards(EACH, "scoring.quantization=null", teacher="32B-FP8")
    found = typed(given)
    assert found
    for config, overrides in found:
        (learner, _), (teachers, where) = placed(config)["learner"], placed(config)["teachers"]
        assert where == "own"
        assert learner + teachers == 4
        assert cards(EACH, "scoring.quantization=null", *overrides).config == config
        shapes = {"student_shape": given.student, "teacher_shape": given.teacher}
        assert len(plan_cards(config, device=given.device, **shapes)) == 2
    # A card that is too small for that teacher alone ends it: the other kind of card would fit.
    assert not suggest(replace(given, device=stated_memory(30 * GIB)))


def test_the_same_cards_are_laid_out_with_teachers_beside_or_apart() -> None:
    given = cards(ROLES).config
    assert given.cluster is not None
    found = []
    for way in layouts(given):
        sections = {key.removeprefix("cluster."): value for key, value in way.items()}
        cluster = given.cluster.model_dump() | sections
        found.append(placed(given.model_copy(update={"cluster": ClusterConfig(**cluster)})))
    beside = {f"{name}s": (4, "with_learner") for name in ("rollout", "teacher")}
    apart = [
        {"learner": (n, ""), "rollouts": (n, "with_learner"), "teachers": (4 - n, "own")}
        for n in (3, 2, 1)
    ]
    assert found == [placed(given), {"learner": (4, ""), **beside}, *apart]


def test_no_more_engines_must_be_left_than_there_are() -> None:
    given = cards("cluster={rollouts: {}, teachers: {replicas: 2, minimum: 2}, learner: {}}").config
    found = [way["cluster.teachers"] for way in layouts(given) if "cluster.teachers" in way]
    numbers = [(fleet.get("replicas", 1), fleet.get("minimum", 1)) for fleet in found]
    assert numbers == [(4, 2), (1, 1), (3, 2)]


@pytest.mark.parametrize(
    "cluster",
    [
        "{address: 10.0.0.1:6379, teachers: {where: second}, rollouts: {}, learner: {}}",
        "{rollouts: {}, teachers: {}}",
        "{learner: {ranks: 2}, rollouts: {replicas: 2, where: with_learner}}",
        "{rollouts: {cards: 0}, teachers: {}, learner: {}}",
    ],
)
def test_what_cannot_change_places_stays(cluster: str) -> None:
    assert list(layouts(cards(f"cluster={cluster}").config)) == [{}]


def test_without_a_cluster_there_is_nothing_to_lay_out() -> None:
    assert list(layouts(situation("h200", 139).config)) == [{}]


def test_a_stated_cache_is_not_filled_with_more_rollouts() -> None:
    def most(**changes: Any) -> int:
        given = situation("h200", 139, *(f"generation.{k}={v}" for k, v in changes.items()))
        return max(each.config.generation.max_sequences for each in suggest(given))

    assert most(max_sequences=8) > 8
    assert most(max_sequences=8, kv_cache_gib=2) == 8


@pytest.mark.parametrize("tail", [1.0, 8.0])
def test_every_engine_pays_for_its_own_decode_steps(tail: float) -> None:
    def sampling_s(*overrides: str, prompts: int) -> float:
        one = "pipeline={kind: sequential}"
        given = cards(EACH, one, *overrides, f"prompts_per_step={prompts}")
        planned = Planned(
            config=given.config, student=given.student, teacher=given.teacher, recomputed_layers=0
        )
        lengths = assumed_lengths(given.config, prompt_tokens=128, response_tokens=128, tail=tail)
        return plan_time(planned, given.rates, lengths).stages["sampling"].seconds

    of_four = sampling_s(prompts=256)
    assert of_four == pytest.approx(sampling_s("cluster=null", prompts=64), rel=0.1)
    # One answer cannot be divided.
    assert sampling_s(prompts=4) > 0.95 * sampling_s("cluster=null", prompts=1)


def test_engines_without_cards_are_not_searched() -> None:
    given = cards("cluster={rollouts: {cards: 0}, teachers: {}, learner: {}}")
    with pytest.raises(ConfigError, match=r"cluster\.rollouts\.cards=0"):
        suggest(given)
