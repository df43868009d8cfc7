"""The interface of a data source, and the table of all sources.

The setting `data.source` names the source of a run.

To add a source, subclass `Source` and register it:

    @register_source("forum")
    class Forum(Source):
        def preferences(self, split): ...
        def files(self, split): ...

If the class is in a separate package, the pyproject.toml of this package names it as an entry
point: `forum = "package.module:Forum"` below `[project.entry-points."spavl.sources"]`.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.config.registry import Registry
from spavl_lib.data.problems import Loaded
from spavl_lib.data.set_names import UNSEEN
from spavl_lib.errors import InputError

# Names of the evaluation sets. `evaluation.suite` computes rates over the rows of each set.
EVAL_SETS = ("harm", "help", "look_alikes", "twins", "twins_exchanged")


class Source:
    """A source of preference rows. A subclass implements at least `preferences` and `files`."""

    eval_sets: tuple[str, ...] = ()
    """Evaluation sets that `prompts` can give. If the data have none of these sets (`has_prompts`),
    the evaluation sets of SPA-VL mini are used."""
    held_out_drawings: tuple[str, ...] = ()
    """Evaluation sets that also exist with drawings in a style not seen in training."""
    unseen_style: str = UNSEEN
    """That style; the sets are called `NAME_STYLE`."""

    def __init__(self, config: DataConfig):
        self.config = config

    @property
    def folder(self) -> Path:
        """The folder or file that `data.path` names.

        Raises:
            InputError: `data.path` is empty or does not exist.
        """
        path = self.config.path
        if not path:
            raise InputError(f"data.path is empty, but data.source is {self.config.source!r}")
        if not Path(path).expanduser().exists():
            raise InputError(f"data.path {path!r} does not exist")
        return Path(path).expanduser()

    def preferences(self, split: str) -> Loaded:
        """All preference rows of `train` or `validation`, in the schema of `data.schema`.

        Raises:
            InputError: Files or columns are missing, or rows are bad. The message names all of
                them.
        """
        raise NotImplementedError

    def files(self, split: str) -> Iterable[Path]:
        """The files that a split or an evaluation set is read from, in a fixed order."""
        raise NotImplementedError

    def prompts(self, name: str) -> Dataset:
        """All rows of one of `eval_sets`, in the schema of `data.schema`."""
        raise NotImplementedError

    def has_prompts(self, name: str) -> bool:
        """Whether the data have the evaluation set; `name` is one of `eval_sets`."""
        return True

    def truth(self) -> dict[str, dict]:
        """Row id -> ground-truth labels of the row; empty if the source has none."""
        return {}

    def held_out(self) -> dict[str, Any] | None:
        """How held-out rows are drawn from the training rows; None if they are not drawn."""
        return None

    def answer_sources(self, rows: Dataset) -> tuple[list[set[str]], list[set[str]]]:
        """Names of those who gave each row's chosen response, and each row's rejected response.

        Raises:
            InputError: The source does not record who gave which response.
        """
        raise InputError(
            f"data.answer_sources: source {self.config.source!r} does not record who gave which "
            "answer; leave it empty"
        )

    def sha256(self, split: str) -> str:
        """Hash of the names and bytes of all files that a split is read from."""
        digest = hashlib.sha256()
        for path in self.files(split):
            head = f"{path.name}\0{path.stat().st_size}\0"
            digest.update(head.encode("utf-8", "surrogateescape"))
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()


SOURCES: Registry[type[Source]] = Registry("data source", "spavl.sources", "data.source")
register_source = SOURCES.register


def open_source(config: DataConfig) -> Source:
    """The source that `data.source` names.

    Raises:
        InputError: There is no source of that name.
    """
    return SOURCES.find(config.source)(config)
