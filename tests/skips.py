"""Where a test may be skipped: read from the source of it and of what it uses."""

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SKIPS = {"skip", "skipif", "importorskip", "xfail", "SkipTest", "deep"}  # the last is left out unless it is asked for
PLUGINS = ("tests/world.py",)


@functools.cache
def module_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def function_of(test: str) -> Function:
    """Of a test, FILE::FUNCTION."""
    file, _, name = test.partition("::")
    found = [node for node in ast.walk(module_of(file)) if isinstance(node, FUNCTIONS) and node.name == name]
    assert found, f"{test} is not there"
    return found[0]


def skips(test: str) -> set[str]:
    """Where the test may be skipped, as FILE::FUNCTION or FILE: in itself and in whatever of the tests it uses by name,
    functions and fixtures, with the modules that these are of.
    """
    file, _, _ = test.partition("::")
    folders = [folder for folder in Path(file).parents if folder.parts]
    above = [str(folder / "conftest.py") for folder in folders if (ROOT / folder / "conftest.py").exists()]
    found: set[str] = set()
    left: list[tuple[str, Function]] = [(file, function_of(test))]
    seen = {file, *above}
    left += [(each, node) for each in seen for node in functions_of(each).values() if is_autouse(node)]
    found |= {each for each in seen if may_skip(*of_the_module(each))}
    done: set[tuple[str, str]] = set()
    while left:
        file, function = left.pop()
        if (file, function.name) in done:
            continue
        done.add((file, function.name))
        if may_skip(function):
            found.add(f"{file}::{function.name}")
        for name in used_by(function):
            for place, node in definitions(name, file, [*above, *PLUGINS]):
                left.append((place, node))
                if place not in seen and may_skip(*of_the_module(place)):
                    found.add(place)
                seen.add(place)
    return found


def may_skip(*nodes: ast.AST) -> bool:
    for node in (each for whole in nodes for each in ast.walk(whole)):
        if isinstance(node, ast.Attribute) and node.attr in SKIPS:
            return True
        if isinstance(node, ast.ImportFrom) and any(alias.name in SKIPS for alias in node.names):
            return True
    return False


def of_the_module(file: str) -> list[ast.stmt]:
    return [node for node in module_of(file).body if not isinstance(node, (*FUNCTIONS, ast.ClassDef))]


@functools.cache
def functions_of(file: str) -> dict[str, Function]:
    return {node.name: node for node in ast.walk(module_of(file)) if isinstance(node, FUNCTIONS)}


def is_autouse(function: Function) -> bool:
    return any(
        isinstance(mark, ast.Call) and any(word.arg == "autouse" for word in mark.keywords)
        for mark in function.decorator_list
    )


@functools.cache
def used_by(function: Function) -> set[str]:
    """Names that it says, its parameters and the texts of its marks among them; methods by their names alone."""
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    used |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    used |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    marks = (node for mark in function.decorator_list for node in ast.walk(mark))
    return used | {node.value for node in marks if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def definitions(name: str, file: str, above: Iterable[str]) -> Iterator[tuple[str, Function]]:
    """In the file, where it imports the name from, or in those above it."""
    for place in (file, *above):
        if name in functions_of(place):
            yield place, functions_of(place)[name]
            return
    for node in module_of(file).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests."):
            place = f"{node.module.replace('.', '/')}.py"
            for alias in node.names:
                if (alias.asname or alias.name) == name and (ROOT / place).exists():
                    made = {each.name: each for each in module_of(place).body if isinstance(each, ast.ClassDef)}
                    if alias.name in functions_of(place):
                        yield place, functions_of(place)[alias.name]
                    elif alias.name in made:
                        yield from ((place, each) for each in made[alias.name].body if isinstance(each, FUNCTIONS))
