"""A trainer from another package: three files, and every command knows the new stage."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spavl_lib import cli, pipeline, stages
from spavl_lib.config import load_config
from spavl_lib.errors import InputError
from spavl_lib.notebook.execute import find_notebook
from spavl_lib.runs import maker
from spavl_lib.runs.files import read_json, read_jsonl
from spavl_lib.runs.stage import Run
from spavl_lib.stages import StageSpec, register
from tests.packages import install

# The recipe of CONTRIBUTING.md, "Add a trainer".
PACKAGE = ("my_trainer", "spavl.stages mine = my_trainer")
MODULE = '''
"""Minimises the square of one number, in place of a model."""

import dataclasses
from pathlib import Path

from spavl_lib.runs.maker import stage_maker
from spavl_lib.stages import StageSpec, register
from spavl_lib.trainers.inputs import training_inputs


@dataclasses.dataclass(frozen=True)
class MySettings:
    steps: int = 4
    learning_rate: float = 0.25


register(
    StageSpec(
        name="mine", module=__name__, config_keys=("data", "model", "seed"), settings=MySettings,
        notebook=str(Path(__file__).with_name("my_trainer.ipynb")), trains=True, policy=False,
    )
)


@stage_maker("mine", inputs=training_inputs, polls_stop=True)
def train_mine(config, stage, flag, *, live=None):
    settings, weight = config.section("mine"), 1.0
    for step in range(1, settings.steps + 1):
        weight -= settings.learning_rate * 2 * weight
        stage.log({"step": step, "loss": weight**2})
    return {"steps": settings.steps, "loss": weight**2}
'''
NOTEBOOK = """\
from spavl_lib import pipeline
from spavl_lib.notebook.session import open_stage

config, stage = open_stage("mine", profile, seed=seed, run_name=run_name, overrides=overrides)
pipeline.train("mine", config, stage)"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on Python's path, here and in kernels; plugins are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(stages, "_registered", {})
    monkeypatch.setattr(maker, "_MAKERS", dict(maker._MAKERS))
    stages._load_plugins.cache_clear()
    yield folder
    stages._load_plugins.cache_clear()


@pytest.fixture
def package(folder: Path, make_notebook: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the trainer of the recipe."""
    install(folder, *PACKAGE, MODULE, monkeypatch)
    make_notebook("my_trainer", NOTEBOOK).rename(folder / "my_trainer.ipynb")
    assert sum(path.is_file() for path in folder.rglob("*")) == 3
    return folder


@pytest.fixture
def spavl(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs a command in this process: its exit code and the error it printed."""

    def call(words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(words.split())
        return caught.value.code, capsys.readouterr().err

    return call


def test_a_package_adds_a_trainer(package: Path, runs: Path, spavl: Callable) -> None:
    train = "train mine --profile smoke --set plugins.mine.steps=6"
    assert spavl(train) == (0, "")
    stage = runs / "smoke" / "mine"
    assert read_json(stage / "summary.json") == {"steps": 6, "loss": 0.25**6}
    assert [row["step"] for row in read_jsonl(stage / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    manifest = read_json(stage / "manifest.json")
    assert manifest["config"]["plugins"] == {"mine": {"steps": 6, "learning_rate": 0.25}}
    assert any(name.startswith("data/train") for name in manifest["inputs"])

    # The complete stage is kept, also if a default is written out; other settings are refused.
    made = (stage / "summary.json").stat().st_mtime_ns
    assert spavl(f"{train} --set plugins.mine.learning_rate=0.25")[0] == 0
    assert (stage / "summary.json").stat().st_mtime_ns == made
    code, error = spavl("train mine --profile smoke")
    assert code == 2 and "plugins.mine.steps: 6 -> 4" in error
    code, error = spavl("train mien --profile smoke")
    assert code == 2 and "did you mean 'mine'" in error

    assert spavl("report smoke")[0] == 0
    page = (runs / "smoke" / "report.html").read_text(encoding="utf-8")
    assert '<th scope="row">mine</th>' in page
    assert "Training curves of Mine over 6 steps" in page
    assert "--set plugins.mine.steps=6" in page


@pytest.mark.slow
def test_its_notebook_is_run_by_its_name(package: Path, runs: Path, spavl: Callable) -> None:
    notebook = package / "my_trainer.ipynb"
    assert find_notebook("mine") == find_notebook("my_trainer.ipynb") == notebook
    config = load_config("smoke", {"plugins.mine.steps": 3})
    assert pipeline.run_command("mine", config) == (
        "spavl run mine --profile smoke --set plugins.mine.steps=3 "
        "--set plugins.mine.learning_rate=0.25"
    )
    code, error = spavl("run mine --profile smoke --set plugins.mine.steps=3")
    assert code == 0, error
    assert (runs / "smoke" / "mine" / "executed.ipynb").is_file()
    assert Run(config).stage("mine").summary["steps"] == 3
    code, error = spavl("run mien --profile smoke")
    assert code == 2 and "did you mean 'mine'" in error and "06_safety_helpfulness" in error


def test_a_plugin_stands_before_inference_and_answers_only_if_it_has_a_policy(
    package: Path,
) -> None:
    names = stages.stage_names()
    assert names.index("mine") == names.index("inference") - 1
    assert "mine" in stages.trainers() and "mine" not in stages.policies()


def test_a_package_that_does_not_load_is_named(
    folder: Path, spavl: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder, *PACKAGE, "import no_such_module_here", monkeypatch)
    code, error = spavl("train dpo --profile smoke")
    assert code == 2
    assert "cannot load stage 'mine' from my_trainer: ModuleNotFoundError" in error
    assert "uninstall the package" in error
    assert spavl("--help")[0] == 0


@pytest.mark.usefixtures("folder")
def test_a_name_is_given_once_and_a_module_loaded_again_replaces_its_stage() -> None:
    spec = StageSpec(name="mine", module="a", config_keys=("data",))
    register(spec)
    register(StageSpec(name="mine", module="a", config_keys=("data", "seed")))
    assert stages.find("mine").config_keys == ("data", "seed")
    for name in ("mine", "dpo"):
        with pytest.raises(InputError, match=f"stage '{name}' exists already"):
            register(StageSpec(name=name, module="b", config_keys=()))
