"""SPA-VL's HarmEval and HelpEval: 265 harmful and 265 harmless questions about images.

Three sets are called HarmEval in the literature. This is the one of Zhang et al. 2024 (SPA-VL).
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.lib
import pyarrow.parquet as pq

from spavl_lib.data.load import SPA_VL
from spavl_lib.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Reader,
    Record,
    register_benchmark,
)

COLUMNS = ("image", "question", "class1", "class2", "class3")
PREFERENCES = ("chosen", "rejected")


@register_benchmark("spa_vl")
class SpaVL(Benchmark):
    """The rows' native ids are their positions, counted from 0, as the original's code counts."""

    title = "SPA-VL: its own HarmEval (harm, 265) and HelpEval (help, 265)"
    licence = "CC BY 4.0"
    homepage = "hf:sqrti/SPA-VL"
    roots = ("", "test")
    hub = (*SPA_VL, ("test/*.parquet", "README.md"))

    def subset_names(self) -> tuple[str, ...]:
        """`harm` and `help`."""
        return "harm", "help"

    def needed_files(self, subset: str) -> tuple[str, ...]:
        """A subset is one parquet file, as on the Hub; or JSONL, with images in `images/`."""
        return (f"{subset}-00000-of-00001.parquet|{subset}.jsonl",)

    def rows(self, subset: str, reader: Reader) -> Iterator[BenchmarkRow]:
        """The rows of one set."""
        parquet, _, lines = self.needed_files(subset)[0].partition("|")
        file = parquet if reader.find(parquet) else lines
        records = _of_parquet(file, reader) if file == parquet else reader.lines(file)
        harmful = subset == "harm"
        for index, record in enumerate(records):
            if any(name in record.fields for name in PREFERENCES):
                record.problem("preference columns: this is the training split, not the test")
                continue
            if missing := [name for name in COLUMNS if name not in record.fields]:
                record.problem(f"no {', '.join(map(repr, missing))}")
                continue
            yield self.row(
                subset,
                reader.sha(file),
                native=str(index),
                prompt=record.text("question"),
                image=_image(record),
                expect="decline" if harmful else "answer",
                category="/".join(str(record.fields[f"class{n}"]) for n in (1, 2, 3)),
                rule="general" if harmful else "answer",
            )


def _image(record: Record) -> Path | None:
    cell = record.fields["image"]
    if isinstance(cell, dict) and cell.get("bytes"):
        return record.reader.stored_image(cell["bytes"], record)
    name = cell.get("path") if isinstance(cell, dict) else cell
    return record.reader.image(f"images/{name}" if name else "", record)


def _of_parquet(file: str, reader: Reader) -> Iterator[Record]:
    path = reader.find(file)
    if path is None:
        return
    reader.hash(file, path)
    try:
        rows = pq.read_table(path).to_pylist()
    except (pyarrow.lib.ArrowException, OSError) as error:
        reader.problem(reader.shown(path), "file", f"damaged parquet: {error}")
        return
    for index, fields in enumerate(rows):
        yield Record(reader, reader.shown(path), f"row {index}", fields)
