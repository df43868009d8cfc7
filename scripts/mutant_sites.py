"""Places in a source file that can be changed in one small way, and how a place is found again.

A place is known by its function, its statement and its own text, never by file or line: modules
move, and the same mutant must be made before and after.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
}  # fmt: skip
# Functions and methods that are exchanged for their opposite.
OPPOSITES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax",
    "maximum": "minimum", "minimum": "maximum", "clamp_min": "clamp_max", "mean": "sum",
    "sum": "mean", "argmax": "argmin",
}  # fmt: skip
BUILT_IN = {"min", "max", "any", "all"}
SIDES = {
    "chosen": "rejected", "rejected": "chosen", "left": "right", "right": "left",
    "safe": "unsafe", "unsafe": "safe", "first": "second", "second": "first",
}  # fmt: skip
# Calls whose whole is display or text for people, and keywords that are.
DISPLAY = {"warn", "print", "tqdm", "set_postfix", "warning", "InputError", "NonFiniteError"}
DISPLAY_KEYWORDS = {
    "strict", "desc", "leave", "stacklevel", "encoding", "ensure_ascii", "disable", "errors",
}  # fmt: skip
KEYED = {"get", "pop", "setdefault", "getattr", "hasattr"}
SKIPPED_FUNCTIONS = {"__repr__", "_card"}


@dataclass(frozen=True)
class Site:
    """One change of one node."""

    function: str
    """Qualified name, empty at module level."""
    statement: str
    """The innermost statement around the node, without its body."""
    node: str
    """The node's text."""
    occurrence: int
    """Which of the equal nodes of that statement and function, from 0."""
    operator: str
    """Kind of change."""
    replacement: str
    """What stands there instead."""
    kind: str = "part"
    """`statement` for a whole one, else `part`."""
    line: int = field(compare=False, default=0)

    @property
    def place(self) -> tuple[str, str, str, int]:
        """What it changes, whatever the change is."""
        return self.function, self.statement, self.node, self.occurrence


@dataclass(frozen=True)
class Node:
    """A node of a file with what it is known by."""

    tree: ast.AST
    function: str
    statement: str
    text: str
    occurrence: int
    parents: tuple[ast.AST, ...]


