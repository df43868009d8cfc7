"""Your own preference data: anything that the `datasets` library opens, in any known layout.

The data are a JSON, JSON Lines, CSV, TSV, parquet or Arrow file, a folder of such files, a saved
data set, or a data set on the Hub. Columns are named in the profile, or recognised by the names
that TRL and LLaMA-Factory use (`data.sources.records`).
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.data.duplicates import image_hashes
from spavl_lib.data.problems import Loaded
from spavl_lib.data.schema import batches, column, more_images
from spavl_lib.data.sources import splits
from spavl_lib.data.sources.assemble import Assembled, assemble, joined
from spavl_lib.data.sources.base import Source, register_source
from spavl_lib.data.sources.opening import Opened, find_files, open_by_library, open_files
from spavl_lib.errors import InputError


@register_source("datasets")
class OwnRows(Source):
    """Anything that the `datasets` library opens."""

    @property
    def folder(self) -> Path:
        """The value of `data.path` as a path. If it is a name on the Hub, no such folder exists."""
        return Path(self.config.path).expanduser()

    def preferences(self, split: str) -> Loaded:
        """Rows of `data.train_split` or `data.validation_split`."""
        return load(self.config, split)

    def files(self, split: str) -> list[Path]:
        """The files of a split's rows, and every image file that the rows of these files name."""
        parts = _Splits(self.config)
        return [*parts.files(split), *sorted(set(parts.named_images(split)))]

    def sha256(self, split: str) -> str:
        """Hash of a split's files, and of the settings that choose the split's rows from them.

        Training rows and held-out rows of the same files have different hashes.
        """
        digest = f"{super().sha256(split)} {_Splits(self.config).describe(split)}"
        return hashlib.sha256(digest.encode()).hexdigest()

    def held_out(self) -> dict[str, Any] | None:
        """How held-out rows are drawn from the training rows; None if they are not drawn."""
        drawn = {"share": splits.HELD_OUT_SHARE, "seed": self.config.held_out_seed}
        return drawn | {"grouped_by": "image"} if _Splits(self.config).draws else None


def load(config: DataConfig, split: str) -> Loaded:
    """Read a split into the schema.

    Args:
        config: What to read. Used are `path`, `subset`, `revision`, `train_split`,
            `validation_split`, `held_out_seed`, `columns`, `image_root` and `on_bad_rows`.
        split: `train` or `validation`.

    Raises:
        InputError: There is nothing to read, columns are unknown, or rows are bad. The message
            lists all bad rows.
    """
    return _Splits(config).load(split)


