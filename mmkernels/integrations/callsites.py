"""Calls in the source of functions: with which arguments, and whether they are reached.

Source that cannot be read (typed into an interpreter, say) holds no calls.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import NamedTuple

from torch import nn


class Condition(NamedTuple):
    """A test around a call, and what it must give for the call to be reached."""

    test: ast.expr
    wanted: bool


class Site(NamedTuple):
    """A call and the tests around it."""

    call: ast.Call
    conditions: tuple[Condition, ...]

    @property
    def name(self) -> str:
        """Of the function or method that is called."""
        return getattr(self.call.func, "attr", getattr(self.call.func, "id", ""))


@functools.lru_cache(maxsize=1024)
def sites(function: FunctionType) -> tuple[Site, ...]:
    """All calls in a function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple(_sites(tree, ()))


def declines_weights(name: str, functions: Iterable[FunctionType]) -> bool:
    """Whether every call of the multi-head attention `name` says need_weights=False.

    A variable counts as saying so. Of a module in a list the name is a number; then all calls that
    say need_weights count.

    Args:
        name: of the attribute that holds the module.
        functions: those that may call it.
    """
    calls = [site for function in functions for site in sites(function)]
    own = [site for site in calls if site.name == name]
    asked = [_need_weights(site.call) for site in own or calls]
    if not own:
        asked = [value for value in asked if value is not None]
    return bool(asked) and all(
        value is not None and not (isinstance(value, ast.Constant) and value.value)
        for value in asked
    )


def out_of_reach(
    module: nn.Module, methods: Iterable[FunctionType], names: frozenset[str]
) -> str | None:
    """The attribute that keeps module from all its calls of functions with these names.

    Args:
        module: the module.
        methods: of its class.
        names: of functions.

    Returns:
        "flash is False", say; None if some call may be reached, or there is none.
    """
    found = [
        (site, function) for function in methods for site in sites(function) if site.name in names
    ]
    reasons = [_unmet(site, module, function) for site, function in found]
    return reasons[0] if reasons and all(reasons) else None


def _need_weights(call: ast.Call) -> ast.expr | None:
    """What a call says of them; of arguments that it hands on, nothing constant."""
    handed_on: list[ast.expr] = [x for x in call.args if isinstance(x, ast.Starred)]
    handed_on += [keyword.value for keyword in call.keywords if keyword.arg is None]
    if handed_on:
        return handed_on[0]
    given = [keyword.value for keyword in call.keywords if keyword.arg == "need_weights"]
    return given[0] if given else call.args[4] if len(call.args) > 4 else None


def _sites(node: ast.AST, conditions: tuple[Condition, ...]) -> Iterator[Site]:
    if isinstance(node, ast.Call):
        yield Site(node, conditions)
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from _sites(node.test, conditions)
        for part, wanted in ((node.body, True), (node.orelse, False)):
            inner = (*conditions, Condition(node.test, wanted))
            yield from _block(part if isinstance(part, list) else [part], inner)
        return
    for _, value in ast.iter_fields(node):
        if isinstance(value, list):
            yield from _block([x for x in value if isinstance(x, ast.AST)], conditions)
        elif isinstance(value, ast.AST):
            yield from _sites(value, conditions)


def _block(nodes: list, conditions: tuple[Condition, ...]) -> Iterator[Site]:
    for node in nodes:
        yield from _sites(node, conditions)
        if isinstance(node, ast.If) and isinstance(node.body[-1], (ast.Return, ast.Raise)):
            conditions = (*conditions, Condition(node.test, False))  # else it would have left


def _unmet(site: Site, module: nn.Module, function: FunctionType) -> str | None:
    own = next(iter(inspect.signature(function).parameters), "")
    for test, wanted in site.conditions:
        value = _value(test, module, own)
        if value is not None and value != wanted:
            return f"{ast.unparse(test).replace(f'{own}.', '')} is {value}"
    return None


def _value(test: ast.expr, module: nn.Module, own: str) -> bool | None:
    """What a test of module's own attributes gives; None: other things matter, too."""
    if (
        isinstance(test, ast.Attribute)
        and isinstance(test.value, ast.Name)
        and test.value.id == own
    ):
        value = getattr(module, test.attr, None)
        return value if isinstance(value, bool) else None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _value(test.operand, module, own)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        decisive = isinstance(test.op, ast.Or)  # one operand of this value decides
        values = [_value(operand, module, own) for operand in test.values]
        if decisive in values:
            return decisive
        return None if None in values else not decisive
    return None
