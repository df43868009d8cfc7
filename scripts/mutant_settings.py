"""Hand-overs of settings as mutants: every place where a trainer reads one, and every preset value.

A setting that is read is replaced by its default, or its keyword dropped where a library takes it;
a value that a preset or a default holds becomes another.
"""

import ast
from collections.abc import Iterator

from mutant_sites import Node, Site, Source, name_of, site_of, text_of

# Arguments of these have defaults of their own.
LIBRARY_CALLS = {"TRLConfig", "TrainingArguments", "LoraConfig", "AdamW", "KLController"}
OTHER_WORDS = {
    "cosine": "linear", "k1": "k3", "sigmoid": "hinge", "constant_with_warmup": "constant",
}  # fmt: skip
# Settings that only several processes or a GPU make use of.
LEFT_OUT = {"launch"}


def defaults(config: Source) -> dict[str, dict[str, str]]:
    """Section -> setting -> its default as text; empty text where it has none."""
    classes: dict[str, dict[str, str]] = {}
    sections: dict[str, str] = {}
    for node in config.tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        classes[node.name] = {n.target.id: text_of(n.value) if n.value else "" for n in fields}
        if node.name == "Config":
            sections = {n.target.id: text_of(n.annotation) for n in fields}
    known = {name: classes[kind] for name, kind in sections.items() if kind in classes}
    return known | {"config": {"seed": classes["Config"]["seed"]}}


def hand_overs(
    source: Source, functions: list[str], known: dict[str, dict[str, str]], names: dict[str, str]
) -> list[Site]:
    """Settings that these functions read, each once a place.

    Args:
        source: The file.
        functions: Qualified names, or beginnings of them.
        known: As `defaults` gives it.
        names: What a section is called in this file besides its own name.
    """
    found: list[Site] = []
    for node in source.nodes:
        tree = node.tree
        if not isinstance(tree, ast.Attribute) or not isinstance(tree.ctx, ast.Load):
            continue
        if not any(node.function == f or node.function.startswith(f"{f}.") for f in functions):
            continue
        owner = name_of(tree.value)
        section = names.get(owner, owner)
        default = known.get(section, {}).get(tree.attr)
        if default is None or section in LEFT_OUT or "default_factory" in default:
            continue
        if any(isinstance(p, ast.Raise) for p in node.parents):
            continue
        call = _library_keyword(node)
        if call is not None:
            keyword = next(n for n in source.nodes if n.tree is call)
            found.append(site_of(keyword, "hand-over dropped", "**{}"))
        elif default:
            found.append(site_of(node, "hand-over replaced", default))
        else:
            found.append(site_of(node, "hand-over replaced", "1"))
    return list(dict.fromkeys(found))


def _library_keyword(node: Node) -> ast.keyword | None:
    for parent, inner in zip(node.parents[:-1], node.parents[1:], strict=True):
        named = isinstance(inner, ast.keyword) and inner.arg
        if named and isinstance(parent, ast.Call) and name_of(parent.func) in LIBRARY_CALLS:
            return inner
    return None


def values(source: Source, where: list[str]) -> list[Site]:
    """Every value of these module-level dictionaries, and every default of these classes."""
    found = []
    for node in source.nodes:
        parent = node.parents[-1] if node.parents else None
        if isinstance(parent, ast.AnnAssign) and node.function in where:
            inside = node.tree is parent.value
        else:
            head = node.statement.partition(" = ")[0]
            inside = isinstance(parent, ast.Dict) and node.tree in parent.values and head in where
        if inside and isinstance(node.tree, ast.Constant | ast.Tuple):
            found += [site_of(node, "value", text) for text in _another(node.tree)]
    return found


def _another(tree: ast.AST) -> Iterator[str]:
    try:
        value = ast.literal_eval(tree)
    except ValueError:
        return
    parts = value if isinstance(value, tuple) else (value,)
    new = tuple(map(_other, parts))
    if new and None not in new:
        yield repr(new if isinstance(value, tuple) else new[0])


def _other(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.5
    return OTHER_WORDS.get(value) if isinstance(value, str) else None
