"""A killed process loses no record that was written, and a damaged file is refused."""

from pathlib import Path

import pytest

from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmark_runs.journal import Journal


def test_records_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    texts = ["plain", "line\nbreak", "\u2028 and \x0c", "half a pair \ud800", "ñ"]
    Journal(path).append({"id": str(i), "text": text} for i, text in enumerate(texts))
    again = Journal(path)
    again.append([{"id": "more", "text": ""}])
    assert [r["text"] for r in Journal(path).records.values()] == [*texts, ""]


@pytest.mark.parametrize("tail", [b'{"id": "b", "te', b'{"id": "b"}', b"\xff\xfe"])
def test_an_incomplete_last_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path).append([{"id": "a"}])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    journal = Journal(path)
    assert list(journal.records) == ["a"]
    assert path.read_bytes() == whole
    journal.append([{"id": "b"}])
    assert list(Journal(path).records) == ["a", "b"]


def test_all_damaged_lines_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "a"}\n{"id": \n[1]\n{"no": "id"}\n{"id": "a"}\n')
    with pytest.raises(InputError) as caught:
        Journal(path)
    message = str(caught.value)
    assert all(f"line {n}: not a JSON object with an id" in message for n in (2, 3, 4))
    assert "line 5: a second record for a" in message


def test_an_id_is_written_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append([{"id": "a"}])
    with pytest.raises(InputError, match="a second record for a"):
        journal.append([{"id": "a"}, {"id": "b"}])
    assert list(Journal(journal.path).records) == ["a"]
    with pytest.raises(InputError, match="a second record for c"):
        journal.append([{"id": "c"}, {"id": "c"}])
