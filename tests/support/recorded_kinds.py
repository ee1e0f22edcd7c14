"""Which kinds of events the code can record, as its text says: the `kind` of each call of `record`, followed back.

A kind that is handed through helpers is followed to those who call them, `plan.kind` to the plans. What is put together
otherwise is in `BUILT`; where nothing of this finds a kind, `UnknownKind` tells the place.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from awan.fleet import NodeHealth
from awan.instances.first_boot import EVENT_KINDS
from awan.operations.models import FINAL

ROOT = Path(__file__).parents[2]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Text of an expression -> what it can be.
BUILT: Mapping[str, frozenset[str]] = {
    "f'operation.{ending.status.value}'": frozenset(
        f"operation.{status.value}" for status in FINAL
    ),
    "f'node.{health}'": frozenset(f"node.{health}" for health in NodeHealth),
    "f\"{self.name}.{('applied' if is_applied else 'pending')}\"": frozenset(
        f"{name}.{state}"
        for name in ("firewall", "firewall_group")
        for state in ("applied", "pending")
    ),
    "EVENT_KINDS.get(sign, 'instance.ready')": frozenset({"instance.ready", *EVENT_KINDS.values()}),
}


class UnknownKind(Exception):
    """A kind is recorded that cannot be followed back."""


@dataclass(frozen=True)
class Module:
    """A file of the code."""

    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        """Its text, taken apart."""
        return ast.parse(self.path.read_text())

    @cached_property
    def name(self) -> str:
        """As it is imported."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts)

    def calls(self, within: ast.AST | None = None) -> Iterator[tuple[ast.Call, Function | None]]:
        """Each call with the innermost function that it is in."""

        def walk(
            node: ast.AST, outer: Function | None
        ) -> Iterator[tuple[ast.Call, Function | None]]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Call):
                    yield child, outer
                inner = Function(self, child) if isinstance(child, FUNCTIONS) else outer
                yield from walk(child, inner)

        return walk(self.tree, None)


@dataclass(frozen=True)
class Function:
    """A function of a module."""

    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def parameters(self) -> list[str]:
        """Their names."""
        arguments = self.node.args
        return [it.arg for it in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]

    def argument(self, call: ast.Call, parameter: str) -> ast.expr | None:
        """What a call hands over."""
        for keyword in call.keywords:
            if keyword.arg == parameter:
                return keyword.value
        position = self.parameters.index(parameter)
        return call.args[position] if position < len(call.args) else None

    def assigned(self, variable: str) -> list[ast.expr]:
        """What a local variable can be; that of a loop over a list: what is appended there at its place in a tuple."""
        found = []
        for node in ast.walk(self.node):
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == variable for target in node.targets
            ):
                found.append(node.value)
            elif isinstance(node, ast.For) and isinstance(node.target, ast.Tuple):
                names = [ast.unparse(it) for it in node.target.elts]
                if variable in names:
                    appended = self._appended(ast.unparse(node.iter))
                    found += [it.elts[names.index(variable)] for it in appended]
        return found

    def _appended(self, name: str) -> list[ast.Tuple]:
        return [
            node.args[0]
            for node in ast.walk(self.node)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) == f"{name}.append"
            and isinstance(node.args[0], ast.Tuple)
        ]


class Code:
    """All of `awan`."""

    def __init__(self) -> None:
        self.modules = [Module(path) for path in sorted((ROOT / "awan").rglob("*.py"))]

    def recorded(self) -> set[str]:
        """Every kind that can be recorded. Raises: UnknownKind."""
        found: set[str] = set()
        for module in self.modules:
            for call, function in module.calls():
                if _name_of(call) != "record":
                    continue
                for keyword in call.keywords:
                    if keyword.arg == "kind":
                        found |= self._values(keyword.value, module, function)
        return found

    def _values(self, it: ast.expr, module: Module, function: Function | None) -> set[str]:
        if isinstance(it, ast.Constant) and isinstance(it.value, str):
            return {it.value}
        if ast.unparse(it) in BUILT:
            return set(BUILT[ast.unparse(it)])
        if isinstance(it, ast.IfExp):
            return self._values(it.body, module, function) | self._values(
                it.orelse, module, function
            )
        if isinstance(it, ast.JoinedStr):
            return self._joined(it, module, function)
        if isinstance(it, ast.Attribute) and it.attr == "kind" and isinstance(it.value, ast.Name):
            return {
                getattr(importlib.import_module(where.name), ast.unparse(plan)).kind
                for plan, where, _ in self._origins(it.value, module, function)
            }
        if isinstance(it, ast.Name):
            origins = self._origins(it, module, function)
            if [origin for origin, *_ in origins] != [it]:
                return {
                    value
                    for origin, where, outer in origins
                    for value in self._values(origin, where, outer)
                }
            constant = getattr(importlib.import_module(module.name), it.id, None)
            if isinstance(constant, str):
                return {constant}
        raise UnknownKind(f"{module.path.relative_to(ROOT)}:{it.lineno}: {ast.unparse(it)}")

    def _joined(self, it: ast.JoinedStr, module: Module, function: Function | None) -> set[str]:
        found = {""}
        for part in it.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            texts = self._values(inner, module, function)
            found = {before + text for before in found for text in texts}
        return found

    def _origins(
        self, name: ast.Name, module: Module, function: Function | None
    ) -> list[tuple[ast.expr, Module, Function | None]]:
        """Where a variable has its value from; itself when it is the module's."""
        if function is not None and name.id in function.parameters:
            return [
                (argument, where, outer)
                for call, where, outer in self._callers(function)
                if (argument := function.argument(call, name.id)) is not None
            ]
        if function is not None and (assigned := function.assigned(name.id)):
            return [(value, module, function) for value in assigned]
        return [(name, module, function)]

    def _callers(self, function: Function) -> Iterator[tuple[ast.Call, Module, Function | None]]:
        """The calls of a function: in its module, and where it or its module is imported."""
        wanted = function.node.name
        for module in self.modules:
            if module != function.module and not _imports(module, function):
                continue
            for call, outer in module.calls():
                is_attribute = isinstance(call.func, ast.Attribute)
                if _name_of(call) == wanted and is_attribute == (
                    module != function.module and not _imports(module, function, by_name=True)
                ):
                    yield call, module, outer


def _name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def _imports(module: Module, function: Function, *, by_name: bool = False) -> bool:
    """Whether the module imports the function by its name, or else its module."""
    home = function.module.name
    return any(
        (node.module == home and any(it.name == function.node.name for it in node.names))
        or (not by_name and any(f"{node.module}.{it.name}" == home for it in node.names))
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom)
    )
