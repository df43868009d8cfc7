"""The pages name only what exists: files, modules, commands, settings' sections, targets."""

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from spavl_lib import cli
from spavl_lib.config import flatten, load_config, profile_names
from spavl_lib.notebook.execute import find_notebook

REPO = Path(__file__).parents[1]
LIBRARY = REPO / "spavl_lib"
# The log tells of files as they were.
PAGES = sorted(
    path
    for path in (*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), REPO / "benchmarks/README.md")
    if path.name != "log.md" and not path.name.startswith("NOTE_")
)
FOLDERS = (
    "benchmarks", "docs", "notebooks", "reports", "scripts", "spavl_lib", "tests",
    *(path.parent.name for path in LIBRARY.glob("*/__init__.py")),
)  # fmt: skip
# Files that a reader makes: a recipe's, or those of a run.
MADE = re.compile(r"my_package|/mine\.py$|NN_|^runs/")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def bases(page: Path) -> tuple[Path, ...]:
    """Folders that a path on a page may start from."""
    return REPO, LIBRARY, page.parent, REPO / "tests"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_exist(page: Path) -> None:
    names = "|".join(FOLDERS)
    ending = r"(?:py|md|yaml|json|ipynb|png|sbatch|toml)"
    paths = set(re.findall(rf"(?<![\w./<])(?:{names})/[\w./-]*?\w+\.{ending}\b", text_of(page)))
    paths |= set(re.findall(r"\]\(([^)#:]+)\)", text_of(page)))
    paths = {path for path in paths if not MADE.search(path)}
    lost = [path for path in paths if not any((base / path).exists() for base in bases(page))]
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_modules_exist(page: Path) -> None:
    """`python -m` modules, and the imports of code examples with the names they import."""
    for name in re.findall(r"python -m ((?:spavl_lib|benchmarks|tests)[\w.]*)", text_of(page)):
        assert importlib.util.find_spec(name), name
    imports = re.findall(r"^ *from (spavl_lib[\w.]*) import (.+)$", text_of(page), re.MULTILINE)
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    text = text_of(page)
    targets = re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.MULTILINE)
    makefile = text_of(REPO / "Makefile")
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
    calls = re.findall(r"(?:^|`)spavl ([a-z]+)(?: ([a-z]+))?", text, re.MULTILINE)
    for verb, more in calls:
        words = [verb, more] if verb in ("data", "model") and more else [verb]
        if verb == "train" and more:  # a trainer's name
            words = [verb]
        assert CliRunner().invoke(cli.app, [*words, "--help"]).exit_code == 0, words


def parse(words: list[str]) -> None:
    """Read a command's words as `spavl` does, without running it.

    Raises:
        KeyError: There is no such command.
        typer.TyperException: An option is unknown, or something required is missing.
    """
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    if words:  # without any, a sentence only names the command
        command.make_context("spavl", list(words))


def commands_of(text: str) -> list[list[str]]:
    """The words of every `spavl` command on a page, lines that end in a backslash joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    inline = re.findall(r"`(spavl [^`\n]+)`", joined)
    lines = [line for line in joined.splitlines() if line.startswith("spavl ")]
    return [shlex.split(call, comments=True)[1:] for call in (*lines, *inline)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_and_settings_of_commands_exist(page: Path) -> None:
    """Nor does a command lack what it requires; its profile and notebook exist too."""
    plain = flatten(load_config("smoke").to_dict())
    for words in commands_of(text_of(page)):
        if not words or not re.fullmatch("[a-z]+", words[0]):
            continue  # the program's name in a sentence
        parse(words)
        for word, after in zip(words, [*words[1:], ""], strict=True):
            if word == "--set" and "=" in after:
                assert after.partition("=")[0] in plain, f"{page.name}: {after}"
            if word == "--profile" and re.fullmatch(r"[a-z]+", after):
                assert after in profile_names(), f"{page.name}: {after}"
        if words[0] == "run" and re.fullmatch(r"[a-z0-9_]+", (*words, "")[1]):
            assert words[1] == "all" or find_notebook(words[1]), words


def test_commands_are_read_whole_and_with_what_they_require() -> None:
    words = [word for words in commands_of(text_of(REPO / "README.md")) for word in words]
    assert "data.image_root=my/images" in words  # stands on a continuation line
    for wrong, reason in (
        (["run", "06", "--set", "evaluation.judge=phrases"], "profile"),
        (["run", "--profile", "demo"], "name"),
        (["data", "check", "out/", "--picture-root", "x"], "--picture-root"),
    ):
        with pytest.raises(typer.TyperException, match=reason):
            parse(wrong)


def test_harmful_content_is_announced() -> None:
    """On the README, and on top of every notebook that shows requests or answers."""
    assert re.search(r"content warning", text_of(REPO / "README.md"), re.IGNORECASE)
    for path in sorted((REPO / "notebooks").rglob("*.ipynb")):
        cells = json.loads(text_of(path))["cells"]
        code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        if "safe_text" in code or "safe_image" in code:
            first = "".join(cells[0]["source"])
            assert "**Content warning.**" in first, path.name


def test_the_pages_are_looked_through() -> None:
    names = {path.name for path in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "GLOSSARY.md", "architecture.md"} <= names
    assert sum(text_of(page).count("spavl_lib/") for page in PAGES) > 5
