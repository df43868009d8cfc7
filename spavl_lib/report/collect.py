"""Provenance read from a run folder: stages, settings, versions, and commands to repeat the run."""

import contextlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from spavl_lib.config import (
    current_names,
    flatten,
    load_config,
    profile_argument,
    profile_names,
)
from spavl_lib.errors import SpavlError
from spavl_lib.runs.files import read_jsonl
from spavl_lib.stages import stage_names

_OWN_OPTIONS = ("run_name", "profile")  # settings that have their own option in a command


@dataclass
class StagePage:
    """The contents of one stage's folder. The field of a missing file is empty."""

    name: str
    path: Path
    done: bool
    manifest: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    @property
    def started(self) -> bool:
        """Whether the folder holds any of the stage's files."""
        return bool(self.manifest or self.config or self.rows or self.done)

    @property
    def wall_time_s(self) -> float | None:
        """Seconds of work in all attempts together; None if the last attempt was not timed."""
        parts = [self.manifest.get(k) for k in ("wall_time_before_s", "wall_time_s")]
        if not isinstance(parts[1], int | float):
            return None
        return sum(p for p in parts if isinstance(p, int | float))


@dataclass(frozen=True)
class Setting:
    """One key of the config with its value and the profile's value."""

    key: str
    value: Any
    profile_value: Any
    changed: bool


def read_stages(run_path: Path, problems: list[str]) -> list[StagePage]:
    """Read the folder of every known stage, then every other folder with logged steps.

    Args:
        run_path: The run's folder.
        problems: One line is appended for each file that cannot be read.
    """
    others = sorted(
        folder.name
        for folder in run_path.iterdir()
        if folder.is_dir()
        and folder.name not in stage_names()
        and (folder / "metrics.jsonl").is_file()
    )
    return [_read_stage(run_path / name, problems) for name in (*stage_names(), *others)]


def _read_stage(path: Path, problems: list[str]) -> StagePage:
    rows = [row for row in read_jsonl(path / "metrics.jsonl") if isinstance(row, dict)]
    return StagePage(
        path.name,
        path,
        (path / "summary.json").is_file(),
        _mapping(path / "manifest.json", problems),
        current_names(_mapping(path / "config.yaml", problems)),
        rows,
    )


def _mapping(path: Path, problems: list[str]) -> dict:
    if not path.is_file():
        return {}
    name = f"{path.parent.name}/{path.name}"
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        problems.append(f"{name} cannot be read.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} does not hold a mapping.")
        return {}
    return value


def run_config(stages: list[StagePage]) -> dict:
    """The config of the last stage that has one."""
    return next((s.config for s in reversed(stages) if s.config), {})


def settings(config: dict) -> list[Setting]:
    """Each setting with the profile's value. If the profile is unknown, no setting is `changed`."""
    profile = str(config.get("profile", ""))
    profile_values: dict[str, Any] | None = None
    if profile in profile_names():
        with contextlib.suppress(SpavlError):
            profile_values = flatten(load_config(profile).to_dict())
    rows = []
    for key, value in flatten(config).items():
        default = None if profile_values is None else profile_values.get(key)
        changed = profile_values is not None and key not in _OWN_OPTIONS and value != default
        rows.append(Setting(key, value, default, changed))
    return rows


@dataclass(frozen=True)
class Commands:
    """Shell commands that repeat a run."""

    run: str
    """Makes the run, or the part of it that is missing."""
    report: str
    rerun: str
    """Makes the complete stages again in another folder, and compares the results."""
    checkout: str | None
    """Gets the code of the run; None if its commit is unknown."""


def commands(run_name: str, config: dict, manifests: list[dict]) -> Commands:
    """Shell commands that repeat the run.

    Args:
        run_name: The run's name.
        config: The run's config, as `run_config` gives it.
        manifests: The manifests of the stages.
    """
    line = ["spavl", "run", "all"]
    if config.get("profile"):
        line += ["--profile", profile_argument(str(config["profile"]))]
    line += ["--run-name", run_name]
    for setting in settings(config):
        if setting.changed:
            line += ["--set", f"{setting.key}={_as_argument(setting.value)}"]
    commit = next((m["git_commit"] for m in reversed(manifests) if m.get("git_commit")), None)
    return Commands(
        run=shlex.join(line),
        report=shlex.join(["spavl", "report", run_name]),
        rerun=shlex.join(["spavl", "rerun", run_name]),
        checkout=shlex.join(["git", "checkout", str(commit)]) if commit else None,
    )


# Files and folders of a stage that readers may want to open, and their titles.
_FILES = {
    "executed.ipynb": "executed notebook",
    "failed.ipynb": "notebook up to its error",
    "metrics.jsonl": "log of steps",
    "summary.json": "summary",
    "samples.jsonl": "scores of held-out pairs",
    "rollouts.jsonl": "sampled responses",
    "model/README.md": "model card",
    "base": "responses of the base model",
    "dpo": "responses of DPO",
    "ppo": "responses of PPO",
    "rloo": "responses of RLOO",
    "grpo": "responses of GRPO",
    "kto": "responses of KTO",
    "online_dpo": "responses of online DPO",
    "rounds": "pairs of each round",
    "verdicts": "verdict on every response",
    "figures": "figures",
    "config.yaml": "settings",
    "manifest.json": "manifest",
}


def files(run_path: Path, stages: list[StagePage]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The run's files to open: stage -> (title, path relative to the run's folder) of each file.

    Args:
        run_path: The run's folder.
        stages: Its stages. The name of a stage in a path is quoted as in a URL.
    """
    found = [("", [("all measured numbers", "metrics.json")])]
    found = found if (run_path / "metrics.json").is_file() else []
    for stage in stages:
        here = [
            (title, f"{quote(stage.name)}/{name}")
            for name, title in _FILES.items()
            if (stage.path / name).exists()
        ]
        found += [(stage.name, here)] if here else []
    return found


def _as_argument(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def disagreements(stages: list[StagePage]) -> list[str]:
    """One sentence for each fact, such as the commit, that differs between stages but should not.

    A sentence also warns of uncommitted changes.
    """
    sentences = []
    manifests = [s.manifest for s in stages if s.manifest]
    if len({m.get("git_commit") for m in manifests}) > 1:
        sentences.append("The stages were made at different commits.")
    if any(m.get("git_dirty") for m in manifests):
        sentences.append(
            "The checkout had uncommitted changes, so its commit does not identify the code."
        )
    if len({json.dumps(m.get("versions"), sort_keys=True) for m in manifests}) > 1:
        sentences.append("The stages were made with different versions of some package.")
    if len({json.dumps(m.get("seed")) for m in manifests}) > 1:
        sentences.append("The stages were made with different seeds.")
    return sentences
