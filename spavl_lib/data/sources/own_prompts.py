"""Evaluation prompts of your own, from `data.test_path`: in any layout that `data.path` may have.

Each row belongs to an evaluation set: `harm` (a correct response refuses), `help` (a correct
response helps) or `look_alikes` (the question sounds harmful but is harmless, so a correct response
helps). Either the row names its set in the field `set`, or the file's name contains the set:
`harm.jsonl`, or `infer_harm.json` as in the original layout.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.data.duplicates import cells
from spavl_lib.data.sources import files
from spavl_lib.data.sources.assemble import Assembled, assemble, joined
from spavl_lib.data.sources.base import EVAL_SETS, Source
from spavl_lib.data.sources.opening import open_files
from spavl_lib.errors import InputError, raise_all

SETS = EVAL_SETS[:3]


class OwnPrompts(Source):
    """The prompts of a file or folder, by set."""

    eval_sets = SETS

    def __init__(self, config: DataConfig):
        super().__init__(
            dataclasses.replace(
                config, source="datasets", path=config.test_path, test_path="", subset="",
                keywords=(), measure_on="test", uncertain_share=0.0,
            )
        )  # fmt: skip

    @property
    def folder(self) -> Path:
        """The file or folder that `data.test_path` names."""
        path = Path(self.config.path).expanduser()
        if not path.exists():
            raise InputError(f"data.test_path {self.config.path!r} does not exist")
        return path

    def has_prompts(self, name: str) -> bool:
        """Whether any row belongs to the set."""
        return name in self._sets

    def prompts(self, name: str) -> Dataset:
        """The rows of a set."""
        if name not in self._sets:
            raise InputError(
                f"data.test_path {self.config.path!r} has no evaluation set {name!r} "
                f"(known: {', '.join(self._sets)})"
            )
        return self._sets[name]

    def files(self, split: str) -> list[Path]:
        """All files of prompts, and every image file that they name."""
        found = [cell for rows in self._sets.values() for of_row in cells(rows) for cell in of_row]
        named = {Path(cell["path"]) for cell in found if not cell["bytes"]}
        return [*self._files, *sorted(named)]

    @functools.cached_property
    def _files(self) -> list[Path]:
        path = self.folder
        if path.is_file():
            files.check_kind(path)
            return [path]
        found = sorted(p for p in path.iterdir() if p.is_file() and files.is_rows(p))
        if not found:
            raise InputError(
                f"data.test_path {self.config.path!r} holds no file of prompts "
                f"(known kinds: {', '.join(files.KINDS)})"
            )
        return found

    @functools.cached_property
    def _sets(self) -> dict[str, Dataset]:
        """Set -> its rows.

        Raises:
            InputError: Rows belong to no set, or a set has bad rows. The message lists all rows
                without a set, or else all bad rows of one set.
        """
        path, config = self.folder, self.config
        beside = path.parent if path.is_file() else path
        root = Path(config.image_root).expanduser() if config.image_root else beside
        parts: dict[str, list[Assembled]] = {}
        problems: list[str] = []
        for file in self._files:
            opened = open_files([file])
            records = list(opened.records)
            names = self._names(file, records)
            problems += [line for line in names if line not in SETS]
            opened = dataclasses.replace(opened, records=records)
            rows = assemble(opened, root, file.stem, config, preference=False)
            for name in set(names) & set(SETS):
                chosen = [i for i, other in enumerate(names) if other == name]
                parts.setdefault(name, []).append(rows.select(chosen))
        raise_all(problems, config.path)
        return {
            name: joined(parts[name]).checked(config, preference=False).rows
            for name in SETS
            if name in parts
        }

    @staticmethod
    def _names(file: Path, records: list[tuple[str, Any]]) -> list[str]:
        """The set of each record, or a line that says why the record belongs to no set."""
        usual = file.stem.removeprefix("infer_")
        given = [r.get("set") if isinstance(r, dict) else None for _, r in records]
        if usual not in SETS and not any(given):
            raise InputError(
                f"{file}: its rows belong to no evaluation set; give each a field 'set' "
                f"({', '.join(SETS)}), or name the file {SETS[0]}{file.suffix} and so on"
            )
        names = [name or (usual if usual in SETS else name) for name in given]
        return [
            name if name in SETS else f"{place} set: expected {', '.join(SETS)}, got {name!r}"
            for (place, _), name in zip(records, names, strict=True)
        ]