class _Splits:
    """The splits of a data set, opened when they are needed."""

    def __init__(self, config: DataConfig):
        if not config.path:
            raise InputError("data.path is empty, but data.source is 'datasets'")
        self.config, self.path = config, Path(config.path).expanduser()
        self._assembled: dict[str, Assembled] = {}

    @functools.cached_property
    def opened(self) -> dict[str, Opened]:
        """Name -> opened split, for each split that was found in the data."""
        config = self.config
        names = [*splits.names_in(config.train_split), *splits.names_in(config.validation_split)]
        found = None if config.subset else find_files(self.path, names)
        if found is None:
            return open_by_library(config, self.path)
        return {name: open_files(paths) for name, paths in found.items()}

    def load(self, split: str) -> Loaded:
        """The good rows of `train` or `validation`.

        Raises:
            InputError: There is no such split, or rows are bad. The message lists all bad rows.
        """
        if not self.draws:
            return self._take(self._chosen(split)).checked(self.config)
        whole = self._take(self._rows("train")).checked(self.config)
        held = splits.hold_out(self._groups(whole.rows), self.config.held_out_seed)
        if split == "validation" and not held:
            raise InputError(
                f"no held-out pairs: {self.config.path} has no split 'validation', and none of its "
                "rows can be held out, because all show the same image; give it a split "
                "'validation', such as a file validation.jsonl beside it"
            )
        rows = [n for n in range(len(whole.rows)) if (n in held) == (split == "validation")]
        note = (
            f"{self.config.path} has no split 'validation', so about a tenth of its rows is held "
            f"out and not trained on: {len(held)} of {len(whole.rows)}, all rows of an image "
            f"together (data.held_out_seed = {self.config.held_out_seed})"
        )
        skipped = whole.skipped if split == "train" else ()
        notes = (*whole.notes, note) if held else whole.notes
        return Loaded(whole.rows.select(rows), skipped, notes)

    def _chosen(self, split: str) -> splits.Rows:
        """The rows of `train` or of `validation`.

        Raises:
            InputError: Both have rows in common.
        """
        rows = self._rows(split)
        if set(self._names("train")) & set(self._names("validation")):
            other = self._rows("validation" if split == "train" else "train")
            if common := len(set(rows) & set(other)):
                config = self.config
                raise InputError(
                    f"data.train_split = {config.train_split!r} and data.validation_split = "
                    f"{config.validation_split!r} have {common} rows in common, but held-out rows "
                    "must not be trained on; use slices apart from each other, or leave "
                    "data.validation_split at 'validation' to hold out a tenth"
                )
        return rows

    @property
    def draws(self) -> bool:
        """Whether held-out rows are drawn from the training rows."""
        name = self.config.validation_split
        return name == splits.DEFAULT_HELD_OUT and name not in self.opened

    def describe(self, split: str) -> str:
        """The settings that choose a split's rows from the files, as text for the split's hash."""
        setting = self.config.train_split if split == "train" else self.config.validation_split
        drawn = f" seed {self.config.held_out_seed}" if self.draws else ""
        return f"{split} {setting}{drawn}"

    def files(self, split: str) -> list[Path]:
        """The files that a split's rows lie in."""
        return list(dict.fromkeys(p for n in self._names(split) for p in self.opened[n].files))

    def named_images(self, split: str) -> Iterator[Path]:
        """The image files that rows name instead of containing the image.

        All rows of the split's files count, even if the split has only a part of these rows.
        """
        for name in self._names(split):
            rows = self._base(name).rows
            for more in more_images(rows):
                yield from (p for cell in more if not cell["bytes"] for p in [Path(cell["path"])])
            for table in batches(rows.select_columns(["image"])):
                cells = table.column("image").combine_chunks()
                is_path = pc.and_(cells.is_valid(), pc.struct_field(cells, "bytes").is_null())
                paths = pc.struct_field(cells.filter(is_path), "path").to_pylist()
                yield from (Path(path) for path in paths if Path(path).is_file())

    def _names(self, split: str) -> list[str]:
        """Names of the data's splits from which `train` or `validation` is read.

        Raises:
            InputError: The data have no such split.
        """
        config = self.config
        part = "train" if self.draws else split
        setting = config.train_split if part == "train" else config.validation_split
        names = splits.names_in(setting)
        unknown = [name for name in names if name not in self.opened]
        if unknown:
            raise InputError(
                f"data.{part}_split = {setting!r}: {config.path} has no split "
                f"{unknown[0]!r} (known: {', '.join(self.opened) or 'none'})"
            )
        return names

    def _rows(self, split: str) -> splits.Rows:
        sizes = {name: len(self._base(name).rows) for name in self._names(split)}
        setting = getattr(self.config, f"{split}_split")
        return splits.rows_of(setting, sizes, f"data.{split}_split")

    def _base(self, name: str) -> Assembled:
        if name not in self._assembled:
            root = self.config.image_root
            folder = self.path.parent if self.path.is_file() else self.path
            self._assembled[name] = assemble(
                self.opened[name], Path(root).expanduser() if root else folder, name, self.config
            )
        return self._assembled[name]

    @staticmethod
    def _groups(rows: Dataset) -> list[str]:
        """The image of each row, or the prompt of a text-only row.

        Rows with several images are in one group with all rows that show one of these images.
        """
        pairs = zip(image_hashes(rows), column(rows, "prompt"), strict=True)
        keys = [image or f"prompt {prompt}" for image, prompt in pairs]
        return splits.connected([key.split("+") if "+" in key else [key] for key in keys])

    def _take(self, rows: splits.Rows) -> Assembled:
        names = list(dict.fromkeys(name for name, _ in rows))
        parts = [self._base(n).select([i for name, i in rows if name == n]) for n in names]
        return joined(parts)
