"""Public functions of three or more arguments describe each of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spavl_lib

ROOT = Path(spavl_lib.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions and methods without a leading underscore, outside of other functions."""
    bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def arguments_of(function: ast.FunctionDef) -> list[str]:
    """Names of the arguments a caller passes."""
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def is_overriding(function: ast.FunctionDef) -> bool:
    """Methods that another library calls and documents: transformers' callbacks, pytest's hooks."""
    return function.name.startswith("on_") or function.name in (
        "compute_loss", "forward", "start_kernel", "shutdown_kernel",
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_of_three_arguments_describe_them(path: Path) -> None:
    missing = []
    for function in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        names = arguments_of(function)
        is_command = any("command" in ast.unparse(d) for d in function.decorator_list)
        if len(names) < 3 or is_overriding(function) or is_command:
            continue
        lines = (ast.get_docstring(function) or "").splitlines()
        described = {line.strip().partition(":")[0] for line in lines}
        if "Args:" not in {line.strip() for line in lines} or not set(names) <= described:
            absent = sorted(set(names) - described)
            missing.append(f"{function.name} (line {function.lineno}): {', '.join(absent)}")
    assert not missing, "without a description under Args:\n" + "\n".join(missing)
