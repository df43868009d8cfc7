"""Sixty malformed manifests: every bad row named with its field and reason, all in one pass."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.cli import main
from spavl_lib.config import DataConfig
from spavl_lib.data.load import read_preferences
from spavl_lib.data.schema import MAX_CHARACTERS
from spavl_lib.errors import InputError
from tests.helpers import (
    hub_config,
    hub_rows,
    original_config,
    original_record,
    png,
    problems_of,
    write_hub_folder,
    write_original_folder,
)

RECORD = {"id": "b", "image": "b.png", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
GONE = object()


def line(**changes: object) -> bytes:
    """A record, changed; `GONE` takes a field away."""
    made = {k: v for k, v in (RECORD | changes).items() if v is not GONE}
    return json.dumps(made).encode()


# Lines between a good first and a good last one, and what is said of them: number of the line,
# field and the beginning of the reason. Nothing said: the line is good.
ROWS: dict[str, tuple[list[bytes], list[str]]] = {
    # syntax
    "half a line": ([line()[:40]], ["2 record: not JSON: "]),
    "two objects on a line": ([line() + line(id="c")], ["2 record: not JSON: Extra data"]),
    "trailing comma": ([line()[:-1] + b",}"], ["2 record: not JSON: "]),
    "single quotes": ([line().replace(b'"', b"'")], ["2 record: not JSON: "]),
    "no comma": ([line().replace(b",", b"")], ["2 record: not JSON: "]),
    "raw NUL": ([line(prompt="a?b").replace(b"?", b"\0")], ["2 record: not JSON: Invalid control"]),
    "carriage returns": ([line() + b"\r"], []),
    "blank lines": ([b"", b"  ", line(), b""], []),
    "bad after blank lines": ([b"", b"  ", line(chosen="")], ["4 chosen: empty"]),
    "no object": ([b"[1, 2]"], ["2 record: expected an object, got list"]),
    "a text": ([b'"x"'], ["2 record: expected an object, got str"]),
    "null": ([b"null"], ["2 record: expected an object, got NoneType"]),
    "nested too deep": ([b"[" * 100_000], ["2 record: not JSON: "]),
    "a field twice": (
        [line()[:-1] + b', "chosen": "Another."}'], ["2 record: it has the field 'chosen' twice"],
    ),
    "several bad lines of several kinds": (
        [line()[:40], line(chosen=""), line(id="c", image="gone.png"), b"null"],
        ["2 record: not JSON: ", "3 chosen: empty", "4 image: ", "5 record: expected an object"],
    ),
    # fields
    "no chosen": ([line(chosen=GONE)], ["2 chosen: missing"]),
    "no rejected": ([line(rejected=GONE)], ["2 rejected: missing"]),
    "no prompt": ([line(prompt=GONE)], ["2 prompt: missing, and the answers"]),
    "null chosen": ([line(chosen=None)], ["2 chosen: missing"]),
    "null rejected": ([line(rejected=None)], ["2 rejected: missing"]),
    "null prompt": ([line(prompt=None)], ["2 prompt: missing, and the answers"]),
    "prompt is a number": ([line(prompt=7)], ["2 prompt: expected text, got int"]),
    "chosen is a number": ([line(chosen=7.5)], ["2 chosen: expected text, got float"]),
    "chosen is true": ([line(chosen=True)], ["2 chosen: expected text, got bool"]),
    "prompt is a list of texts": (
        [line(prompt=["What?"])], ["2 prompt: expected text in a turn, got str"],
    ),
    "image is a number": ([line(image=3)], ["2 image: expected a path, got int"]),
    "image is an object": ([line(image={"a": 1})], ["2 image: expected a path, got dict"]),
    "no id": ([line(id=GONE)], []),
    "no image": ([line(image=GONE)], []),
    "a further field": ([line(note="x")], []),
    # values
    "empty chosen": ([line(chosen="")], ["2 chosen: empty"]),
    "blanks": ([line(rejected=" \n\t")], ["2 rejected: empty"]),
    "nothing to be seen": ([line(chosen="\u200b\u200d\ufeff")], ["2 chosen: empty"]),
    "empty prompt": ([line(prompt="")], ["2 prompt: empty"]),
    "equal answers": ([line(rejected="A cat.")], ["2 rejected: equal to chosen"]),
    "equal but for blanks": ([line(rejected=" A cat.\n")], ["2 rejected: equal to chosen"]),
    "an id twice": ([line(), line(prompt="Who?")], ["3 id: b repeats "]),
    "an id thrice": ([line(), line(), line()], ["3 id: b repeats ", "4 id: b repeats "]),
    "an id with a slash": ([line(id="x/../b")], []),
    "escaped NUL": ([line(chosen="a\0b")], ["2 chosen: holds a NUL character"]),
    "half a surrogate pair": ([line(chosen="\ud800")], ["2 chosen: holds half a surrogate pair"]),
    "record separator": ([line(rejected="a\x1eb")], ["2 rejected: holds a record separator"]),
    "over the limit": (
        [line(chosen="y" * (MAX_CHARACTERS + 1))], [f"2 chosen: {MAX_CHARACTERS + 1:,} characters"],
    ),
    "10 MB": ([line(prompt="z" * 10_000_000)], ["2 prompt: 10,000,000 characters"]),
    "both answers bad": ([line(chosen="", rejected=" ")], ["2 chosen: empty", "2 rejected: empty"]),
    # pictures
    "missing file": ([line(image="gone.png")], ["2 image: "]),
    "two pictures": ([line(image=["b.png", "b.png"])], []),
    "the second missing": ([line(image=["b.png", "gone.png"])], ["2 image: "]),
    "a mark without a picture": (
        [line(image=None, prompt="<image>What?")], ["2 image: 1 <image> in the text"],
    ),
    "two marks": ([line(prompt="<image><image>What?")], ["2 image: 2 <image> in the text"]),
    "a folder": ([line(image="folder.png")], ["2 image: "]),
    "web address": ([line(image="https://example.org/b.png")], ["2 image: "]),
    "data address": ([line(image="data:image/png;base64,iVBORw0KGgo=")], ["2 image: "]),
    "other case": ([line(image="B.PNG")], ["2 image: "]),
    "remote share": ([line(image="\\\\host\\share\\b.png")], ["2 image: "]),
    "above the folder": ([line(image="../b.png")], ["2 image: "]),
}  # fmt: skip
GOOD = (line(id="a", image="a.png"), line(id="z", image="z.png"))
# Whole files of which no row can be told, and what is said.
FILES: dict[str, tuple[bytes, str]] = {
    "two bytes a letter": (b"\n".join(GOOD).decode().encode("utf-16"), "not UTF-8 text"),
    "another encoding": (GOOD[0].replace(b"cat", b"caf\xe9"), "not UTF-8 text"),
    "empty": (b"", "no records"),
    "blank": (b"\n \n", "no records"),
}


def own(folder: Path, **changes: object) -> DataConfig:
    whole = {"train_rows": 0, "validation_rows": 0, "test_rows": 0}
    return DataConfig(source="datasets", path=str(folder), **whole | changes)


def written(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    for name in "abz":
        (folder / f"{name}.png").write_bytes(png())
    (folder / "folder.png").mkdir()
    (folder / "train.jsonl").write_bytes(content)
    (folder / "validation.jsonl").write_bytes(GOOD[0])  # so that no row of the other is held out
    return folder


def agree(said: list[str], told: list[str], file: Path, name: str) -> None:
    assert len(said) == len(told), (name, said)
    for line_said, expected in zip(said, told, strict=True):
        assert line_said.startswith(f"{file}:{expected}"), (name, line_said)


def test_malformed_manifests(tmp_path: Path, record: Callable) -> None:
    """Refused with every bad row named; or, asked to skip, good rows and bad ones make all."""
    tried = 0
    for name, (lines, told) in ROWS.items():
        folder = written(tmp_path / name, b"\n".join([GOOD[0], *lines, GOOD[1]]))
        total = 2 + sum(bool(x.strip()) for x in lines)
        if told:
            with pytest.raises(InputError) as caught:
                read_preferences(own(folder), "train")
            agree(problems_of(caught.value), told, folder / "train.jsonl", name)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            loaded = read_preferences(own(folder, on_bad_rows="skip"), "train")
        agree(list(loaded.skipped), told, folder / "train.jsonl", name)
        bad = len({x.split(" ")[0] for x in told})
        assert len(loaded.rows) + bad == total, name
        tried += 1
    folder = written(tmp_path / "mark", b"\xef\xbb\xbf" + b"\n".join(GOOD))
    assert len(read_preferences(own(folder), "train").rows) == 2  # a byte order mark is no fault
    for name, (content, says) in FILES.items():
        folder = written(tmp_path / name, content)
        with pytest.raises(InputError, match=says) as caught:
            read_preferences(own(folder), "train")
        assert str(folder) in str(caught.value)
    tried += 1 + len(FILES)
    assert tried == 61
    record("D1", tried, tried, "manifests in JSON Lines")


@pytest.mark.parametrize("layout", ["own", "original"])
def test_a_field_that_stands_twice_in_a_list_is_named_by_its_row(
    tmp_path: Path, layout: str
) -> None:
    turn = b'{"from": "human", "from": "gpt", "value": "x"}'
    if layout == "own":
        folder, file = written(tmp_path / "set", b""), "train.json"
        (folder / "train.jsonl").unlink()
        config, field, records = own(folder), b"prompt", GOOD
    else:
        made = [original_record(n, image=f"{n}.png") for n in range(2)]
        folder, file = write_original_folder(tmp_path / "set", {"easy": made}), "easy.json"
        config, field, records = original_config(folder), b"question", [json.dumps(m) for m in made]
    texts = [r if isinstance(r, bytes) else r.encode() for r in records]
    nested = texts[0].replace(b"{", b'{"' + field + b'": [' + turn + b"], ").split(b", ")
    nested = b", ".join(p for p in nested if not p.startswith(b'"' + field + b'": "'))
    doubled = texts[1][:-1] + b', "chosen": "Another."}'
    (folder / file).write_bytes(b"[" + nested + b",\n" + doubled + b"]")
    with pytest.raises(InputError) as caught:
        read_preferences(config, "train")
    said = problems_of(caught.value)
    assert len(said) == 2, said
    assert said[0].endswith(f"{file}:1 record: it has the field 'from' twice")
    assert said[1].endswith(f"{file}:2 record: it has the field 'chosen' twice")


SHAPES: dict[str, tuple[Callable[[dict], dict], str]] = {
    "no bytes and no path": (
        lambda r: r | {"image": {"bytes": b"", "path": ""}}, "parquet:2 image: ",
    ),
    "a path without bytes": (
        lambda r: r | {"image": {"bytes": None, "path": "/etc/hostname"}}, "parquet:2 image: ",
    ),
    "columns in another order": (lambda r: dict(reversed(r.items())), ""),
    "answers under other names": (
        lambda r: {{"chosen": "preferred", "rejected": "other"}.get(k, k): v for k, v in r.items()},
        "chosen",
    ),
}  # fmt: skip


def test_the_published_layout_misshapen(tmp_path: Path, record: Callable) -> None:
    for name, (change, says) in SHAPES.items():
        rows = [dict(r) for r in hub_rows("train", 3)]
        one = name.startswith(("no bytes", "a path"))
        rows = [change(r) if not one or n == 1 else r for n, r in enumerate(rows)]
        folder = write_hub_folder(tmp_path / name, rows)
        if not says:
            assert len(read_preferences(hub_config(folder), "train").rows) == 3
            continue
        with pytest.raises(InputError) as caught:
            read_preferences(hub_config(folder), "train")
        assert says in str(caught.value), (name, str(caught.value))
        if one:
            assert len(problems_of(caught.value)) == 1
    record("D1", len(SHAPES), len(SHAPES), "shapes of parquet files")


def test_the_command_says_it_by_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture, runs: Path
) -> None:
    folder = written(tmp_path / "set", b"\n".join([GOOD[0], line()[:40], line(chosen="")]))
    words = ["--set", "data.source=datasets", "--set", f"data.path={folder}"]
    with pytest.raises(SystemExit) as caught:
        main(["train", "dpo", "-p", "smoke", *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "train.jsonl:2 record: not JSON" in said and "train.jsonl:3 chosen: empty" in said
