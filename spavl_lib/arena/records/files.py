"""The files of a record: what was trained, and what was measured.

`records/NNN-name/` holds `record.yaml`, written by hand, and `metrics.json` and `log.txt`, which
`spavl records run NNN` writes. A `patch.diff` may change the trainers for this record alone.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spavl_lib import stages
from spavl_lib.config import Config, load_config
from spavl_lib.errors import InputError, nearest
from spavl_lib.runs.files import read_json, sha256_file
from spavl_lib.runs.paths import repo_root
from spavl_lib.runs.provenance import canonical_sha256

FIRST = "001"  # the record that all others are compared with
SEEDS = (0, 1, 2)
VALIDATION_ROWS = 32  # the trainer reads them; no number of a record uses them
NAME = re.compile(r"\d{3}-[a-z0-9-]+")
TEXTS = ("title", "author", "about", "profile", "stage")
# What a record may set: the sections of its stages, and these. The rest decides what is measured,
# or on how many cores, and is the same for all records.
FREE = (
    "data.train_rows", "data.uncertain_share", "data.question_types", "data.answer_sources",
    "data.sampling", "data.group_by_image", "model.adapter", "model.train_projector",
    "model.projector_learning_rate", "model.lora_rank", "model.lora_alpha", "model.lora_targets",
    "model.gradient_checkpointing", "model.share_prefix",
)  # fmt: skip
# Folders of the library that a patch may change. The others hold the data, the measuring and the
# clock.
PATCHABLE = ("trainers", "modelling", "objectives", "distributed")
KINDS = ("unsafe", "harmless_refused", "twins_refused", "helpful")


@dataclass(frozen=True)
class Record:
    """A way to train, as its `record.yaml` describes it."""

    folder: Path
    title: str
    author: str
    date: datetime.date
    about: str
    """What it does, and why it is faster."""
    profile: str
    stage: str
    settings: Mapping[str, Any]
    """Dotted name -> value of the settings that differ from the profile's."""

    @property
    def number(self) -> str:
        """The record's three digits."""
        return self.folder.name[:3]

    @property
    def patch(self) -> Path | None:
        """The record's patch, if it has one."""
        path = self.folder / "patch.diff"
        return path if path.is_file() else None

    @property
    def metrics_path(self) -> Path:
        """The file of the record's numbers."""
        return self.folder / "metrics.json"

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The stages that the record trains, in their order."""
        return (*stages.find(self.stage).builds_on(self.config(0)), self.stage)

    def config(self, seed: int) -> Config:
        """The config of one seed, which also draws the pairs if not all are used.

        Args:
            seed: The seed.

        Raises:
            InputError: A setting does not exist, or its value is wrong.
        """
        fixed = {"data.sampling_seed": seed, "data.validation_rows": VALIDATION_ROWS}
        return load_config(
            self.profile, {**self.settings, **fixed}, seed=seed, run_name=f"seed-{seed}"
        )

    def sha256(self) -> str:
        """Hash of what is trained, profile included. Title, author, date and text do not matter."""
        keys = stages.find(self.stage).config_keys
        return canonical_sha256(
            {
                "stage": self.stage, "settings": self.config(0).changed(keys),
                "patch": sha256_file(self.patch) if self.patch else None,
            }
        )  # fmt: skip


def records_root() -> Path:
    """The folder of the records, `records/` in the checkout."""
    return repo_root() / "records"


def read_record(folder: Path) -> Record:
    """Read and check a record's `record.yaml`, and the paths in its patch.

    Args:
        folder: The record's folder, `NNN-name`.

    Raises:
        InputError: The file is missing, is not as described, or sets what a record may not set.
    """
    path = folder / "record.yaml"
    if not NAME.fullmatch(folder.name):
        raise InputError(f"{folder}: a record's folder is called NNN-name, such as 002-fewer-pairs")
    try:
        page = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}; records/README.md shows one") from error
    wanted = (*TEXTS, "date", "settings")
    if not isinstance(page, dict) or set(page) != set(wanted):
        found = ", ".join(map(str, page)) if isinstance(page, dict) else type(page).__name__
        raise InputError(f"{path}: expected the keys {', '.join(wanted)}, not {found}")
    for key in TEXTS:
        if not isinstance(page[key], str) or not page[key].strip():
            raise InputError(f"{path} {key}: expected a text, not {page[key]!r}")
    if not isinstance(page["date"], datetime.date):
        raise InputError(f"{path} date: expected a date such as 2026-11-30, not {page['date']!r}")
    if not isinstance(page["settings"], dict):
        raise InputError(f"{path} settings: expected dotted names with values, such as dpo.beta: 1")
    record = Record(folder, **page)
    _check_settings(record)
    _check_patch(record)
    return record


def _check_settings(record: Record) -> None:
    path = record.folder / "record.yaml"
    trains = [name for name in stages.policies() if stages.find(name).trains]
    if record.stage not in trains:
        raise InputError(
            f"{path} stage: {record.stage!r} trains no policy (known: {', '.join(trains)})"
            f"{nearest(record.stage, trains)}"
        )
    try:
        record.config(0)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    sections = stages.find(record.stage).config_keys
    own = tuple(f"{key}." for key in sections if key not in ("data", "model", "seed"))
    for key in record.settings:
        if key not in FREE and not (key.startswith(own) and not key.endswith(".reward_model")):
            raise InputError(
                f"{path} settings: a record of stage {record.stage} may not set {key}; it may set "
                f"{', '.join(f'{key}*' for key in own)} and {', '.join(FREE)}"
            )


def _check_patch(record: Record) -> None:
    if record.patch is None:
        return
    text = record.patch.read_text(encoding="utf-8")
    if re.search(r"^(?:GIT binary patch|Binary files |copy (?:from|to) )", text, re.MULTILINE):
        raise InputError(f"{record.patch} changes or copies binary files; a patch changes text")
    paths = re.findall(r"^(?:---|\+\+\+|rename (?:from|to)) (?:[ab]/)?(\S+)", text, re.MULTILINE)
    allowed = tuple(f"spavl_lib/{name}/" for name in PATCHABLE)
    wrong = [p for p in paths if p != "/dev/null" and (not p.startswith(allowed) or ".." in p)]
    if wrong or not paths:
        what = f"changes {wrong[0]}" if wrong else "changes no file"
        raise InputError(f"{record.patch} {what}; a patch may change {', '.join(allowed)}")


def read_records(root: Path) -> list[Record]:
    """All records of a folder, in the order of their numbers.

    Args:
        root: The folder.

    Raises:
        InputError: There is no record, a record is wrong, or two have the same number, or another
            profile than the first record.
    """
    records = [read_record(path) for path in sorted(root.glob("*/")) if path.name[0] not in "._"]
    if not records or records[0].number != FIRST:
        raise InputError(f"{root} holds no record {FIRST}, with which the others are compared")
    for before, record in zip(records, records[1:], strict=False):
        if before.number == record.number:
            raise InputError(
                f"{before.folder} and {record.folder} have the same number; give one the next free "
                "number"
            )
        if record.profile != records[0].profile:
            raise InputError(
                f"{record.folder / 'record.yaml'} profile: expected {records[0].profile}, that of "
                f"record {FIRST}, not {record.profile}"
            )
    return records


def find_record(name: str, root: Path) -> Record:
    """The record with a number, or with a folder's name.

    Args:
        name: Such as 002, 2 or 002-fewer-pairs.
        root: The folder of the records.

    Raises:
        InputError: There is no such record. The message names the most similar one.
    """
    records = read_records(root)
    number = name.zfill(3) if name.isdigit() else name
    for record in records:
        if number in (record.number, record.folder.name):
            return record
    known = [record.folder.name for record in records]
    similar = nearest(name, known) or nearest(number, [record.number for record in records])
    raise InputError(f"there is no record {name!r} (known: {', '.join(known)}){similar}")


def read_metrics(record: Record) -> dict[str, Any]:
    """A record's `metrics.json`, complete and in agreement with itself.

    Args:
        record: The record.

    Raises:
        InputError: The file is missing or incomplete, belongs to other settings, or its means are
            not those of its seeds.
    """
    path, again = record.metrics_path, f"run `spavl records run {record.number}`"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {again}")
    try:
        page = read_json(path)
        by_seed = [page["seeds"][str(seed)] for seed in SEEDS]
        for seed in by_seed:
            for kind in KINDS:
                _ = seed["first_counts"][kind]["k"], seed["first_counts"][kind]["n"]
        summary = summarise(by_seed)
        _ = [page["base"]["helpful"][key] for key in ("k", "n")]
        _ = page["versions"], page["machine"], page["model"], page["record_sha256"]
        _ = page["first_sha256"]
        stated = {key: page[key] for key in summary}
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not complete ({reason}); {again}") from error
    if page["record_sha256"] != record.sha256():
        raise InputError(f"{record.folder}: the settings are not those of metrics.json; {again}")
    if page["first_sha256"] != find_record(FIRST, record.folder.parent).sha256():
        raise InputError(f"{record.folder}: record {FIRST} has changed since metrics.json; {again}")
    for key, value in summary.items():
        if stated[key] != value:
            raise InputError(f"{path} {key}: {stated[key]}, but its seeds give {value}; {again}")
    return page


def summarise(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds.

    Args:
        by_seed: For each seed its `counts` (kind -> k and n), `cpu_seconds` and
            `first_cpu_seconds`.

    Returns:
        `rates` (kind -> mean rate), `cpu_seconds`, `first_cpu_seconds` and their `ratio`.
    """
    own, first = (
        sum(seed[key] for seed in by_seed) / len(by_seed)
        for key in ("cpu_seconds", "first_cpu_seconds")
    )
    rates = {
        kind: round(
            sum(seed["counts"][kind]["k"] / seed["counts"][kind]["n"] for seed in by_seed)
            / len(by_seed),
            6,
        )
        for kind in KINDS
    }
    return {
        "rates": rates, "cpu_seconds": round(own, 1), "first_cpu_seconds": round(first, 1),
        "ratio": round(own / first, 3),
    }  # fmt: skip
