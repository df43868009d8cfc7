"""Column maps: most benchmarks are one file whose columns only need to be named."""

import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spavl_lib.evaluation.benchmarks.reading import Reader, Record

# A text with the names of columns in braces, such as `images/{image}`; or a function of a record.
Template = str | Callable[[Mapping[str, Any]], str]
FORMS = {"csv": "table", "tsv": "table", "jsonl": "lines", "json": "objects"}


@dataclass(frozen=True)
class Columns:
    """How the records of one file become rows.

    Every column that a template names must be in every record. Columns that the prompt names must
    hold text that is not empty.
    """

    file: str
    prompt: Template = "{prompt}"
    id: str = ""
    """Template of the native id; empty takes the record's number, counted from 0."""
    image: str | Callable[[Mapping[str, Any]], str | Path] = ""
    """The image's path below a root; empty for none. A function may also return a `Path`, which is
    used unchanged."""
    context: Template = ""
    category: Template = ""
    reference: Template = ""
    variant: Template = ""
    group: Template = ""
    """What the records of a group have in common; empty makes each record its own group."""
    expect: Template = "decline"
    rule: Template = "general"
    columns: tuple[str, ...] = ()
    """Further columns that every record must have."""
    texts: tuple[str, ...] = ()
    """Further columns that must hold text that is not empty."""
    allowed: Mapping[str, Collection[Any]] = field(default_factory=dict)
    """Column -> the values that it may have."""
    check: Callable[[Mapping[str, Any]], Iterable[str]] | None = None
    """Returns a sentence for each other fault of a record."""
    where: Callable[[Mapping[str, Any]], bool] | None = None
    """Which records belong to the subset; None takes all."""
    keyed: str | None = None
    """For a JSON file that holds an object of objects: the word for its keys in messages. The key
    is then the column `_key`."""
    load: Callable[[Reader], Iterable[Record]] | None = None
    """Returns the records, if they come from several files or if one record gives several rows."""
    also: tuple[str, ...] = ()
    """Further files without which the subset cannot be read."""
    form: str = ""
    """`table`, `lines` or `objects`; if empty, the file's suffix decides."""
    hint: str = ""
    """Added to the message if a column is missing."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files without which the subset cannot be read."""
        return (self.file, *self.also) if self.file else self.also

    def records(self, reader: Reader) -> list[Record]:
        """The file's sound records, in order. Problems are noted in the reader."""
        records = list(self.load(reader)) if self.load else self._of_file(reader)
        sound = [record for record in records if self._is_sound(record)]
        if self.id:
            name = ", ".join(names_in(self.id))
            reader.unique(((filled(self.id, record), record) for record in sound), name)
        return sound

    def _of_file(self, reader: Reader) -> list[Record]:
        form = self.form or FORMS[self.file.rpartition(".")[2]]
        if form == "table":
            return reader.table(self.file, self.needed(), self.hint)
        if form == "lines":
            return reader.lines(self.file)
        id_key = next(iter(names_in(self.id)), "")
        return reader.objects(self.file, keyed=self.keyed, id_key=id_key)

    def needed(self) -> list[str]:
        """All columns that every record must have."""
        templates = (
            self.id, self.prompt, self.image, self.context, self.category, self.reference,
            self.variant, self.group,
        )  # fmt: skip
        named = [name for template in templates for name in names_in(template)]
        named += [*self.columns, *self.texts, *self.allowed]
        return list(dict.fromkeys(named))

    def _is_sound(self, record: Record) -> bool:
        before = len(record.reader.problems)
        texts = (*names_in(self.prompt, nested=False), *self.texts)
        for name in self.needed():
            if name in texts:
                record.text(name)
            elif name not in record.fields:
                record.problem(f"no {name!r}")
            elif name in self.allowed:
                record.choice(name, self.allowed[name])
        if self.check and len(record.reader.problems) == before:
            for why in self.check(record.fields):
                record.problem(why)
        return len(record.reader.problems) == before

    def parts(self, reader: Reader) -> Iterator[dict[str, Any]]:
        """The fields of each row, as `Benchmark.row` takes them."""
        for number, record in enumerate(self.records(reader)):
            if self.where and not self.where(record.fields):
                continue
            parts: dict[str, Any] = {
                name: filled(getattr(self, name), record)
                for name in (
                    "prompt", "context", "category", "reference", "variant", "group", "expect",
                    "rule",
                )
            }  # fmt: skip
            parts["native"] = filled(self.id, record) if self.id else str(number)
            image = self.image(record.fields) if callable(self.image) else self.image
            if image and isinstance(image, str):
                image = reader.image(image.format_map(record.fields), record) or ""
            yield parts | {"image": image or None, "source_sha": reader.source(record)}


def filled(template: Template, record: Record) -> str:
    """Fill a template with a record's values."""
    return template(record.fields) if callable(template) else template.format_map(record.fields)


def names_in(template: object, *, nested: bool = True) -> list[str]:
    """The columns that a template names; an empty list if the template is a function.

    Args:
        template: The template.
        nested: Whether to include a column of which the template takes only a part, such as
            `{options[A]}`.
    """
    if not isinstance(template, str):
        return []
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    return [name.partition("[")[0] for name in names if nested or "[" not in name]
