"""SPA-VL in its Hub layout: parquet files with embedded images, and meta files.

The files come from a local folder, from the Hub, or from the Hub's cache if there is no network.
Rows stay in memory-mapped Arrow files, so a set may be larger than memory.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Image, Value, concatenate_datasets

from spavl_lib.data.images import ImageError, image_cell
from spavl_lib.data.problems import Loaded, Problems, Shards, find_problems, without_bad_rows
from spavl_lib.data.schema import (
    DECODE_ALL_UP_TO,
    HUB_RENAMES,
    HUB_REQUIRED,
    PREFERENCE_COLUMNS,
    PROMPT_COLUMNS,
    features,
    text_columns,
)
from spavl_lib.data.set_names import set_parts
from spavl_lib.data.sources.base import Source, register_source
from spavl_lib.data.sources.files import open_tables
from spavl_lib.data.sources.join import answer_sources, join_meta
from spavl_lib.errors import InputError, raise_all

PATTERNS = {"train": "data/train-*", "validation": "validation/validation-*"}
# Files that a split's hash covers.
HASHED = {
    "train": ("data/train-*.parquet", "meta_files/**/*.json"),
    "validation": ("validation/*.parquet",),
}
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Files of the repository that are fetched. The SPA-VL authors' zip file and the judges' reasons are
# not needed.
FETCHED = ["data/*.parquet", "validation/*.parquet", "test/*.parquet", "README.md",
           "meta_files/image_info/*.json", "meta_files/split/*.json"]  # fmt: skip
HAS_TURNS = b"spavl_turns"  # key in the metadata of a file whose questions may have several turns
ANSWERS = "meta_files/model_answer/*.json"


@register_source("hub_layout")
class HubLayout(Source):
    """Parquet files with embedded images, in a folder or a data set on the Hub."""

    eval_sets: tuple[str, ...] = ("harm", "help")

    @property
    def folder(self) -> Path:
        """The folder of the files, fetched from the Hub if `data.path` is a name there."""
        config = self.config
        if Path(config.path).expanduser().exists() or not REPO_ID.fullmatch(config.path):
            return super().folder
        return fetch(config.path, config.revision, answers=bool(config.answer_sources))

    def folder_of(self, split: str) -> Path:
        """The folder of a split's or an evaluation set's files."""
        return self.folder

    def preferences(self, split: str) -> Loaded:
        """Rows of `train`, `validation` or another set below `validation/`, such as `twins`."""
        pattern = PATTERNS.get(split, f"validation/{split}-*")
        kind = "train" if split == "train" else "validation"
        return read(self.folder_of(split), pattern, kind, name=split, **self._options)

    def prompts(self, name: str) -> Dataset:
        """Rows of a set below `test/`. `twins_exchanged` gives the rows of `twins`."""
        base, pattern = _prompt_files(name)
        folder = self.folder_of(name)
        if not list(folder.glob(pattern)):
            known = sorted(p.name.split("-")[0] for p in folder.glob("test/*.parquet"))
            raise InputError(f"{folder} has no evaluation set {name!r} (known: {', '.join(known)})")
        pattern = pattern.removesuffix(".parquet")
        return read(folder, pattern, "test", name=base, **self._options).rows

    @property
    def _options(self) -> dict[str, str]:
        return {"on_bad_rows": self.config.on_bad_rows, "image_root": self.config.image_root}

    def has_prompts(self, name: str) -> bool:
        """Whether there is a set of this name below `test/`."""
        return bool(list(self.folder_of(name).glob(_prompt_files(name)[1])))

    def files(self, split: str) -> list[Path]:
        """The parquet files of a split or set, and the image files that rows name instead of
        containing the image. For `train` the meta files are included."""
        patterns = HASHED.get(split, (_prompt_files(split)[1],))
        folder = self.folder_of(split)
        paths = sorted(p for pattern in patterns for p in folder.glob(pattern))
        root = Path(self.config.image_root or folder).expanduser()
        return [*paths, *_image_files([p for p in paths if p.suffix == ".parquet"], root)]

    def answer_sources(self, rows: Dataset) -> tuple[list[set[str]], list[set[str]]]:
        """Names of the models that gave each response, from `meta_files/model_answer/`."""
        return answer_sources(rows, self.folder / "meta_files")


def _prompt_files(name: str) -> tuple[str, str]:
    """An evaluation set's name in its files, and the pattern of the files."""
    base, style = set_parts(name)
    base = base.removesuffix("_exchanged")
    return base, f"test{style and '_'}{style}/{base}-*.parquet"


