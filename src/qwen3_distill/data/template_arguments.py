"""Checks the arguments of a chat template against what the template reads.

A chat template ignores an argument that it does not read, and one of a type that it does not
expect. So the template is parsed: which names does it read, and as what?
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3_distill.errors import ConfigError

GIVEN_BY_RENDERER = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
        *("mask_token", "additional_special_tokens", "raise_exception", "strftime_now"),
        *("chat_template", "conversation", "caller", "loop", "self", "varargs", "kwargs"),
    }
)
"""Names in a template that transformers' renderer or Jinja sets, and no argument may."""

_FALSE_WORDS = ("no", "off", "false", "n", "0", "none", "null", "")
_TRUE_WORDS = ("yes", "on", "true", "y", "1")


class _Generation(Extension):
    """Parses ``{% generation %}``, transformers' mark of what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass
class _Uses:
    """How a template reads one argument."""

    as_bool: bool = False
    """Compared with true or false."""
    as_condition: bool = False
    """Tested for truth, as in ``{% if x %}``."""
    as_value: bool = False
    """Printed, or used in another way that needs more than true or false."""
    constants: list[Any] = field(default_factory=list)
    """Texts and numbers that it is compared with."""


def template_of(tokenizer: Any) -> str | None:
    """Return the chat template that renders prompts; None if there is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def check_template_arguments(template: str | None, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the template does not read, or reads as another type.

    Raises:
        ConfigError: names each wrong argument and what the template takes.
    """
    if not arguments or template is None:
        return
    uses = arguments_read(template)
    if uses is None:  # rendering explains what is wrong with the template
        return
    problems = [
        problem
        for argument, value in arguments.items()
        if (problem := _problem(argument, value, uses)) is not None
    ]
    if problems:
        listed = "; ".join(problems)
        raise ConfigError(f"student.template_arguments and the student's chat template: {listed}")


def arguments_read(template: str) -> dict[str, _Uses] | None:
    """Return the arguments that a template reads, with their uses; None if it has a syntax error.

    Names that the renderer sets are left out.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        tree = environment.parse(template)
        names = _undeclared(tree, environment) - GIVEN_BY_RENDERER
    except (TemplateSyntaxError, RecursionError):
        return None
    return _UseCollector(names).collect(tree)


def _undeclared(tree: nodes.Template, environment: Environment) -> set[str]:
    """Return the names that the template reads before it sets them itself.

    Jinja counts a variable that is set in each branch of an ``if`` as undeclared.
    """
    names = meta.find_undeclared_variables(tree) - set(environment.globals)
    first: dict[str, str] = {}
    for name in _names_in_order(tree):
        first.setdefault(name.name, name.ctx)
    return {name for name in names if first.get(name, "load") == "load"}


def _names_in_order(node: nodes.Node) -> Iterator[nodes.Name]:
    """Yield every name in the order of evaluation: a value comes before what it is set to."""
    if isinstance(node, nodes.Name):
        yield node
    if isinstance(node, nodes.Assign):
        yield from _names_in_order(node.node)
    elif isinstance(node, nodes.For):
        yield from _names_in_order(node.iter)
    for child in node.iter_child_nodes(
        exclude=("node",) if isinstance(node, nodes.Assign) else ("iter",)
    ):
        yield from _names_in_order(child)


def _problem(argument: str, value: Any, known: Mapping[str, _Uses]) -> str | None:
    if argument in GIVEN_BY_RENDERER:
        return f"{argument} may not be set: the renderer sets it"
    if argument not in known:
        names = ", ".join(sorted(known))
        close = difflib.get_close_matches(argument, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        takes = f"it reads {names}" if names else "it reads no argument at all"
        return f"it does not read {argument}, so {argument} would change nothing; {takes}{hint}"
    uses = known[argument]
    if isinstance(value, bool) or not (uses.as_bool or uses.as_condition):
        return None
    if value in [constant for constant in uses.constants if not isinstance(constant, bool)]:
        return None
    word = str(value).strip().lower()
    if uses.as_value and word not in _FALSE_WORDS + _TRUE_WORDS:
        return None
    meant = "false" if word in _FALSE_WORDS else "true" if word in _TRUE_WORDS else None
    return (
        f"{argument} is {value!r} ({type(value).__name__}), but the template asks whether it is "
        f"true or false; write {argument}: {meant or 'true or false'}, without quotes (in YAML 1.2 "
        "yes, no, on, off and whatever is quoted are text)"
    )


class _UseCollector:
    """Walks a template's tree and notes how it uses each of some names."""

    def __init__(self, names: set[str]) -> None:
        self._uses = {name: _Uses() for name in sorted(names)}
        self._sources: dict[str, set[str]] = {name: {name} for name in names}
        """The arguments whose value a variable may have."""

    def collect(self, tree: nodes.Template) -> dict[str, _Uses]:
        assignments = [pair for node in tree.find_all(nodes.Assign) for pair in _assigned(node)]
        for _ in assignments:  # until aliases of aliases are known
            for target, value in assignments:
                known = self._sources.get(target, set())
                self._sources[target] = known | self._carried(value)
        self._visit(tree, as_condition=False)
        return self._uses

    def _carried(self, node: nodes.Node) -> set[str]:
        """Return the arguments whose value the expression may return unchanged."""
        match node:
            case nodes.Name() | nodes.NSRef():
                return self._sources.get(node.name, set())
            case nodes.Getattr(node=nodes.Name(name=name)):
                return self._sources.get(f"{name}.{node.attr}", set())
            case nodes.CondExpr():
                return self._all_carried(node.expr1, node.expr2)
            case nodes.Or() | nodes.And():
                return self._all_carried(node.left, node.right)
            case nodes.Filter(name="default" | "d"):
                return self._all_carried(node.node)
            case _:
                return set()

    def _all_carried(self, *expressions: nodes.Node | None) -> set[str]:
        return {name for each in expressions if each is not None for name in self._carried(each)}

    def _visit(self, node: nodes.Node, *, as_condition: bool) -> None:
        match node:
            case nodes.Name() | nodes.Getattr(node=nodes.Name()) if self._carried(node):
                self._note_read(node, as_condition)
            case nodes.Assign():
                self._visit_carrier(node.node)
            case nodes.Call(node=nodes.Name(name="namespace")):
                for pair in node.kwargs:
                    self._visit_carrier(pair.value)
            case nodes.If() | nodes.CondExpr():
                self._visit(node.test, as_condition=True)
                for child in node.iter_child_nodes(exclude=("test",)):
                    inherited = as_condition and isinstance(node, nodes.CondExpr)
                    self._visit(child, as_condition=inherited)
            case nodes.Not():
                self._visit(node.node, as_condition=True)
            case nodes.And() | nodes.Or():
                self._visit(node.left, as_condition=as_condition)
                self._visit(node.right, as_condition=as_condition)
            case nodes.Test():
                self._visit_test(node)
            case nodes.Compare():
                self._visit_compare(node)
            case nodes.Filter(name="default" | "d", node=nodes.Expr() as inner):
                self._visit(inner, as_condition=as_condition)
            case _:
                for child in node.iter_child_nodes():
                    self._visit(child, as_condition=False)

    def _visit_carrier(self, node: nodes.Node) -> None:
        """Visit an expression that is assigned: what it returns is judged where that is used."""
        if isinstance(node, nodes.CondExpr):
            self._visit(node.test, as_condition=True)
            for branch in (node.expr1, node.expr2):
                if branch is not None:
                    self._visit_carrier(branch)
        elif isinstance(node, nodes.And | nodes.Or):
            self._visit_carrier(node.left)
            self._visit_carrier(node.right)
        elif not self._carried(node):
            self._visit(node, as_condition=False)

    def _note_read(self, node: nodes.Node, as_condition: bool) -> None:
        for use in self._of(node):
            use.as_condition |= as_condition
            use.as_value |= not as_condition

    def _visit_test(self, node: nodes.Test) -> None:
        if not self._carried(node.node):
            for child in node.iter_child_nodes():
                self._visit(child, as_condition=False)
        elif node.name in ("true", "false", "boolean"):
            for use in self._of(node.node):
                use.as_bool = True
        elif node.name in ("eq", "equalto", "==", "ne", "!=", "sameas", "in") and node.args:
            self._note_comparison(node.node, node.args[0])
        elif node.name not in ("defined", "undefined", "none"):
            self._visit(node.node, as_condition=False)

    def _visit_compare(self, node: nodes.Compare) -> None:
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if len(sides) == 2 and node.ops[0].op in ("eq", "ne", "in", "notin"):
            for side, other in (sides, sides[::-1]):
                if self._carried(side):
                    self._note_comparison(side, other)
                else:
                    self._visit(side, as_condition=False)
            return
        for side in sides:
            self._visit(side, as_condition=False)

    def _note_comparison(self, side: nodes.Node, other: nodes.Node) -> None:
        constants = list(_constants(other))
        for use in self._of(side):
            use.as_bool |= any(isinstance(constant, bool) for constant in constants)
            use.constants += [constant for constant in constants if constant is not None]
            use.as_value |= not constants  # compared with what the template computes

    def _of(self, node: nodes.Node) -> list[_Uses]:
        return [self._uses[name] for name in self._carried(node) if name in self._uses]


def _assigned(node: nodes.Assign) -> Iterator[tuple[str, nodes.Node]]:
    """Yield each variable that is set, with its value; ``ns.x`` for a namespace's attribute."""
    target, value = node.target, node.node
    if isinstance(target, nodes.NSRef):
        yield f"{target.name}.{target.attr}", value
    elif isinstance(target, nodes.Name):
        yield target.name, value
        if isinstance(value, nodes.Call):
            for pair in value.kwargs:
                yield f"{target.name}.{pair.key}", pair.value


def _constants(node: nodes.Node) -> Iterator[Any]:
    """Yield the constants of a constant, or of a list of constants."""
    if isinstance(node, nodes.Const):
        yield from node.value if isinstance(node.value, list | tuple) else [node.value]
    elif isinstance(node, nodes.List | nodes.Tuple):
        for item in node.items:
            yield from _constants(item)
