"""What a run folder says of its making: stages, settings, versions, and how to do it again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spavl_lib.config import load_config, profile_names
from spavl_lib.errors import SpavlError
from spavl_lib.runs.files import read_jsonl
from spavl_lib.stages import stage_names

_HERE = ("run_name", "profile")  # said by the command's own options


@dataclass
class StagePage:
    """One stage as its folder tells it; what it lacks is empty."""

    name: str
    path: Path
    done: bool
    manifest: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    @property
    def started(self) -> bool:
        """Whether there is anything of it."""
        return bool(self.manifest or self.config or self.rows or self.done)

    @property
    def wall_time_s(self) -> float | None:
        """Seconds of work over all attempts, if any was timed."""
        parts = [self.manifest.get(k) for k in ("wall_time_before_s", "wall_time_s")]
        if not isinstance(parts[1], int | float):
            return None
        return sum(p for p in parts if isinstance(p, int | float))


@dataclass(frozen=True)
class Setting:
    """One key of the config beside its profile's value."""

    key: str
    value: Any
    profile_value: Any
    changed: bool


def read_stages(run_path: Path, problems: list[str]) -> list[StagePage]:
    """Every known stage, then any other folder that logs steps.

    Args:
        run_path: The run's folder.
        problems: Gets a line for each file that cannot be read.
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
        _mapping(path / "config.yaml", problems),
        rows,
    )


def _mapping(path: Path, problems: list[str]) -> dict:
    if not path.is_file():
        return {}
    where = f"{path.parent.name}/{path.name}"
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        problems.append(f"{where} cannot be read")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{where} holds no mapping")
        return {}
    return value


def run_config(stages: list[StagePage]) -> dict:
    """The settings of the last stage that has any."""
    return next((s.config for s in reversed(stages) if s.config), {})


def flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def settings(config: dict) -> list[Setting]:
    """Each setting beside what the shipped profile says; none differs if it is not shipped."""
    profile = str(config.get("profile", ""))
    shipped: dict[str, Any] | None = None
    if profile in profile_names():
        try:
            shipped = flat(load_config(profile).to_dict())
        except SpavlError:
            shipped = None
    found = []
    for key, value in flat(config).items():
        default = None if shipped is None else shipped.get(key)
        changed = shipped is not None and key not in _HERE and value != default
        found.append(Setting(key, value, default, changed))
    return found


def commands(run_name: str, config: dict, manifests: list[dict]) -> list[str]:
    """Shell lines that make the run again."""
    line = ["spavl", "run", "all"]
    if config.get("profile"):
        line += ["--profile", str(config["profile"])]
    line += ["--run-name", run_name]
    for setting in settings(config):
        if setting.changed:
            line += ["--set", f"{setting.key}={_as_argument(setting.value)}"]
    lines = [shlex.join(line), shlex.join(["spavl", "report", f"runs/{run_name}"])]
    commit = next((m["git_commit"] for m in reversed(manifests) if m.get("git_commit")), None)
    return [shlex.join(["git", "checkout", str(commit)]), *lines] if commit else lines


def _as_argument(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def disagreements(stages: list[StagePage]) -> list[str]:
    """What should be one over all stages and is not, in sentences."""
    found = []
    manifests = [s.manifest for s in stages if s.manifest]
    if len({m.get("git_commit") for m in manifests}) > 1:
        found.append("The stages were made at different commits.")
    if any(m.get("git_dirty") for m in manifests):
        found.append("The checkout had uncommitted changes, so the commit alone does not tell all.")
    if len({json.dumps(m.get("versions"), sort_keys=True) for m in manifests}) > 1:
        found.append("The stages were made with different versions of some package.")
    if len({json.dumps(m.get("seed")) for m in manifests}) > 1:
        found.append("The stages were made with different seeds.")
    return found
