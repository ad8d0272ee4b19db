from typing import Any

import pytest

from qwen3_distill.data.template_arguments import arguments_read, check_template_arguments
from qwen3_distill.errors import ConfigError

BODY = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASKS_FALSE = (
    "{%- if add_generation_prompt %}{%- if enable_thinking is defined and enable_thinking is false "
    "%}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""The form of Qwen3's template."""

READS_TRUE_OR_FALSE = {
    "is false": ASKS_FALSE,
    "is true": "{% if enable_thinking is true %}x{% endif %}",
    "is not true": "{% if enable_thinking is not true %}x{% endif %}",
    "== true": "{% if enable_thinking == true %}x{% endif %}",
    "false ==": "{% if false == enable_thinking %}x{% endif %}",
    "!= false": "{{ 'x' if enable_thinking != false }}",
    "sameas": "{% if enable_thinking is sameas false %}x{% endif %}",
    "if": "{% if enable_thinking %}x{% endif %}",
    "elif": "{% if tools %}{% elif enable_thinking %}x{% endif %}",
    "not": "{{ '/no_think' if not enable_thinking else '' }}",
    "and": "{% if messages and enable_thinking %}x{% endif %}",
    "default": "{% if enable_thinking | default(true) %}x{% endif %}",
    "set": "{% set enable_thinking = enable_thinking | default(true) %}"
    "{% if not enable_thinking %}x{% endif %}",
    "alias": "{% set thinks = enable_thinking if enable_thinking is defined else true %}"
    "{% if thinks == false %}x{% endif %}",
    "alias of an alias": "{% set a = enable_thinking %}{% set b = a %}{% if b %}x{% endif %}",
    "namespace": "{% set ns = namespace(t=enable_thinking) %}{% if ns.t is false %}x{% endif %}",
    "namespace, later": "{% set ns = namespace(t=true) %}{% set ns.t = enable_thinking %}"
    "{% if not ns.t %}x{% endif %}",
    "generation": "{% generation %}{% if enable_thinking %}x{% endif %}{% endgeneration %}",
    "loop control": "{% for m in messages %}{% if enable_thinking %}{% break %}{% endif %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("template", READS_TRUE_OR_FALSE.values(), ids=READS_TRUE_OR_FALSE)
@pytest.mark.parametrize(
    ("value", "written"),
    [
        *(("no", "false"), ("off", "false"), ("false", "false"), ("False", "false"), (0, "false")),
        *(("yes", "true"), ("on", "true"), ("true", "true"), (1, "true"), ("", "false")),
        *(("never", "true or false"), (7, "true or false")),
    ],
)
def test_text_is_refused_where_the_template_asks_for_true_or_false(
    template: str, value: Any, written: str
) -> None:
    with pytest.raises(ConfigError, match=f"write enable_thinking: {written}, without quotes"):
        check_template_arguments(BODY + template, {"enable_thinking": value})


@pytest.mark.parametrize("template", READS_TRUE_OR_FALSE.values(), ids=READS_TRUE_OR_FALSE)
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_taken(template: str, value: bool) -> None:
    check_template_arguments(BODY + template, {"enable_thinking": value})


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("{{ effort }}", "high"),
        ("{% if effort %}{{ effort }}{% endif %}", "high"),
        ("{% set e = effort if effort is defined else 'low' %}{{ e }}", "high"),
        ("{{ effort | upper }}", "no"),
        ("{% if effort == 'high' %}x{% endif %}", "high"),
        ("{% if effort in ['high', 'low'] %}x{% endif %}", "other"),
        ("{% if effort is false or effort == 'off' %}x{% endif %}", "off"),
        ("{% if effort == 0 or not effort %}x{% endif %}", 0),
        ("{% if effort > 3 %}x{% endif %}", 5),
        ("{% if effort is string %}x{% endif %}", "high"),
        ("{{ 'effort: ' + effort }}", "high"),
        ("{% macro say(x) %}{{ x if x }}{% endmacro %}{{ say(effort) }}", "high"),
        ("{% if effort is defined %}x{% endif %}", "high"),
    ],
)
def test_text_is_taken_where_the_template_reads_text(template: str, value: Any) -> None:
    check_template_arguments(BODY + template, {"effort": value})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_thinkin": False}, ["does not read enable_thinkin", "did you mean enable_thi"]),
        ({"thinking": False}, ["does not read thinking", "it reads enable_thinking"]),
        ({"Enable_Thinking": False}, ["did you mean enable_thinking"]),
        ({"m": "x"}, ["does not read m"]),  # a variable of the template's own
        ({"namespace": "x"}, ["does not read namespace"]),
        ({"messages": "x"}, ["messages may not be set"]),
        ({"eos_token": "x"}, ["eos_token may not be set"]),
        ({"a": 1, "b": 2}, ["does not read a", "does not read b"]),
    ],
)
def test_what_the_template_does_not_read_is_refused(
    arguments: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_template_arguments(BODY + ASKS_FALSE, arguments)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_template_without_arguments_says_so() -> None:
    with pytest.raises(ConfigError, match="it reads no argument at all"):
        check_template_arguments(BODY, {"enable_thinking": True})


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{% if tools %}{% set c = 1 %}{% else %}{% set c = 2 %}{% endif %}{{ c }}", set()),
        ("{% for m in messages %}{% if m %}{% set c = m %}{% endif %}{{ c }}{% endfor %}", set()),
        ("{% if not c is defined %}{% set c = 1 %}{% endif %}{{ c }}", {"c"}),
        ("{% set c = c | default(1) %}{{ c }}", {"c"}),
        ("{% set d = c %}{% set c = 1 %}{{ c }}{{ d }}", {"c"}),
        ("{% for c in c %}{{ c }}{% endfor %}", {"c"}),
        ("{% for c in tools %}{{ c }}{% endfor %}{{ d }}", {"d"}),
        ("{% macro f(c) %}{{ c }}{{ e }}{% endmacro %}{{ f(d) }}", {"d", "e"}),
    ],
)
def test_a_variable_that_the_template_sets_itself_is_no_argument(
    template: str, names: set[str]
) -> None:
    assert set(arguments_read(template) or {}) == names


def test_what_the_renderer_gives_is_no_argument() -> None:
    template = "{{ bos_token }}{% for t in tools %}{{ strftime_now('%d') }}{% endfor %}"
    assert arguments_read(template) == {}
    assert set(arguments_read(BODY + ASKS_FALSE) or {}) == {"enable_thinking"}


@pytest.mark.parametrize("template", [None, "{% if %}"])
def test_a_template_that_cannot_be_read_is_left_to_rendering(template: str | None) -> None:
    check_template_arguments(template, {"x": 1})
