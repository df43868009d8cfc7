"""Old names: refused in profiles and overrides, translated in the records of old runs."""

import shutil
from pathlib import Path

import pytest
import yaml

from spavl_lib import cli, rerun
from spavl_lib.config import from_dict, load_config
from spavl_lib.config.loading import RENAMED
from spavl_lib.errors import InputError
from spavl_lib.runs.files import read_json
from spavl_lib.runs.stage import Run

HERE = Path(__file__).parent
OLD_PROFILES = {
    "smoke": [
        "dpo.preset = 'seed' is now called 'original'",
        "ppo.preset = 'seed' is now called 'original'",
    ],
    "colab": ["data.source = 'seed_json' is now called 'original'"],
    "demo": ["reward.seed_form is now called reward.original_form"],
}
OLD_VALUES = {
    "data.source": "seed_json",
    "dpo.preset": "seed",
    "ppo.preset": "seed",
    "reward.seed_form": "true",
}


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of an older version: reward model with `seed_form`, DPO with `preset: seed`."""
    monkeypatch.setenv("SPAVL_RUNS", str(tmp_path))
    return shutil.copytree(HERE / "old_run/before", tmp_path / "before")


def test_every_old_name_is_tried_here() -> None:
    assert {key.partition("=")[0] for key in RENAMED} == OLD_VALUES.keys()


@pytest.mark.parametrize("name", OLD_PROFILES)
def test_an_old_profile_is_refused_and_told_the_new_names(name: str) -> None:
    path = HERE / f"old_profiles/{name}.yaml"
    with pytest.raises(InputError) as refused:
        load_config(str(path))
    heading, *lines = str(refused.value).replace(": ", "\n", 1).splitlines()
    assert heading == str(path)
    assert [line.strip() for line in lines if "problems" not in line] == OLD_PROFILES[name]


@pytest.mark.parametrize("key", OLD_VALUES)
def test_an_old_override_is_refused_dotted_or_nested(key: str) -> None:
    section, name = key.split(".")
    for overrides in ({key: OLD_VALUES[key]}, {section: {name: OLD_VALUES[key]}}):
        with pytest.raises(InputError, match=f"{key} .*is now called .*original"):
            load_config("smoke", overrides)


def test_the_new_names_that_errors_give_are_accepted() -> None:
    for new in RENAMED.values():
        key, _, value = new.partition("=")
        load_config("smoke", {key: value or "true"})


def test_an_old_record_is_read_under_the_new_names(old_run: Path) -> None:
    for stage in ("reward", "dpo"):
        page = yaml.safe_load((old_run / stage / "config.yaml").read_text(encoding="utf-8"))
        before = yaml.safe_dump(page)
        config = from_dict(page)
        assert yaml.safe_dump(page) == before  # the caller's values are left alone
        assert config.data.source == "original"
        assert config.reward.original_form == (stage == "reward")
        assert config.dpo.preset == ("original" if stage == "dpo" else "ours")
        assert from_dict(config.to_dict()) == config


def test_an_old_run_opens_in_the_report(old_run: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(old_run)])
    assert not ended.value.code
    page = (old_run / "report.html").read_text(encoding="utf-8")
    assert "dpo.preset=original" in page and "data.source=original" in page  # in its command
    assert "seed_json" not in page and "preset=seed" not in page


def test_an_old_runs_conditions_can_be_checked(old_run: Path) -> None:
    lines: list[str] = []
    result = rerun.rerun(old_run, check="conditions", say=lines.append)
    assert result["records"] == {"reward": [], "dpo": []}
    assert any("changed since then: code_sha256" in line for line in lines)
    assert read_json(old_run / "rerun.json")["equal"] is True


def test_an_old_run_goes_on_under_the_new_names(old_run: Path) -> None:
    overrides = {
        "data": {"source": "original", "path": "rows", "image_root": "rows/images"},
        "data.train_rows": 16, "data.validation_rows": 8, "dpo.preset": "original",
        "dpo.max_steps": 2,
    }  # fmt: skip
    Run(load_config("smoke", overrides, run_name="before")).stage("dpo").check_config()
    changed = load_config("smoke", overrides | {"dpo.beta": 0.5}, run_name="before")
    with pytest.raises(InputError, match=r"other settings:\n  dpo.beta: 0.1 -> 0.5\n  use"):
        Run(changed).stage("dpo").check_config()
