"""Answers made elsewhere: every form is read, and no answer goes to the wrong row."""

import json
from pathlib import Path

import pytest

from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmarks import BenchmarkRow, load_benchmark
from spavl_lib.evaluation.benchmarks.answers import match_answers, read_answers
from tests.evaluation.benchmark_files import write_fixture


@pytest.fixture
def rows(tmp_path: Path) -> tuple[BenchmarkRow, ...]:
    """Four questions of POPE."""
    folder = write_fixture(tmp_path / "pope", "pope")
    return load_benchmark("pope:popular", folder=folder, allow_changed=True).rows


def written(tmp_path: Path, name: str, lines: list[dict] | list[str]) -> Path:
    path = tmp_path / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return path


def lmms(number: int, text: str, **changes: object) -> dict:
    question = f"Is there a {('kettle', 'kite', 'comb', 'boat')[number - 1]} in the image?"
    return {
        "doc_id": number - 1,
        "doc": {"id": str(number + 90), "question_id": str(number), "category": "popular"},
        "input": f"{question}\nAnswer with one word.",
        "target": ("yes", "no")[number % 2],
        "resps": [[text]],
        "filtered_resps": [text],
    } | changes


def test_every_form_is_read(rows: tuple[BenchmarkRow, ...], tmp_path: Path) -> None:
    forms = {
        "a.json": [json.dumps([{"id": 1, "query": rows[0].prompt, "response": "Yes"}])],
        "b.json": ['{"1": "Yes"}'],
        "c.jsonl": [{"id": rows[0].id, "response": "Yes"}],
        "d.jsonl": [{"question_id": 1, "prompt": rows[0].prompt, "text": "Yes"}],
        "e.jsonl": [lmms(1, "Yes")],
        "f.tsv": ["index\tquestion\tanswer\tprediction", f"1\t{rows[0].prompt}\tNo\tYes"],
    }
    for name, lines in forms.items():
        matched = match_answers(read_answers(written(tmp_path, name, lines)), rows)
        assert matched.responses == {"pope:popular:1": "Yes"}, name
        assert matched.unanswered == tuple(f"pope:popular:{n}" for n in (2, 3, 4))


def test_empty_answers_are_kept(rows: tuple[BenchmarkRow, ...], tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", [{"id": 2, "response": ""}])
    assert match_answers(read_answers(path), rows).responses == {"pope:popular:2": ""}


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("a.jsonl", [{"id": 9, "response": "?"}], "a.jsonl: line 1: nobody asked id 9"),
        ("a.jsonl", [{"id": 1, "response": "a"}, {"id": "1", "response": "b"}],
         "line 2: id 1 twice, with different answers"),
        ("a.jsonl", [{"id": 1, "response": "a"}, {"id": "pope:popular:1", "response": "b"}],
         "line 2: a second answer for pope:popular:1"),
        ("a.jsonl", [{"id": 1, "response": "a", "query": "Is there a comb?"}],
         "line 1: its question is not that of pope:popular:1"),
        ("a.jsonl", [lmms(1, "Yes", target="yes")], "its right answer is 'yes', not that of"),
        ("a.jsonl", [{"id": 1}], "line 1: no answer as text"),
        ("a.jsonl", [{"response": "a"}], "line 1: no id"),
        ("a.jsonl", ['{"id": 1, "response": "a"}', '{"id": 2, "resp'], "line 2: not JSON"),
        ("a.tsv", ["index\tquestion", "1\tx"], "no 'prediction' column"),
        ("a.json", ["[]"], "no answers"),
        ("a.xlsx", ["?"], "save another table as .tsv"),
    ],
)  # fmt: skip
def test_answers_that_belong_to_no_row_are_refused(
    rows: tuple[BenchmarkRow, ...], tmp_path: Path, name: str, lines: list, reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        match_answers(read_answers(written(tmp_path, name, lines)), rows)
    assert reason in str(caught.value)


def test_an_id_of_two_sets_must_name_its_set(
    rows: tuple[BenchmarkRow, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "pope"
    (folder / "coco_pope_random.json").write_bytes((folder / "coco_pope_popular.json").read_bytes())
    both = load_benchmark("pope:popular+random", folder=folder, allow_changed=True).rows
    path = written(tmp_path, "a.jsonl", [{"id": 1, "response": "Yes"}])
    with pytest.raises(InputError, match="id 1 may be pope:popular:1 or pope:random:1"):
        match_answers(read_answers(path), both)
    path = written(tmp_path, "b.jsonl", [lmms(1, "Yes"), lmms(2, "No")])
    matched = match_answers(read_answers(path), both)
    assert list(matched.responses) == ["pope:popular:1", "pope:popular:2"]
    assert len(matched.unanswered) == 6
