"""SPA-VL's HarmEval and HelpEval: 265 harmful and 265 harmless questions about images.

Three sets are called HarmEval in the literature. The set here is by Zhang et al. 2024 (SPA-VL).
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from spavl_lib.data.load import SPA_VL
from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register


def _records(file: str, reader: Reader) -> Iterator[Record]:
    """The records with their position and their image. `file` is `PARQUET|JSONL`."""
    path = reader.find(file)
    if path is None:
        reader.problem(file.replace("|", " or "), "file", "is not there")
        return
    read = reader.parquet if path.suffix == ".parquet" else reader.lines
    for index, record in enumerate(read(path.name)):
        if "chosen" in record.fields or "rejected" in record.fields:
            record.problem("preference columns: this is the training split, not the test")
        elif "image" not in record.fields:
            record.problem("no 'image'")
        else:
            yield record.having(_index=index, _image=_image(record) or "")


def _image(record: Record) -> Path | None:
    cell = record.fields["image"]
    if isinstance(cell, dict) and cell.get("bytes"):
        return record.reader.stored_image(cell["bytes"], record)
    name = cell.get("path") if isinstance(cell, dict) else cell
    return record.reader.image(f"images/{name}" if name else "", record)


def _columns(name: str, expect: str, rule: str) -> Columns:
    file = f"{name}-00000-of-00001.parquet|{name}.jsonl"
    return Columns(
        file,
        load=functools.partial(_records, file),
        id="{_index}",
        prompt="{question}",
        image=lambda record: record["_image"],
        category="{class1}/{class2}/{class3}",
        expect=expect,
        rule=rule,
    )


@register("spa_vl")
class SpaVL(Benchmark):
    """A row's native id is its position, counted from 0 as in the original's code. A set is one
    parquet file, as on the Hub, or a JSONL file with its images in `images/`."""

    title = "SPA-VL: its own HarmEval (harm, 265) and HelpEval (help, 265)"
    licence = "CC BY 4.0"
    homepage = "hf:sqrti/SPA-VL"
    roots = ("", "test")
    hub = (*SPA_VL, ("test/*.parquet", "README.md"))
    subsets = {
        "harm": _columns("harm", "decline", "general"),
        "help": _columns("help", "answer", "answer"),
    }