class Source:
    """A parsed file, and its nodes in the order of the text."""

    def __init__(self, text: str):
        self.text = text
        self.tree = ast.parse(text)
        self._starts = [0]
        for line in text.encode().split(b"\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)
        self.nodes = list(self._numbered())

    def _numbered(self) -> Iterator[Node]:
        seen: Counter = Counter()
        for tree, function, statement, parents in _walk(self.tree, "", "", ()):
            text = text_of(tree)
            # A bare call is the same text as the statement that holds it.
            key = function, statement, text, isinstance(tree, ast.stmt)
            yield Node(tree, function, statement, text, seen[key], parents)
            seen[key] += 1

    def with_change(self, tree: ast.AST, replacement: str) -> str:
        """The file's text with a node replaced.

        Raises:
            ValueError: The result is no Python, or the same program.
        """
        start, stop = (
            self._starts[line - 1] + column
            for line, column in (
                (tree.lineno, tree.col_offset), (tree.end_lineno, tree.end_col_offset)
            )
        )  # fmt: skip
        bare = isinstance(tree, ast.stmt | ast.keyword | ast.Slice)
        put = replacement if bare else f"({replacement})"
        whole = self.text.encode()
        changed = (whole[:start] + put.encode() + whole[stop:]).decode()
        try:
            same = ast.dump(ast.parse(changed)) == ast.dump(self.tree)
        except SyntaxError as error:
            raise ValueError(f"{text_of(tree)} -> {replacement}: {error}") from error
        if same:
            raise ValueError(f"{text_of(tree)} -> {replacement} changes nothing")
        return changed


def _walk(
    node: ast.AST, function: str, statement: str, parents: tuple[ast.AST, ...]
) -> Iterator[tuple[ast.AST, str, str, tuple[ast.AST, ...]]]:
    """Every node that has a place in the text, but for annotations, docstrings and f-strings."""
    if isinstance(node, ast.stmt):
        statement = head_of(node)
    if hasattr(node, "lineno") and not isinstance(node, ast.arg | ast.alias):
        yield node, function, statement, parents
    if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        function = f"{function}.{node.name}".lstrip(".")
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_docstring(child):
                yield from _walk(child, function, statement, (*parents, node))


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def head_of(statement: ast.stmt) -> str:
    """A statement's text without its body."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {statement.name}({text_of(statement.args)})"
    if isinstance(statement, ast.ClassDef):
        return f"class {statement.name}"
    if isinstance(statement, ast.If | ast.While):
        return f"{type(statement).__name__.lower()} {text_of(statement.test)}"
    if isinstance(statement, ast.For):
        return f"for {text_of(statement.target)} in {text_of(statement.iter)}"
    if isinstance(statement, ast.With):
        return f"with {', '.join(map(text_of, statement.items))}"
    if isinstance(statement, ast.Try):
        return "try"
    return text_of(statement)


def text_of(node: ast.AST) -> str:
    """A node as Python would write it; of a statement with a body, its head."""
    if isinstance(node, ast.stmt) and hasattr(node, "body"):
        return head_of(node)
    return ast.unparse(node)


# --- the changes ----------------------------------------------------------------------------------


def sites(source: Source) -> list[Site]:
    """Every change that some operator makes in a file."""
    found = []
    for node in source.nodes:
        if _is_text_for_people(node):
            continue
        for operator, replacement in _changes(node):
            found.append(site_of(node, operator, replacement))
    return found


def site_of(node: Node, operator: str, replacement: str) -> Site:
    """A change of a node, with all that it is known by."""
    kind = "statement" if isinstance(node.tree, ast.stmt) else "part"
    return Site(
        node.function, node.statement, node.text, node.occurrence, operator, replacement, kind,
        node.tree.lineno,
    )  # fmt: skip


def _is_text_for_people(node: Node) -> bool:
    if SKIPPED_FUNCTIONS & set(node.function.split(".")):
        return True
    around = (*node.parents, node.tree)
    return any(
        isinstance(n, ast.Raise) or (isinstance(n, ast.Call) and name_of(n.func) in DISPLAY)
        for n in around
    ) or any(isinstance(n, ast.Assert) and n.msg in around for n in around)


def name_of(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _changes(node: Node) -> Iterator[tuple[str, str]]:
    tree, parent = node.tree, node.parents[-1] if node.parents else None
    if isinstance(tree, ast.Compare):
        for place, operator in enumerate(tree.ops):
            ops = list(tree.ops)
            ops[place] = COMPARE[type(operator)]()
            yield "compare", text_of(ast.Compare(tree.left, ops, tree.comparators))
    elif isinstance(tree, ast.BinOp) and type(tree.op) in ARITHMETIC:
        if not any(map(_is_sequence, (tree.left, tree.right))):
            swapped = ast.BinOp(tree.left, ARITHMETIC[type(tree.op)](), tree.right)
            yield "arithmetic", text_of(swapped)
    elif isinstance(tree, ast.UnaryOp) and not isinstance(tree.operand, ast.Constant):
        yield "negation", text_of(tree.operand)
    elif isinstance(tree, ast.UnaryOp) and not isinstance(parent, ast.Subscript | ast.Slice):
        value = ast.literal_eval(tree)
        yield "constant", repr(value - 1)
    elif isinstance(tree, ast.BoolOp):
        op = ast.Or() if isinstance(tree.op, ast.And) else ast.And()
        yield "and-or", text_of(ast.BoolOp(op, tree.values))
    elif isinstance(tree, ast.Constant):
        yield from _constants(tree, parent)
    elif isinstance(tree, ast.Subscript):
        yield from _indices(tree)
    elif isinstance(tree, ast.Call):
        opposite = OPPOSITES.get(name_of(tree.func))
        if opposite and (isinstance(tree.func, ast.Attribute) or opposite in BUILT_IN):
            func = (
                ast.Attribute(tree.func.value, opposite, ast.Load())
                if isinstance(tree.func, ast.Attribute)
                else ast.Name(opposite, ast.Load())
            )
            yield "min-max", text_of(ast.Call(func, tree.args, tree.keywords))
    elif isinstance(tree, ast.keyword):
        if tree.arg and tree.arg not in DISPLAY_KEYWORDS and isinstance(parent, ast.Call):
            yield "keyword", "**{}"
    elif isinstance(tree, ast.Tuple) and isinstance(tree.ctx, ast.Store) and len(tree.elts) == 2:
        if any("rejected" in name_of(n) or name_of(n) == "second" for n in tree.elts):
            yield "sides", ", ".join(text_of(n) for n in reversed(tree.elts))
    elif isinstance(tree, ast.stmt):
        yield from _statements(tree)
    if _is_test(tree, parent) and not isinstance(tree, ast.Compare | ast.UnaryOp):
        yield "negation", f"not ({text_of(tree)})"


def _is_sequence(node: ast.AST) -> bool:
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text or isinstance(node, ast.JoinedStr | ast.List | ast.ListComp)


def _is_test(tree: ast.AST, parent: ast.AST | None) -> bool:
    if isinstance(parent, ast.comprehension):
        return tree in parent.ifs
    return isinstance(parent, ast.If | ast.IfExp | ast.While) and parent.test is tree


def _constants(tree: ast.Constant, parent: ast.AST | None) -> Iterator[tuple[str, str]]:
    value = tree.value
    if isinstance(value, bool):
        yield "boolean", str(not value)
    elif isinstance(value, int | float):
        if not isinstance(parent, ast.Subscript | ast.Slice | ast.UnaryOp):
            yield "constant", repr(value + 1)
            if isinstance(value, int):
                yield "constant", repr(value - 1)
    elif isinstance(value, str):
        if value in SIDES:
            yield "sides", repr(SIDES[value])
        elif value and _is_key(tree, parent):
            yield "key", repr(f"{value}_")


def _is_key(tree: ast.Constant, parent: ast.AST | None) -> bool:
    if isinstance(parent, ast.Dict):
        return tree in parent.keys
    if isinstance(parent, ast.Call):
        return name_of(parent.func) in KEYED and tree in parent.args[:2]
    return isinstance(parent, ast.Subscript | ast.Compare)


def _indices(tree: ast.Subscript) -> Iterator[tuple[str, str]]:
    whole = tree.slice
    parts = list(whole.elts) if isinstance(whole, ast.Tuple) else [whole]
    for place, part in enumerate(parts):
        for operator, changed in _index(part):
            new = [*parts[:place], changed, *parts[place + 1 :]]
            slices = ast.Tuple(new, ast.Load()) if isinstance(whole, ast.Tuple) else changed
            yield operator, text_of(ast.Subscript(tree.value, slices, ast.Load()))


def _index(part: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    number = _number(part)
    if number is not None:
        yield "index", ast.Constant(number - 1 if number < 0 else number + 1)
    if not isinstance(part, ast.Slice):
        return
    for name in ("lower", "upper"):
        number = _number(getattr(part, name))
        if number is not None:
            bounds: dict[str, Any] = {"lower": part.lower, "upper": part.upper, "step": part.step}
            moved = number - 1 if number < 0 else number + 1
            yield "index", ast.Slice(**bounds | {name: ast.Constant(moved)})
    if _number(part.step) == 2:
        lower = None if part.lower else ast.Constant(1)
        yield "sides", ast.Slice(lower, part.upper, part.step)
    elif (part.lower is None) != (part.upper is None):
        yield "sides", ast.Slice(part.upper, part.lower, part.step)


def _number(node: ast.AST | None) -> int | None:
    try:
        value = ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError):
        return None
    return value if type(value) is int else None


def _statements(tree: ast.stmt) -> Iterator[tuple[str, str]]:
    if isinstance(tree, ast.FunctionDef):
        return
    if isinstance(tree, ast.Return) and tree.value is not None:
        if not (isinstance(tree.value, ast.Constant) and tree.value.value is None):
            yield "return", "return None"
    elif isinstance(tree, ast.AugAssign):
        yield "statement", "pass"
        if type(tree.op) in ARITHMETIC and not _is_sequence(tree.value):
            op = ARITHMETIC[type(tree.op)]()
            yield "arithmetic", text_of(ast.AugAssign(tree.target, op, tree.value))
    elif isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Call):
        yield "statement", "pass"
    elif isinstance(tree, ast.Assign) and isinstance(tree.targets[0], ast.Name):
        read = {n.id for n in ast.walk(tree.value) if isinstance(n, ast.Name)}
        if tree.targets[0].id in read:
            yield "statement", "pass"


def early_returns(source: Source) -> list[Site]:
    """Functions that give back their first argument, or do nothing."""
    found = []
    for node in source.nodes:
        tree = node.tree
        if not isinstance(tree, ast.FunctionDef) or tree.name in SKIPPED_FUNCTIONS:
            continue
        body = [n for n in tree.body if not _is_docstring(n)]
        names = [a.arg for a in tree.args.args if a.arg not in ("self", "cls")]
        if not body or (len(body) == 1 and isinstance(body[0], ast.Return)):
            continue
        if tree.name == "__init__":
            continue
        gives = any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(tree))
        if gives and not names:
            continue
        text = f"return {names[0]}" if gives else "return"
        first = next(n for n in source.nodes if n.tree is body[0])
        found.append(site_of(first, "early return", text))
    return found


# --- finding one again ----------------------------------------------------------------------------


def renamed(text: str, names: dict[str, str]) -> str:
    """Text with whole words exchanged."""
    if not names:
        return text
    words = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"\b({words})\b", lambda m: names[m.group(1)], text)


def find(
    sources: dict[str, Source], mutant: dict, names: dict[str, str]
) -> tuple[str, ast.AST, str, str] | None:
    """A recorded mutant in files as they are now.

    Args:
        sources: Path -> file, those it may have moved to.
        mutant: As recorded: function, statement, node, occurrence and replacement.
        names: Old name -> new name.

    Returns:
        Path, node, replacement and how it was found: `exact`, `moved` (another function) or
        `loose` (another statement of its function); None if it is gone.
    """
    for table in ({}, names) if names else ({},):
        wanted = {
            k: renamed(mutant[k], table) for k in ("function", "statement", "node", "replacement")
        }
        rules = (
            ("exact", lambda n, w: n.function == w["function"] and n.statement == w["statement"]),
            ("moved", lambda n, w: n.statement == w["statement"]),
            (
                "loose",
                lambda n, w: w["function"] and _last(n.function) == _last(w["function"]),
            ),
        )
        whole = mutant["kind"] == "statement"
        for how, rule in rules:
            for path, source in sources.items():  # the file it was in, or went to, comes first
                hits = [
                    node
                    for node in source.nodes
                    if node.text == wanted["node"]
                    and isinstance(node.tree, ast.stmt) == whole
                    and rule(node, wanted)
                ]
                if how == "exact":
                    hits = [n for n in hits if n.occurrence == mutant["occurrence"]]
                elif how == "moved":
                    same = {n.function for n in hits}
                    hits = [n for n in hits if n.occurrence == mutant["occurrence"]]
                    hits = hits if len(same) == 1 else []
                if len(hits) == 1:
                    return path, hits[0].tree, wanted["replacement"], how
    return None


def _last(function: str) -> str:
    return function.rpartition(".")[2]