def fetch(repo: str, revision: str, *, answers: bool) -> Path:
    """A repository's files in the Hub's cache. Missing files are fetched.

    Args:
        repo: `owner/name` of a data set.
        revision: Commit, tag or branch; empty fetches the newest commit.
        answers: Whether to fetch also the responses of each model.

    Returns:
        The snapshot's folder, which is named by its commit.

    Raises:
        InputError: There is no such repository or revision, or there is neither network nor cache.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "repo_id": repo,
        "repo_type": "dataset",
        "revision": revision or None,
        "allow_patterns": [*FETCHED, ANSWERS] if answers else FETCHED,
    }
    if COMMIT.fullmatch(revision):  # a commit never changes, so a complete cache is enough
        try:
            folder = Path(snapshot_download(**options, local_files_only=True))
            shards(folder, PATTERNS["train"])
            return folder
        except (OSError, ValueError, InputError):
            pass
    try:
        return Path(snapshot_download(**options))
    except Exception as error:  # the client raises its own errors, those of httpx, and OS errors
        raise InputError(
            f"data.path {repo!r} does not exist here, and could not be fetched from the Hub at "
            f"revision {revision or 'main'!r}: {str(error).splitlines()[0]}\n"
            "If this is not SPA-VL, set data.revision to a revision of this data set, or to "
            "nothing (--set data.revision=). On a machine with a network run\n"
            f"  hf download {repo} --repo-type dataset --local-dir data/spa-vl\n"
            "  and then --set data.path=data/spa-vl"
        ) from error


def read(
    folder: Path,
    pattern: str,
    kind: str,
    *,
    name: str,
    on_bad_rows: str = "error",
    image_root: str = "",
) -> Loaded:
    """Read one split into the schema.

    Args:
        folder: A folder in the Hub's layout.
        pattern: Pattern of the parquet files below the folder, without `.parquet`.
        kind: `train`, `validation` or `test`, which have different columns.
        name: Name of the split, with which each row's id starts.
        on_bad_rows: `error` or `skip`.
        image_root: Folder that image paths start from. Empty uses `folder`.

    Raises:
        InputError: Files or columns are missing, a file is damaged, or rows are bad. The message
            lists all problems.
    """
    preference = kind != "test"
    columns = PREFERENCE_COLUMNS if preference else PROMPT_COLUMNS
    files = shards(folder, pattern)
    place_of = Shards(check_shards(files, HUB_REQUIRED[kind]))
    raw = _read(files)
    apart = _without_bytes(raw)
    raw, lost = _find_images(raw, apart, Path(image_root or folder).expanduser())
    rows = _to_schema(raw, name, columns)
    meta = folder / "meta_files"
    if kind == "train":
        rows = join_meta(rows, meta)
    decode_all = len(rows) <= DECODE_ALL_UP_TO or on_bad_rows == "skip"
    # Files that this process has checked before, as when a notebook trains several models, are not
    # checked again. If images are in separate files, rows are always checked, because an image may
    # have changed although the parquet file has not.
    state = (name, kind, decode_all, *map(_state_of, [*files, *sorted(meta.rglob("*.json"))]))
    problems: Problems = {}
    if apart or state not in _FAULTLESS:
        problems = find_problems(
            rows,
            place_of,
            preference=preference,
            images=decode_all,
            turns=_has_turns(files[0]),
            unopened=lost,
        )
    if not (apart or problems):
        _FAULTLESS.add(state)
    for index, reason in lost.items():
        problems[index] = [*problems.get(index, ()), f"{place_of(index)} image: {reason}"]
    source = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return without_bad_rows(rows, problems, source, on_bad_rows)


_FAULTLESS: set[tuple[object, ...]] = set()  # states of files that this process found good


def _state_of(path: Path) -> tuple[str, int, int]:
    """A file's path, modification time and size. They differ after the file was written again."""
    status = path.stat()
    return str(path.absolute()), status.st_mtime_ns, status.st_size


def shards(folder: Path, pattern: str) -> list[Path]:
    """The files of a split.

    Raises:
        InputError: There are no files, or shards such as `-00003-of-00008` are missing.
    """
    files = sorted(folder.glob(f"{pattern}.parquet"))
    if not files:
        raise InputError(f"no {pattern}.parquet under {folder}; expected SPA-VL's Hub layout")
    numbers = [re.search(r"-(\d{5})-of-(\d{5})", f.name) for f in files]
    totals = {int(c.group(2)) for c in numbers if c}
    if totals:
        present = {int(c.group(1)) for c in numbers if c}
        missing = sorted(set(range(max(totals))) - present)
        if missing or len(totals) > 1 or len(files) != max(totals):
            raise InputError(
                f"{files[0].parent}: {len(files)} of {max(totals)} shards of {files[0].stem}"
                f"{', missing ' + ', '.join(f'{m:05d}' for m in missing) if missing else ''}"
            )
    return files


