"""Further preference pairs from a file (`data.extra_path`), added to the rows of any source.

The file is of any kind that the source `datasets` reads, and its columns are recognised by their
names. The field `split` says where a row is added: `validation`, to the held-out pairs that are
reported; `development`, to those on which settings are chosen (`data.measure_on`); everything else
is a training pair. Rows may be text-only, or name or contain an image.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from spavl_lib.config import ColumnsConfig, DataConfig
from spavl_lib.data.problems import Loaded
from spavl_lib.data.schema import MORE, PREFERENCE_COLUMNS, column, features, more_images
from spavl_lib.data.sources import files, laptop_pairs
from spavl_lib.data.sources.assemble import Assembled, assemble
from spavl_lib.data.sources.opening import open_files
from spavl_lib.errors import InputError, raise_all
from spavl_lib.runs.files import sha256_file

SPLITS = ("train", "validation", "development")


class ExtraPairs:
    """The pairs of `data.extra_path`.

    Args:
        config: Its `extra_path`, `measure_on` and `on_bad_rows` are used.
    """

    def __init__(self, config: DataConfig):
        self.path = config.extra_path
        self.held_out = "development" if config.measure_on == "development" else "validation"
        self.config = dataclasses.replace(
            config, source="datasets", path=self.path, columns=ColumnsConfig(), extra_path="",
            keywords=(), measure_on="test", uncertain_share=0.0,
        )  # fmt: skip

    @functools.cached_property
    def file(self) -> Path:
        """The file.

        Raises:
            InputError: There is no such file, it is of an unknown kind, or the pairs of the profile
                `laptop` were not made by this version.
        """
        if self.path == laptop_pairs.NAME:
            return laptop_pairs.pairs_file()
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise InputError(f"data.extra_path {self.path!r}: there is no such file")
        files.check_kind(path)
        return path

    @functools.cached_property
    def _parts(self) -> dict[str, Assembled]:
        """Split -> its rows, without those that have none.

        Raises:
            InputError: A row names another split. The message lists all such rows.
        """
        opened = open_files([self.file])
        records = list(opened.records)
        named = [r.get("split") or SPLITS[0] if isinstance(r, dict) else "" for _, r in records]
        problems = [
            f"{place} split: expected {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, got {name!r}"
            for (place, record), name in zip(records, named, strict=True)
            if isinstance(record, dict) and name not in SPLITS
        ]
        raise_all(problems, self.path)
        plain = [
            (place, {k: v for k, v in r.items() if k != "split"} if isinstance(r, dict) else r)
            for place, r in records
        ]
        rows = assemble(
            dataclasses.replace(opened, records=plain), self.file.parent,
            f"extra {self.file.stem}", self.config,
        )  # fmt: skip
        chosen = {
            split: [i for i, name in enumerate(named) if (name or SPLITS[0]) == split]
            for split in SPLITS
        }
        return {split: rows.select(indices) for split, indices in chosen.items() if indices}

    @property
    def ids(self) -> frozenset[str]:
        """The ids of all rows.

        Raises:
            InputError: The file cannot be read, or a row names another split.
        """
        return frozenset(i for part in self._parts.values() for i in column(part.rows, "id"))

    def load(self, split: str) -> Loaded | None:
        """The good rows of `train` or `validation`; None if the file has none.

        With `data.measure_on` = development the split `validation` has the rows named so instead.

        Raises:
            InputError: The file cannot be read, or rows are bad. The message lists all bad rows.
        """
        part = self._part(split)
        return part.checked(self.config) if part else None

    def _part(self, split: str) -> Assembled | None:
        return self._parts.get(self.held_out if split == "validation" else split)

    def added(self, loaded: Loaded, split: str) -> Loaded:
        """The rows of a source, followed by the rows of the file.

        Args:
            loaded: The source's rows.
            split: `train` or `validation`.

        Raises:
            InputError: As for `load`; or a row has the id of a row of the source.
        """
        part = self._part(split)
        extra = self.load(split)
        if part is None or extra is None:
            return loaded
        known = set(column(loaded.rows, "id"))
        ids = column(part.rows, "id")
        raise_all(
            [
                f"{place} id: {name} is also the id of a row of the source; rename one"
                for place, name in zip(part.places, ids, strict=True)
                if name in known
            ],
            self.path,
        )
        both = (loaded.rows, extra.rows)
        more = any(MORE in rows.column_names for rows in both)
        return Loaded(
            concatenate_datasets([_in_schema(rows, more) for rows in both]),
            (*loaded.skipped, *extra.skipped),
            (*loaded.notes, *extra.notes),
        )

    def sha256(self, split: str) -> str:
        """Hash of the file and of the image files that the split's rows name; empty if the file has
        no rows of the split.

        Args:
            split: `train` or `validation`.
        """
        part = self._part(split)
        if part is None:
            return ""
        cells = [*part.rows["image"], *(c for more in more_images(part.rows) for c in more)]
        paths = {Path(cell["path"]) for cell in cells if cell is not None and not cell["bytes"]}
        images = sorted(path for path in paths if path.is_file())
        digest = hashlib.sha256()
        for path in (self.file, *images):
            digest.update(f"{path.name} {sha256_file(path)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def _in_schema(rows: Dataset, more: bool) -> Dataset:
    """The columns of the schema, with or without the column of further images."""
    columns = [*PREFERENCE_COLUMNS, *([MORE] if more else [])]
    if more and MORE not in rows.column_names:
        rows = rows.add_column(MORE, [None] * len(rows))
    return rows.select_columns(columns).cast(features(columns))
