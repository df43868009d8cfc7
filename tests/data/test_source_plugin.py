"""A data source from another package: found by its entry point, then loaded, hashed and checked."""

from pathlib import Path

import pytest

from spavl_lib.config import load_config
from spavl_lib.data.check import check
from spavl_lib.data.explore import make_data_stage
from spavl_lib.data.fingerprint import source_hashes
from spavl_lib.data.load import (
    EVAL_SETS,
    SOURCES,
    Source,
    eval_sets,
    load_preferences,
    load_prompts,
    load_truth,
    register_source,
)
from spavl_lib.errors import InputError
from spavl_lib.runs.stage import Run
from tests.helpers import files_of
from tests.packages import install

# A package with a source is two files: this module, and a pyproject.toml that names its class.
PACKAGE = ("forum_source", "spavl.sources forum = forum_source:Forum")
MODULE = '''
from pathlib import Path

from datasets import Dataset

from spavl_lib.data.problems import Loaded, find_problems, without_bad_rows
from spavl_lib.data.schema import PREFERENCE_COLUMNS, features
from spavl_lib.data.load import Source


class Forum(Source):
    """Pairs from lines `question | chosen | rejected`."""

    def files(self, split):
        return [self.folder / f"{split}.txt"]

    def preferences(self, split):
        [path] = self.files(split)
        rows = []
        for number, line in enumerate(path.read_text().splitlines()):
            row = dict.fromkeys(PREFERENCE_COLUMNS, "") | {"image": None, "id": f"{split}/{number}"}
            fields = zip(("prompt", "chosen", "rejected"), line.split("|"), strict=True)
            rows.append(row | {name: text.strip() for name, text in fields})
        columns = {name: [row[name] for row in rows] for name in PREFERENCE_COLUMNS}
        table = Dataset.from_dict(columns, features=features(PREFERENCE_COLUMNS))
        problems = find_problems(table, lambda i: f"{path}:{i}", preference=True, images=False)
        return without_bad_rows(table, problems, str(path), self.config.on_bad_rows)
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch):
    """Forget what a test registers."""
    monkeypatch.setattr(SOURCES, "known", dict(SOURCES.known))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pairs to train on, and four held out."""
    folder = tmp_path / "posts"
    folder.mkdir()
    for split, count in (("train", 12), ("validation", 4)):
        lines = [f"Is {split} {i} safe? | Ask first. {i} | Of course. {i}" for i in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(lines))
    return folder


def config_of(folder: Path, **changes: object):
    overrides = {"data.source": "forum", "data.path": str(folder)} | changes
    return load_config("smoke", overrides, run_name="r")


def test_a_package_adds_a_source(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", *PACKAGE, MODULE, monkeypatch)
    assert SOURCES.names() == ["datasets", "forum", "hub_layout", "mini", "original"]
    config = config_of(folder, **{"data.train_rows": 5, "data.validation_rows": 0})
    rows = load_preferences(config.data, "train")
    assert len(rows) == 5 and len(load_preferences(config.data, "validation")) == 4
    assert rows[0]["prompt"].startswith("Is train") and rows[0]["chosen"].startswith("Ask first.")
    # The evaluation sets, and what is known about them, are those of mini.
    assert eval_sets(config.data, held_out_drawings=False) == list(EVAL_SETS)
    prompts = load_prompts(config.data, "harm")
    assert len(prompts) == config.data.test_rows and prompts[0]["id"] in load_truth(config.data)
    before = source_hashes(config.data, ("train", "validation", "harm"))
    (folder / "train.txt").write_text("Is it? | Ask. | Yes.")
    after = source_hashes(config.data, ("train", "validation", "harm"))
    assert {k for k in before if before[k] != after[k]} == {"data/train"}


def test_the_data_stage_and_the_checker_take_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", *PACKAGE, MODULE, monkeypatch)
    config = config_of(folder, **{"data.train_rows": 0, "data.validation_rows": 0})
    stage = Run(config, root=tmp_path / "runs").stage("data")
    summary = make_data_stage(config, stage)
    assert (summary["train"]["rows"], summary["validation"]["rows"]) == (12, 4)
    written = files_of(stage.path)
    assert make_data_stage(config, stage) == summary and files_of(stage.path) == written
    (folder / "train.txt").write_text("Is it? | Yes. | Yes.\nIs it? | No. | Yes.")
    report = check(str(folder), source="forum")
    assert report["problems"] == 1 and report["splits"]["train"]["rows"] == 1
    assert "train.txt:0 rejected: equal to chosen" in report["splits"]["train"]["problems"][0]
    (folder / "train.txt").write_text("Is it? | No. | Yes.")
    with pytest.raises(InputError, match="'forum' does not record who gave which answer"):
        load_preferences(config_of(folder, **{"data.answer_sources": ["gpt"]}).data, "train")


def test_an_unknown_source_is_refused_with_the_nearest_name(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_preferences(config_of(folder, **{"data.source": "hub_layuot"}).data, "train")
    assert str(caught.value) == (
        "data.source: unknown data source 'hub_layuot'; did you mean 'hub_layout'? "
        "(known: datasets, hub_layout, mini, original)"
    )


def test_a_package_that_does_not_load_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", *PACKAGE, "import nothing_of_that_name", monkeypatch)
    with pytest.raises(InputError, match="cannot load data source 'forum' from forum_source:Forum"):
        load_preferences(config_of(folder).data, "train")


def test_a_name_stands_for_one_source() -> None:
    with pytest.raises(InputError, match="data source 'mini' exists already"):
        register_source("mini")(type("Other", (Source,), {}))
