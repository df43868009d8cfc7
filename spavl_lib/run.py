"""Run folders: one per run, one subfolder per stage, files that appear whole.

`runs/<run_name>/<stage>/` holds config.yaml, manifest.json, metrics.jsonl, figures/ and, last of
all, summary.json: a stage is done when that stands.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from spavl_lib.config import Config
from spavl_lib.errors import BusyError, InputError

STAGES = ("data", "reward", "ppo", "dpo", "inference", "evaluation", "scaling")
PACKAGES = (
    "torch transformers trl peft accelerate bitsandbytes datasets papermill numpy pillow "
    "safetensors"
).split()
# Settings that may differ between the making of a stage and its use.
FREE_KEYS = ("profile", "run_name", "launch.num_processes", "dpo.save_steps", "reward.save_steps")
# What of the config a stage's result depends on; a change elsewhere leaves it done.
STAGE_KEYS = {
    "data": ("data",),
    "reward": ("data", "model", "reward", "seed"),
    "dpo": ("data", "model", "dpo", "seed"),
    "inference": ("data", "model", "dpo", "generation", "evaluation", "seed"),
    "evaluation": ("data", "model", "dpo", "generation", "evaluation", "seed"),
}


def repo_root() -> Path:
    """The checkout this process works in, or the current folder outside of one."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "spavl' in project.read_text(encoding="utf-8"):
            return folder
    return Path.cwd()


def runs_root() -> Path:
    """Where runs go: $SPAVL_RUNS, or runs/ in the checkout."""
    return Path(os.environ.get("SPAVL_RUNS", "") or repo_root() / "runs")


def write_text(path: Path, text: str) -> None:
    """Write aside, flush, rename: the file is the old or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """JSON of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file, none if it is not there; a torn last line is dropped.

    Raises:
        InputError: Another line is no JSON: the file is damaged.
    """
    if not path.is_file():
        return []
    # Not splitlines(): text may hold line separators of its own.
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from error
    with contextlib.suppress(ValueError):
        rows += [json.loads(last)] if last else []
    return rows


def peak_memory_gib() -> float:
    """Peak resident memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name() -> str:
    """The accelerator's name, or the CPU's with its core count."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def _git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=repo_root(), capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def environment() -> dict:
    """What this process runs on: commit, versions, device."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "git_commit": _git("rev-parse", "HEAD") or None,
        "git_dirty": bool(_git("status", "--porcelain")) if _git("rev-parse", "HEAD") else None,
        "versions": versions,
        "device": device_name(),
    }


class Stage:
    """One stage's folder inside a run."""

    def __init__(self, run: "Run", name: str):
        if name not in STAGES:
            raise ValueError(f"unknown stage {name!r}, known: {STAGES}")
        self.run, self.name, self.path = run, name, run.path / name
        self.config = run.config

    @property
    def done(self) -> bool:
        """Whether the stage's summary stands."""
        return (self.path / "summary.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether the folder holds work: anything beyond what opening a stage writes."""
        paper = {"config.yaml", "manifest.json", "figures", "contrast"}
        notebooks = {"executed.ipynb", "failed.ipynb"}
        return any(
            path.is_file() and not any(part.startswith(".") for part in parts)
            for path in self.path.rglob("*")
            if (parts := path.relative_to(self.path).parts)[0] not in paper | notebooks
        )

    @property
    def summary(self) -> dict:
        """The stage's summary."""
        return read_json(self.path / "summary.json")

    @property
    def metrics_path(self) -> Path:
        """One JSON line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def figures(self) -> Path:
        """Folder of the stage's PNG files."""
        folder = self.path / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check_config(self) -> None:
        """Refuse to go on from work made under other settings.

        Raises:
            InputError: Names each changed key, its old and its new value.
        """
        saved = self.path / "config.yaml"
        if not saved.is_file() or not self.begun:
            return
        old = _flat(yaml.safe_load(saved.read_text(encoding="utf-8")))
        new = _flat(self.config.to_dict())
        keys = STAGE_KEYS.get(self.name, ())
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
            and key not in FREE_KEYS
            and (not keys or key.split(".")[0] in keys)
        ]
        if changed:
            raise InputError(
                f"{self.path} was made with other settings:\n  "
                + "\n  ".join(changed)
                + "\n  use another run_name, or delete that folder"
            )

    @contextlib.contextmanager
    def work(self, inputs: dict[str, str] | None = None) -> Iterator["Stage"]:
        """Hold the stage for this process; time it, and seal its manifest when the work ends.

        Args:
            inputs: Name -> sha256 of what the stage reads.

        Raises:
            BusyError: A live process holds it.
            InputError: The folder was made with other settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with _lock(self.path / ".lock", self.run.name):
            self.check_config()
            write_text(
                self.path / "config.yaml",
                yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True),
            )
            manifest = {
                "stage": self.name,
                "run_name": self.run.name,
                "profile": self.config.profile,
                "seed": self.config.seed,
                "inputs": inputs or {},
                **environment(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            before = read_json(self.path / "manifest.json") if self._has_manifest() else {}
            manifest["wall_time_before_s"] = round(
                before.get("wall_time_before_s", 0.0) + before.get("wall_time_s", 0.0), 2
            )
            write_json(self.path / "manifest.json", manifest)
            started = time.perf_counter()
            try:
                yield self
            except BaseException:
                if not self.begun:  # nothing came of it: leave nothing behind
                    self._remove_traces()
                    raise
                self._seal(manifest, started)
                raise
            self._seal(manifest, started)

    def _seal(self, manifest: dict, started: float) -> None:
        manifest["wall_time_s"] = round(time.perf_counter() - started, 2)
        manifest["peak_memory_gib"] = round(peak_memory_gib(), 3)
        write_json(self.path / "manifest.json", manifest)

    def _remove_traces(self) -> None:
        for name in ("config.yaml", "manifest.json", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
            self.run.path.rmdir()

    def _has_manifest(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def log(self, row: dict) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def finish(self, summary: dict) -> None:
        """Write the summary: the stage is done."""
        write_json(self.path / "summary.json", summary)


class Run:
    """One run's folder."""

    def __init__(self, config: Config, root: Path | None = None):
        name = config.run_name or config.profile
        if name != Path(name).name or name.startswith("."):
            raise InputError(f"run_name {name!r} must be a plain folder name")
        self.config, self.name = config, name
        self.path = (root or runs_root()) / name

    def stage(self, name: str) -> Stage:
        """One of its stages, made or not."""
        return Stage(self, name)

    def done_stages(self) -> list[Stage]:
        """Stages whose summary stands."""
        return [s for s in map(self.stage, STAGES) if s.done]


@contextlib.contextmanager
def _lock(path: Path, run_name: str) -> Iterator[None]:
    handle = path.open("a+", encoding="utf-8")
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise BusyError(
                f"{path.parent} is in use by {holder}; wait for it, or use another run_name"
            ) from None
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()} (run {run_name})")
        handle.flush()
        yield
    finally:
        handle.close()


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in (values or {}).items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