def check_shards(files: list[Path], required: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Check every file's footer.

    Args:
        files: Parquet files.
        required: Columns that each file must have: `image`, and columns of text.

    Returns:
        Each file with its number of rows.

    Raises:
        InputError: A file is damaged, lacks a column or has a column of another type, or there are
            no rows. The message lists each file.
    """
    problems, counted = [], []
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            problems.append(f"cannot read {path}: {str(error).splitlines()[0]}")
            continue
        counted.append((path, rows))
        missing = [c for c in required if c not in schema.names]
        if missing:
            columns = ", ".join(schema.names)
            problems.append(f"{path}: missing column {', '.join(missing)} (it has {columns})")
        for column in set(required) & set(schema.names):
            kind = schema.field(column).type
            if column == "image" and not _holds_images(kind):
                problems.append(f"{path}: column image is {kind}, not images")
            elif column != "image" and not _holds_text(kind):
                problems.append(f"{path}: column {column} is {kind}, not text")
    if not problems and not sum(rows for _, rows in counted):
        problems.append(f"{files[0]}: no rows")
    raise_all(problems, str(files[0].parent))
    return counted


def _holds_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return _holds_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_turns(path: Path) -> bool:
    """Whether the file's metadata, written by `data.convert`, allow questions of several turns."""
    return HAS_TURNS in (pq.read_schema(path).metadata or {})


def _read(files: list[Path]) -> Dataset:
    """The files as one memory-mapped set."""
    try:
        rows = open_tables(files)
        return rows.cast_column("image", Image(decode=False))
    except Exception as error:  # pyarrow and `datasets` raise errors of many classes
        damaged = [line for f in files for line in _damage(f)]
        raise InputError(
            "\n  ".join(damaged) or f"cannot read {files[0]} (or another shard): {error}"
        ) from error


def _damage(path: Path) -> list[str]:
    """A line for each row group in the file that cannot be read."""
    lines, start = [], 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                file.read_row_group(group)
            except (pa.ArrowException, OSError) as error:
                rows = f"rows {start} to {start + count - 1}"
                lines.append(f"cannot read {path}, {rows}: {str(error).splitlines()[0]}")
            start += count
    return lines


def _to_schema(rows: Dataset, name: str, columns: tuple[str, ...]) -> Dataset:
    renames = {k: v for k, v in HUB_RENAMES.items() if k in rows.column_names}
    rows = rows.remove_columns([v for v in renames.values() if v in rows.column_names])
    rows = rows.rename_columns(renames)
    added = {c: [""] * len(rows) for c in columns if c not in rows.column_names}
    if "id" in added:
        added["id"] = [f"{name}/{i}" for i in range(len(rows))]
    if "image_name" in added:
        added["image_name"] = [Path(p or "").name for p in _paths(rows)]
    rows = rows.select_columns([c for c in rows.column_names if c in columns and c not in added])
    rows = concatenate_datasets([rows, text_columns(added)], axis=1).select_columns(list(columns))
    text = [c for c in columns if c != "image" and rows.features[c] != Value("string")]
    return rows.cast(features(columns)) if text else rows


def _paths(rows: Dataset) -> list[str | None]:
    column = rows.data.column("image")
    return pa.chunked_array([pc.struct_field(c, "path") for c in column.chunks]).to_pylist()


def _without_bytes(rows: Dataset) -> list[int]:
    """Numbers of the rows whose image is text: a path, or the file's bytes in base64."""
    column = rows.data.column("image")  # in chunks, because the whole may exceed Arrow's 2 GiB
    without_bytes = pc.and_(pc.is_valid(column), pc.is_null(pc.struct_field(column, "bytes")))
    return pc.indices_nonzero(without_bytes).to_pylist()


def _find_images(rows: Dataset, texts: list[int], root: Path) -> tuple[Dataset, dict[int, str]]:
    """Replace text by the image that it names.

    Args:
        rows: Rows with a column `image`.
        texts: Numbers of the rows whose image is text, from `_without_bytes`.
        root: Folder that paths start from; no path may lead out of it.

    Returns:
        The rows with images, and row number -> reason for each image that was not found.
    """
    cells: dict[int, dict] = {}
    lost: dict[int, str] = {}
    for index in texts:
        try:
            cells[index] = image_cell(rows[index]["image"], root)
        except ImageError as error:
            lost[index] = str(error)
    if not cells:
        return rows, lost

    def put(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        pairs = zip(batch["image"], indices, strict=True)
        return {"image": [cells.get(index, cell) for cell, index in pairs]}

    return rows.map(put, with_indices=True, batched=True, features=rows.features), lost


def _image_files(tables: list[Path], root: Path) -> list[Path]:
    """Image files that the rows of some tables name; none if a table cannot be read."""
    named: set[Path] = set()
    for path in tables:
        with contextlib.suppress(pa.ArrowException, OSError):  # reported when the rows are read
            for cell in _image_texts(path):
                with contextlib.suppress(ImageError):
                    found = image_cell(cell, root)["path"]
                    named |= {Path(found)} if found else set()
    return sorted(named)


def _image_texts(path: Path) -> Iterator[Any]:
    """Image cells without bytes. Row groups whose statistics show no such cell are not read."""
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        kind = file.schema_arrow.field("image").type if "image" in names else pa.null()
        for group in range(file.num_row_groups if not pa.types.is_null(kind) else 0):
            facts = file.metadata.row_group(group)
            leaves = (facts.column(n) for n in range(facts.num_columns))
            bytes_of = [leaf for leaf in leaves if leaf.path_in_schema == "image.bytes"]
            if bytes_of and bytes_of[0].statistics and bytes_of[0].statistics.null_count == 0:
                continue
            for cell in file.read_row_group(group, columns=["image"]).column("image"):
                if cell.is_valid and (not bytes_of or not cell["bytes"].is_valid):
                    yield cell.as_py()
