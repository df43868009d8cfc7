"""One set of exact pins: pyproject, constraints, environment.yml and what is installed agree."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

PIN = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)")
# Hosted notebooks have versions of their own, which an exact pin would replace under the kernel.
HOSTED = {"ipykernel", "ipython", "pandas", "torch"}


def parsed(lines: list[str]) -> dict[str, str]:
    """Package -> version; anything but an exact pin fails."""
    pins = {}
    for line in lines:
        match = PIN.fullmatch(line)
        assert match, f"{line!r} is not an exact pin"
        assert match[1] not in pins, f"{match[1]} is pinned twice"
        pins[match[1]] = match[2]
    return pins


@pytest.fixture(scope="module")
def project() -> dict:
    path = Path(__file__).parents[1] / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]


def constraints() -> list[str]:
    page = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    return [line for line in page.splitlines() if not line.startswith("#")]


def name_of(line: str) -> str:
    return re.split("[=<>]", line)[0]


def pins_of(project: dict, *extras: str) -> dict[str, str]:
    """The exact pin of every dependency, and of what the extras name."""
    lines = [line for line in project["dependencies"] if name_of(line) not in HOSTED]
    for extra in extras:
        own = project["optional-dependencies"][extra]
        lines += [line for line in own if not line.startswith("spavl-workbook")]
    return parsed(lines + constraints())


def test_every_dependency_is_pinned_exactly(project: dict) -> None:
    names = [name_of(line) for line in project["dependencies"]]
    assert names == sorted(names) and set(names) <= set(pins_of(project))
    extras = project["optional-dependencies"]
    names = "lab dev site e2e deepspeed tensorboard serving judge-head laptop drawings"
    assert set(extras) == set(names.split()) and "spavl-workbook[lab,laptop]" in extras["dev"]
    pins_of(project, *names.removesuffix(" drawings").split())


def test_what_a_hosted_notebook_brings_is_bounded_and_not_pinned(project: dict) -> None:
    lines = {name_of(line): line for line in project["dependencies"]}
    assert set(parsed(constraints())) == HOSTED
    assert not {"jupyterlab", "jupyter-server"} & set(lines)
    for name in HOSTED:
        floor = re.fullmatch(rf"{name}>=([0-9.]+)", lines[name])
        assert floor, lines[name]
        least, pinned = (
            [int(n) for n in v.split(".")] for v in (floor[1], parsed(constraints())[name])
        )
        assert least <= pinned


def test_the_conda_environment_repeats_the_pins_and_says_why(repo: Path, project: dict) -> None:
    text = (repo / "environment.yml").read_text(encoding="utf-8")
    page = yaml.safe_load(text)
    [pip] = [entry["pip"] for entry in page["dependencies"] if isinstance(entry, dict)]
    assert pip[-1] == "-e ."
    assert parsed(pip[:-1]) == pins_of(project, "lab", "dev")
    python = next(e for e in page["dependencies"] if str(e).startswith("python="))
    assert project["requires-python"].startswith(f">={python.split('=')[1]}")
    for line in text.splitlines():
        if "==" in line:
            assert re.search(r"  # \w+", line), f"{line.strip()} does not say who needs it"


def test_what_is_installed_is_what_is_pinned(project: dict) -> None:
    """A local part, as in 2.13.0+cpu, names a build of the same version."""
    pins = pins_of(project, "lab", "dev")
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in pins}
    assert installed == pins


def test_versions_are_above_the_known_holes(project: dict) -> None:
    """The first release of each without a published advisory that concerns what we do."""
    floors = {
        "torch": (2, 10),
        "transformers": (5, 3),
        "pillow": (12, 3),
        "datasets": (5, 2),
        "jupyter-server": (2, 20),
        "nbconvert": (7, 17, 1),
    }
    pins = pins_of(project, "lab")
    for name, floor in floors.items():
        assert tuple(map(int, pins[name].split("."))) >= floor, name


def test_python_is_the_one_we_say(repo: Path, project: dict) -> None:
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11)" in (repo / "Makefile").read_text(encoding="utf-8")


def test_everything_we_import_is_declared(repo: Path, project: dict) -> None:
    """A package that comes only as somebody else's dependency may go with it."""
    import ast
    import sys

    names = {"yaml": "pyyaml", "PIL": "pillow", "jupyter_client": "jupyter-client"}
    names |= {"huggingface_hub": "huggingface-hub"}
    names |= {"IPython": "ipython", "zmq": "jupyter-client", "markupsafe": "jinja2"}  # parts of it
    declared = pins_of(project)
    optional = {"vllm", "deepspeed", "resvg_py", "gguf"}
    missing = set()
    for path in (repo / "spavl_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top in {"spavl_lib", *optional}:
                    continue
                if names.get(top, top) not in declared:
                    missing.add(f"{path.relative_to(repo)} imports {top}")
    assert not missing
