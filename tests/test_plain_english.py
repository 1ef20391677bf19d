"""First lines that say what a thing is, functions that read as a short story, and no guessing at what others are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "keras_jacmon"
FILES = sorted(PACKAGE.rglob("*.py"))

# A first line that begins like a question says what a thing is about, and not what it is.
QUESTIONS = ("What", "How", "Which", "Whether", "Why", "Is", "Are", "Does", "Do", "Should", "Can")

# Of a function's body, in lines, without the docstring. Half of the functions have no more than four.
LONGEST = 50

# They ask an object for what its type should say, or read what belongs to other functions.
GUESSES = ("hasattr(", "getattr(type(", "inspect.currentframe(", "sys._getframe(")

Definition = ast.FunctionDef | ast.ClassDef


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def public(tree: ast.Module | ast.ClassDef) -> list[Definition]:
    """Returns the public functions and classes, and the public members of the latter."""
    here = [node for node in tree.body if isinstance(node, Definition) and not node.name.startswith("_")]
    # A setter has the docstring of its property.
    here = [node for node in here if not any(ast.unparse(by).endswith(".setter") for by in node.decorator_list)]
    return here + [member for node in here if isinstance(node, ast.ClassDef) for member in public(node)]


def length(function: ast.FunctionDef) -> int:
    """Returns the number of lines of the body without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.fast
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_reads_well(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    first_lines = {
        getattr(node, "name", path.name): (ast.get_docstring(node) or "").split("\n")[0]
        for node in [tree, *public(tree)]
    }
    assert {n: line for n, line in first_lines.items() if line.split(" ")[0] in QUESTIONS or line[-1:] != "."} == {}
    assert {node.name: length(node) for node in functions(tree) if length(node) > LONGEST} == {}
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if call.startswith(GUESSES)] == []
