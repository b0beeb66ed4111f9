"""Mutants of the rule modules: the same source with one guard, one condition, one early return or one write less. Pure.

What is deleted, by syntax tree and one at a time:

- *guard*: an `if` whose body only refuses (raises, or calls a function whose name says that it refuses);
- *condition*: one operand of an `and` or `or`, wherever it stands, and one link of a chained comparison;
- *edge*: `<` becomes `<=` and so on, wherever a guard compares;
- *return*: an `if` whose body only returns;
- *write*: a statement that puts, creates or drops a row of the state.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

REFUSING = ("refuse", "_refuse", "_refused")
WRITING = ("put", "create")
_EDGES: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed module. `removed` is the source text that is gone, on line `line` of the original."""

    module: str
    kind: str
    function: str
    line: int
    removed: str
    source: str

    @property
    def name(self) -> str:
        """What tells it from all others as long as its function is not rewritten."""
        return f"{self.module} {self.function} {self.kind}: {self.removed}"


@dataclass(frozen=True, slots=True)
class _Site:
    kind: str
    function: str
    node: Any
    removed: str
    apply: Callable[[], None]


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a module's source."""
    for index in range(len(_sites(ast.parse(source)))):
        # A fresh tree for each, since applying changes it.
        tree = ast.parse(source)
        site = _sites(tree)[index]
        line = site.node.lineno
        site.apply()
        yield Mutant(module, site.kind, site.function, line, site.removed, ast.unparse(ast.fix_missing_locations(tree)))


def guards(source: str) -> Iterator[tuple[int, str]]:
    """(line, source) of every guard."""
    for site in _sites(ast.parse(source)):
        if site.kind == "guard":
            yield site.node.lineno, ast.unparse(site.node)


def _sites(tree: ast.Module) -> list[_Site]:
    return [site for function, node in _functions(tree) for site in _sites_of(function, node)]


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods by qualified name; nested ones belong to the outer."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _sites_of(function: str, root: ast.FunctionDef) -> Iterator[_Site]:
    for parent in ast.walk(root):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(parent, name, None)
            if isinstance(statements, list):
                for at, statement in enumerate(statements):
                    yield from _statement_sites(function, statements, at, statement)
        if isinstance(parent, ast.BoolOp):
            for at, operand in enumerate(parent.values):
                # `x or 0` gives a default and decides nothing.
                if isinstance(operand, ast.Constant):
                    continue
                removed = f"{ast.unparse(operand)} of {ast.unparse(parent)[:40]}"
                yield _Site("condition", function, operand, removed, _dropping(parent.values, at))
        if isinstance(parent, ast.Compare) and len(parent.ops) > 1:
            yield from _chain_sites(function, parent)
        if isinstance(parent, ast.If) and _refuses(parent.body):
            for node in ast.walk(parent.test):
                if isinstance(node, ast.Compare):
                    yield from _edge_sites(function, node)


def _statement_sites(function: str, statements: list[Any], at: int, statement: ast.stmt) -> Iterator[_Site]:
    if isinstance(statement, ast.If):
        kind = "guard" if _refuses(statement.body) else "return" if _returns(statement.body) else None
        if kind is not None:
            removed = f"if {ast.unparse(statement.test)}"
            rest: list[Any] = statement.orelse or [ast.Pass()]
            yield _Site(kind, function, statement, removed, _replacing(statements, at, rest))
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called = statement.value.func
        if isinstance(called, ast.Attribute) and called.attr in WRITING:
            yield _Site("write", function, statement, ast.unparse(statement), _replacing(statements, at, [ast.Pass()]))


def _chain_sites(function: str, compare: ast.Compare) -> Iterator[_Site]:
    """`a < b < c` without its first, or without its last link."""
    for first in (True, False):

        def apply(first: bool = first) -> None:
            if first:
                compare.left = compare.comparators.pop(0)
                compare.ops.pop(0)
            else:
                compare.comparators.pop()
                compare.ops.pop()

        which = "first" if first else "last"
        yield _Site("condition", function, compare, f"the {which} link of {ast.unparse(compare)}", apply)


def _edge_sites(function: str, compare: ast.Compare) -> Iterator[_Site]:
    for at, operator in enumerate(compare.ops):
        other = _EDGES.get(type(operator))
        if other is not None:

            def apply(at: int = at, other: type[ast.cmpop] = other) -> None:
                compare.ops[at] = other()

            yield _Site("edge", function, compare, f"edge {at + 1} of {ast.unparse(compare)}", apply)


def _refuses(body: list[ast.stmt]) -> bool:
    last = body[-1]
    if isinstance(last, ast.Raise):
        return True
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        called = last.value.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        return name in REFUSING
    return False


def _returns(body: list[ast.stmt]) -> bool:
    return len(body) == 1 and isinstance(body[0], ast.Return | ast.Continue | ast.Break)


def _dropping(values: list[Any], at: int) -> Callable[[], None]:
    def apply() -> None:
        del values[at]

    return apply


def _replacing(statements: list[Any], at: int, others: list[Any]) -> Callable[[], None]:
    def apply() -> None:
        statements[at : at + 1] = others

    return apply
