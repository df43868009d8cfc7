"""Settings of stages from other packages: checked like the built-in sections, by the same rules."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, PositiveFloat

from spavl_lib import stages
from spavl_lib.config import from_dict, load_config, section
from spavl_lib.errors import InputError


@section("plugins.mytrainer")
class MyTrainerConfig:
    """Settings of a trainer, written as the built-in sections are."""

    steps: int
    beta: PositiveFloat = 0.1
    names: tuple[str, ...] = ("a",)
    half: bool = False

    def contradictions(self) -> Iterator[str]:
        if self.half and self.beta > 1:
            yield "half needs beta up to 1"


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """Settings of a stage that knows nothing of pydantic but a bound."""

    size: Annotated[int, Field(ge=1)] = 2
    mode: Literal["fast", "slow"] = "fast"


@dataclasses.dataclass
class OpenConfig:
    """A dataclass that is not frozen."""

    size: int = 2


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_registered", {})
    for name, settings in [
        ("mytrainer", MyTrainerConfig), ("plain", PlainConfig), ("open", OpenConfig),
        ("bare", None),
    ]:  # fmt: skip
        keys = ("data", "model", f"plugins.{name}")
        spec = stages.StageSpec(name=name, module="m", config_keys=keys, settings=settings)
        stages.register(spec)


def test_a_section_is_found_by_the_name_of_its_stage() -> None:
    config = load_config("smoke", {"plugins.mytrainer.steps": "3"})
    assert config.section("dpo") is config.dpo
    assert config.section("mytrainer") == MyTrainerConfig(steps=3)
    assert config.section("plain") == load_config("smoke").section("plain")
    assert isinstance(config.section("plain"), PlainConfig)
    assert dataclasses.asdict(config.section("plain")) == dataclasses.asdict(PlainConfig())
    assert type(PlainConfig(size=0)) is PlainConfig  # the plugin's own class is left alone
    assert config.section("open").size == 2


def test_plugin_settings_are_parsed_resolved_and_saved() -> None:
    overrides = {
        "plugins.mytrainer.beta": "2e-1", "plugins.mytrainer.names": "[x, y]",
        "plugins": {"mytrainer": {"half": "true", "steps": 4.0}}, "plugins.plain.size": "5",
    }  # fmt: skip
    config = load_config("smoke", overrides)
    assert config.section("mytrainer") == MyTrainerConfig(
        steps=4, beta=0.2, names=("x", "y"), half=True
    )
    assert config.plugins == {
        "mytrainer": {"steps": 4, "beta": 0.2, "names": ["x", "y"], "half": True},
        "plain": {"size": 5, "mode": "fast"},
    }
    saved = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert from_dict(saved) == config and hash(from_dict(saved)) == hash(config)
    assert load_config("smoke").plugins == {}


def test_plugin_settings_come_from_a_profile_too(tmp_path: Path) -> None:
    from spavl_lib.config import PROFILES

    path = tmp_path / "mine.yaml"
    text = (PROFILES / "smoke.yaml").read_text(encoding="utf-8")
    path.write_text(f"{text}\nplugins: {{plain: {{size: 7, mode: slow}}}}\n", encoding="utf-8")
    config = load_config(str(path), {"plugins.plain.mode": "fast"})
    assert dataclasses.asdict(config.section("plain")) == {"size": 7, "mode": "fast"}


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"mytrainer.steps": 1, "mytrainer.betta": 1},
         "unknown key 'plugins.mytrainer.betta'; did you mean 'plugins.mytrainer.beta'"),
        ({"mytrainer.beta": 1}, "missing plugins.mytrainer.steps: set a value"),
        ({"mytrainer.steps": 1, "mytrainer.beta": 0},
         "plugins.mytrainer.beta must be greater than 0, got 0"),
        ({"mytrainer.steps": 1, "mytrainer.beta": 2, "mytrainer.half": True},
         "plugins.mytrainer: half needs beta up to 1"),
        ({"plain.size": 0}, "plugins.plain.size must be greater than or equal to 1, got 0"),
        ({"plain.sice": 3}, "unknown key 'plugins.plain.sice'; did you mean 'plugins.plain.size'"),
        ({"plain.mode": "slwo"}, "got 'slwo'; did you mean 'slow'"),
        ({"open.size": True}, "plugins.open.size: expected a number, got True"),
        ({"mytrianer.beta": 1}, "unknown stage 'mytrianer'; did you mean 'mytrainer'"),
        ({"bare.size": 1}, "stage 'bare' has no settings under `plugins`"),
        ({"dpo.beta": 1}, "stage 'dpo' has no settings under `plugins`"),
        ({"plain": 3}, "plugins.plain must be a valid dictionary, got 3"),
    ],
)  # fmt: skip
def test_wrong_plugin_settings_are_refused_when_the_config_is_loaded(
    overrides: dict, reason: str
) -> None:
    with pytest.raises(InputError) as refused:
        load_config("smoke", {f"plugins.{key}": value for key, value in overrides.items()})
    assert reason in str(refused.value)


def test_a_stage_without_settings_has_no_section() -> None:
    for name in ("bare", "inference"):
        with pytest.raises(InputError, match="has no settings under"):
            load_config("smoke").section(name)
    with pytest.raises(InputError, match="unknown stage 'seed'"):
        load_config("smoke").section("seed")


def test_a_record_opens_where_its_plugin_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_config("smoke", {"plugins.plain.size": 5}).to_dict()
    monkeypatch.setattr(stages, "_registered", {})
    assert from_dict(saved).plugins == {"plain": {"size": 5, "mode": "fast"}}
