"""Run folders: one folder per run, one subfolder per stage.

`runs/<run_name>/<stage>/` holds config.yaml, manifest.json, metrics.jsonl and figures/. A stage is
complete once its summary.json exists.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from spavl_lib import machine, stages
from spavl_lib.config import (
    Config,
    current_names,
    defaults,
    flatten,
    load_config,
    profile_names,
    to_plain,
)
from spavl_lib.config.loading import from_dict
from spavl_lib.errors import BusyError, InputError
from spavl_lib.machine import device_name, is_main, peak_memory_gib, reset_peak_memory
from spavl_lib.runs import provenance
from spavl_lib.runs.files import read_json, write_json, write_text, writing
from spavl_lib.runs.files import read_jsonl as read_jsonl  # other modules import it from here
from spavl_lib.runs.paths import repo_root, runs_root
from spavl_lib.runs.signals import stop_on_signals
from spavl_lib.runs.text import refusal, short_path


def allowed_changes() -> tuple[str, ...]:
    """Settings and inputs that $SPAVL_ALLOW_CHANGE allows to change when a stage resumes."""
    return tuple(k for k in os.environ.get("SPAVL_ALLOW_CHANGE", "").split(",") if k)


def recorded_dtype(manifest: dict) -> machine.Dtype:
    """The precision that a manifest names, one of `machine.DTYPES`; empty if it names none.

    Older manifests hold the precision among the inputs, under torch's name.
    """
    old: dict[str, machine.Dtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return manifest.get("dtype") or old.get(manifest.get("inputs", {}).get("dtype"), "")


def recorded_config(stage_path: Path) -> Config:
    """The config in the manifest of a stage's folder.

    Raises:
        InputError: The manifest is missing, or cannot be read.
    """
    manifest = stage_path / "manifest.json"
    try:
        return from_dict(read_json(manifest)["config"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{manifest} cannot be read: {error}") from error


def has_model(stage_path: Path) -> bool:
    """Whether a stage's folder is complete and holds a trained model.

    Args:
        stage_path: The folder.
    """
    return (stage_path / "summary.json").is_file() and (stage_path / "model").is_dir()


# Environment variable of a notebook that started early: stages that others were making then.
AWAITED = "SPAVL_AWAITED"
# Subfolder of a stage for short extra trainings with other settings, and its name in older runs.
VARIANT_FOLDERS = ("variants", "contrast")
VARIANT_FILE = "variant.json"  # in a variant's folder: its stage, and the settings that it changes


class Stage:
    """The folder of one stage of a run."""

    def __init__(self, run: "Run", name: str):
        stages.find(name)
        self.run, self.name, self.path = run, name, run.path / name
        self.allowed: list[str] = []
        self.own_settings: tuple[str, ...] = ()  # in a variant, the settings that it changes
        self._waited_s = 0.0

    @property
    def title(self) -> str:
        """The stage's name; for a variant of a stage with the variant's name."""
        variant = self.run.path.parent.name in VARIANT_FOLDERS
        return f"{self.name} ({self.run.name})" if variant else self.name

    @property
    def dtype(self) -> machine.Dtype:
        """The precision that the stage's models compute in now, one of `machine.DTYPES`."""
        return self.run.config.dtype or machine.dtype_name()

    @property
    def config(self) -> Config:
        """The run's config with the precision filled in. In a plugin's stage, the plugin's settings
        include their defaults."""
        config = dataclasses.replace(self.run.config, dtype=self.dtype)
        if stages.find(self.name).settings is None:
            return config
        settings = to_plain(config.section(self.name))
        return dataclasses.replace(config, plugins=config.plugins | {self.name: settings})

    @property
    def done(self) -> bool:
        """Whether the stage is complete: its summary exists."""
        return (self.path / "summary.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether the folder holds work, besides the files that are written before the work."""
        written_before = {
            "config.yaml",
            "manifest.json",
            "source.diff",
            "status.json",
            "figures",
            *VARIANT_FOLDERS,
        }
        notebooks = {"executed.ipynb", "failed.ipynb"}
        return any(
            path.is_file() and not any(part.startswith(".") for part in parts)
            for path in self.path.rglob("*")
            if (parts := path.relative_to(self.path).parts)[0] not in written_before | notebooks
        )

    @property
    def summary(self) -> dict:
        """The summary of a complete stage."""
        return read_json(self.path / "summary.json")

    @property
    def metrics_path(self) -> Path:
        """File with one JSON line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def figures(self) -> Path:
        """Folder of the stage's PNG files; reading this property makes the folder."""
        folder = self.path / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check_config(self) -> None:
        """Raise if the folder holds work made with other settings.

        Raises:
            InputError: Settings differ; the message lists each key with its old and new value.
        """
        self._refuse(self._changes(stages.find(self.name).config_keys))

    def check_all(self) -> None:
        """Raise if this stage or one that belongs to it holds work made with other settings.

        Checked are the stage, its variants, and the stages that it builds on. So a changed setting
        is refused before anything is loaded, and with every folder that was made otherwise.

        Raises:
            InputError: Settings or the precision differ. The message lists each key with its old
                and new value, and all these folders.
        """
        parts = {part: part._refused() for part in (self, *self.variants(), *self._before())}
        parts = {part: changed for part, changed in parts.items() if changed}
        if parts:
            changed = {key: both for part in parts.values() for key, both in part.items()}
            inner = {p for p in parts for other in parts if other.path in p.path.parents}
            paths = [short_path(part.path) for part in parts if part not in inner]
            done = any(part.done for part in parts)
            raise InputError(refusal(paths, changed, resumable=not done))

    def variants(self) -> list["Stage"]:
        """The variants of this stage that recorded which settings they change."""
        found = []
        for path in sorted(self.path.glob(f"{VARIANT_FOLDERS[0]}/*/{VARIANT_FILE}")):
            page = read_json(path)
            config = dataclasses.replace(self.run.config, run_name=path.parent.name)
            variant = Run(config, root=path.parents[1]).stage(page["stage"])
            variant.own_settings = tuple(page["changes"])
            found.append(variant)
        return found

    def _before(self) -> list["Stage"]:
        """The stages that this stage builds on, directly or indirectly."""
        names: dict[str, None] = {}
        for name in stages.find(self.name).builds_on(self.run.config):
            above = self.run.stage(name)
            names |= dict.fromkeys(s.name for s in (above, *above._before()))
        return [self.run.stage(name) for name in names]

    def _refused(self) -> dict[str, tuple[Any, Any]]:
        """Key -> (old value, new value) of each change that is not allowed."""
        changed = self._changes(stages.find(self.name).config_keys)
        if self.begun and self._has_manifest():
            changed |= self._dtype_change(read_json(self.path / "manifest.json"))
        allowed = () if self.done else allowed_changes()
        return {k: both for k, both in changed.items() if k not in allowed}

    def differs_in(self, section: str) -> bool:
        """Whether the folder holds work made with other settings of one section of the config."""
        return bool(self._changes((section,)))

    def _changes(self, sections: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
        """Key -> (old value, new value) of each setting in these sections that has changed."""
        saved = self.path / "config.yaml"
        if not saved.is_file() or not self.begun:
            return {}
        page = yaml.safe_load(saved.read_text(encoding="utf-8")) or {}
        # An older version of the library may have had fewer settings. A setting that is missing in
        # its config.yaml had the effect of the present default.
        old = defaults(Config) | flatten(current_names(page))
        new = flatten(self.config.to_dict())
        return {
            key: (old.get(key), new.get(key))
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
            and key not in (*stages.FREE_KEYS, *self.own_settings)
            and any(f"{key}.".startswith(f"{section}.") for section in sections)
        }

    def check_inputs(self, inputs: dict[str, str]) -> None:
        """Raise if the folder's work used other inputs, another precision or other major versions.

        Major versions are checked only if the stage is not complete.

        Args:
            inputs: Name -> hash or value of what the stage reads, as passed to `work`.

        Raises:
            InputError: Something differs; the message lists each one with its old and new value.
        """
        if not self.begun or not self._has_manifest():
            return
        manifest = read_json(self.path / "manifest.json")
        old, new = dict(manifest.get("inputs", {})), dict(inputs)
        if not self.done:
            old |= provenance.majors(manifest.get("versions", {}))
            new |= provenance.majors(provenance.versions())
        changed = {k: (old[k], new[k]) for k in sorted(old.keys() & new.keys()) if old[k] != new[k]}
        self._refuse(changed | self._dtype_change(manifest))

    def check_dtype(self) -> None:
        """Raise if the folder's work was made in another precision.

        Raises:
            InputError: The precision differs; the message names the old and the new one.
        """
        if self.begun and self._has_manifest():
            self._refuse(self._dtype_change(read_json(self.path / "manifest.json")))

    def _dtype_change(self, manifest: dict) -> dict[str, tuple[str, str]]:
        then = recorded_dtype(manifest)
        changed = stages.find(self.name).computes and then not in ("", self.dtype)
        return {"dtype": (then, self.dtype)} if changed else {}

    def _refuse(self, changed: dict[str, tuple[Any, Any]]) -> None:
        """Raise if there are changes. In an incomplete stage, allowed changes are only recorded.

        Args:
            changed: Key -> (old value, new value).
        """
        allowed = () if self.done else allowed_changes()
        self.allowed += [k for k in changed if k in allowed and k not in self.allowed]
        refused = {k: both for k, both in changed.items() if k not in allowed}
        if refused:
            raise InputError(refusal([str(self.path)], refused, resumable=not self.done))

    @contextlib.contextmanager
    def work(
        self,
        inputs: dict[str, str] | Callable[[], dict[str, str]] | None = None,
        *,
        renew: bool = False,
    ) -> Iterator["Stage"]:
        """Lock the stage, write its manifest, run the block, and complete the manifest at the end.

        Args:
            inputs: Name -> hash of what the stage reads, or a function that returns this mapping. A
                function is called again after the block, to find inputs that changed during the
                block.
            renew: Whether to accept changed inputs, because the maker replaces outdated results.

        Raises:
            BusyError: A live process holds the lock.
            InputError: The folder was made with other settings or inputs, or an input changed
                during the block.
        """
        if not is_main():  # the main process holds the lock for all processes
            yield self
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with _lock(self.path / ".lock", self.run.name):
            reset_peak_memory()
            try:
                before = inputs() if callable(inputs) else dict(inputs or {})
                self.check_config()
                if renew:
                    self.check_dtype()
                else:
                    self.check_inputs(before)
                self._open_manifest(before)
            except BaseException:
                if not self.begun:
                    self._remove_traces()
                raise
            started, self._waited_s = time.perf_counter(), 0.0
            self._cpu_started = time.process_time()
            try:
                yield self
                after = inputs() if callable(inputs) else before
                changed = [k for k in before if after.get(k) != before[k]]
                if changed:
                    raise InputError(
                        f"{', '.join(changed)} changed while {self.path} was being made, so its "
                        "result belongs to neither version; delete the folder and run again"
                    )
            except BaseException:
                if not self.begun:  # there is no work to keep
                    self._remove_traces()
                    raise
                self._note_costs(started)
                raise
            self._note_costs(started)

    def _open_manifest(self, inputs: dict[str, str]) -> None:
        """Write config and manifest before the work starts; a resumed stage keeps its run id."""
        earlier = read_json(self.path / "manifest.json") if self._has_manifest() else {}
        resumed = earlier.get("resumed", [])
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if earlier and self.begun:
            resumed = [*resumed, {"at": now, "allowed_changes": self.allowed}]
        values = self.config.to_dict()
        profile = self.config.profile in profile_names() and load_config(self.config.profile)
        profile_values = flatten(profile.to_dict()) if profile else {}
        if profile_values and not self.run.config.dtype:  # dtype is then no override
            profile_values["dtype"] = self.dtype
        write_text(
            self.path / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        )
        wall_s, cpu_s = (
            earlier.get(f"{kind}_time_before_s", 0.0) + earlier.get(f"{kind}_time_s", 0.0)
            for kind in ("wall", "cpu")
        )
        root = repo_root()
        self.manifest = {
            "stage": self.name,
            "run_name": self.run.name,
            "run_id": (earlier.get("run_id") if resumed else None) or secrets.token_hex(8),
            "profile": self.config.profile,
            "seed": self.config.seed,
            "seeds": dict.fromkeys(
                ("python", "numpy", "torch", "data", "generation"), self.config.seed
            ),
            "dtype": self.dtype,
            "config": values,
            "overridden": sorted(
                k
                for k, v in flatten(values).items()
                if profile_values and v != profile_values.get(k)
            ),
            "inputs": inputs,
            "data": {},
            **provenance.environment(root),
            "device": device_name(),
            "upstream": self.upstream(),
            "resumed": resumed,
            "notebook": earlier.get("notebook") if resumed else None,
            "started": now,
            "wall_time_before_s": round(wall_s, 2),
            "cpu_time_before_s": round(cpu_s, 2),
            "results": None,
        }
        if self.manifest["git_diff_sha256"]:
            write_text(self.path / "source.diff", provenance.git_diff(root) + "\n")
        self._write_manifest()

    def note(self, **facts: Any) -> None:
        """Add entries to the manifest of the stage that is being made, such as `data=...`."""
        if not is_main():
            return
        self.manifest |= facts
        self._write_manifest()

    def _write_manifest(self) -> None:
        """Write the manifest with a seal: the hash of all other entries."""
        page = {k: v for k, v in self.manifest.items() if k != "sealed"}
        self.manifest = page | {"sealed": provenance.canonical_sha256(page)}
        write_json(self.path / "manifest.json", self.manifest)

    def _note_costs(self, started: float) -> None:
        """Add time and memory to the manifest.

        Args:
            started: `time.perf_counter()` when the work began.
        """
        self.note(
            wall_time_s=round(time.perf_counter() - started - self._waited_s, 2),
            # Of this process alone, with all of its threads.
            cpu_time_s=round(time.process_time() - self._cpu_started, 2),
            peak_memory_gib=round(peak_memory_gib(), 3),
        )

    def wait_for(self, name: str, flag: object = False) -> None:
        """Wait as long as another notebook of `spavl run all` is making a stage of this run.

        The time does not count as this stage's own.

        Args:
            name: Name of the other stage.
            flag: Stop flag; once truthy, this method returns.
        """
        began = time.perf_counter()
        while name in self.run.awaited and not flag:
            time.sleep(0.2)
        self._waited_s += time.perf_counter() - began

    def _remove_traces(self) -> None:
        """Remove the files that are written before the work, and folders that are then empty."""
        for name in ("config.yaml", "manifest.json", "source.diff", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        folders = [p for p in self.path.rglob("*") if p.is_dir()]
        for folder in (*sorted(folders, reverse=True), self.path, self.run.path):
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()

    def upstream(self) -> dict[str, str | None]:
        """Name -> run id of the run's other stages that are complete now."""
        return {
            s.name: read_json(s.path / "manifest.json").get("run_id")
            for s in self.run.done_stages()
            if s.name != self.name and s._has_manifest()
        }

    def _has_manifest(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def log(self, row: dict) -> None:
        """Append one line to metrics.jsonl."""
        if not is_main():
            return
        line = json.dumps(row) + "\n"
        with writing(self.metrics_path, len(line)):
            with self.metrics_path.open("a", encoding="utf-8") as handle:
                handle.write(line)

    def finish(self, summary: dict) -> None:
        """Write the summary, which makes the stage complete.

        The summary's hash is written to the manifest first. A signal takes effect only after both
        files are written.
        """
        if is_main():
            with stop_on_signals():
                self._conclude(summary)

    def _conclude(self, summary: dict) -> None:
        """Write the summary's hash to the manifest, then the summary."""
        if self._has_manifest():
            self.manifest = read_json(self.path / "manifest.json")
            weights = summary.get("weights_sha256")
            self.note(
                results={
                    "summary_sha256": provenance.canonical_sha256(summary),
                    "weights_sha256": weights,
                }
            )
        write_json(self.path / "summary.json", summary)


class Run:
    """The folder of one run."""

    def __init__(self, config: Config, root: Path | None = None):
        name = config.run_name or config.profile
        if name != Path(name).name or name.startswith("."):
            raise InputError(f"run_name {name!r} must be a plain folder name")
        self.config, self.name = config, name
        self.path = (root or runs_root()) / name

    def stage(self, name: str) -> Stage:
        """The stage with this name, whether it is complete or not."""
        return Stage(self, name)

    @property
    def awaited(self) -> list[str]:
        """Names of the stages that other notebooks of `spavl run all` are making now."""
        names = os.environ.get(AWAITED, "").split(",")
        return [name for name in names if name and not self.stage(name).done]

    def done_stages(self) -> list[Stage]:
        """The complete stages of this run."""
        return [s for s in map(self.stage, stages.stage_names()) if s.done]


@contextlib.contextmanager
def _lock(path: Path, run_name: str) -> Iterator[None]:
    """Hold a lock file, and write into it which process holds the lock.

    The operating system releases the lock when the process dies.
    """
    try:
        lock = FileLock(path, blocking=False, fallback_to_soft=False).acquire()
    except Timeout:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        raise BusyError(
            f"{path.parent} is in use by {holder}; wait for it, or use another run_name"
        ) from None
    with lock:
        path.write_text(f"pid {os.getpid()} on {socket.gethostname()} (run {run_name})", "utf-8")
        yield
