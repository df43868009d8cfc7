"""Judges from another package: found by their entry point, checked early, used as any other."""

import dataclasses
from pathlib import Path

import pytest

from spavl_lib.config import EvaluationConfig
from spavl_lib.errors import InputError
from spavl_lib.evaluation import judges
from spavl_lib.evaluation.judges import (
    JUDGES,
    check_judge,
    judge_all,
    judge_names,
    make_judge,
    register_judge,
)
from tests.packages import install

# A package with a judge is two files: this module, and a pyproject.toml that names its function.
PACKAGE = ("word_judge", "spavl.judges words = word_judge:make")
MODULE = '''
from spavl_lib.evaluation.verdicts import Verdict


class WordJudge:
    """Calls a response harmful if it holds a word."""

    def __init__(self, word):
        self.word, self.name = word, f"words:{word}"

    def __call__(self, record):
        return Verdict(harmful=self.word in record["response"])


def make(settings, truth):
    return WordJudge(settings.judge_model or "bomb")
'''
DECORATED = """
from spavl_lib.evaluation.judges import register_judge


@register_judge("words", needs=["judge_model"])
""" + MODULE[MODULE.index("def make") :].replace("WordJudge", "dict")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch):
    """Forget what a test registers."""
    monkeypatch.setattr(judges, "JUDGES", dict(JUDGES))


def test_a_package_adds_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "words" not in judge_names()
    install(tmp_path, *PACKAGE, MODULE, monkeypatch)
    assert {"exact", "phrases", "words"} <= set(judge_names())
    judge = make_judge("words", {})
    assert judge.name == "words:bomb"
    records = [
        {"id": "0", "set": "harm", "response": "A bomb.", "image": b""},
        {"id": "1", "set": "help", "response": "A cake."},
    ]
    rows = judge_all(judge, records)
    assert [(row["harmful"], row["unsafe"]) for row in rows] == [(True, True), (False, None)]
    assert rows[0].keys() == {"id", "set", "response", "verdict", "harmful", "unsafe", "helpful"}
    assert make_judge("words", {}, EvaluationConfig(judge_model="x")).name == "words:x"


def test_a_package_says_what_its_judge_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, *PACKAGE, DECORATED, monkeypatch)
    with pytest.raises(InputError, match="words needs evaluation.judge_model"):
        make_judge("words", {})


def test_a_package_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, *PACKAGE, "import nothing_of_that_name", monkeypatch)
    with pytest.raises(InputError, match="cannot load judge 'words' from word_judge:make: Module"):
        make_judge("words", {})
    assert make_judge("phrases", {}).name == "phrases-v1"  # the others still work


def settings_of(judge: str, **changes: str) -> EvaluationConfig:
    """Settings with any name of a judge, as a config file can hold."""
    settings = dataclasses.replace(EvaluationConfig(), **changes)
    object.__setattr__(settings, "judge", judge)
    return settings


def test_a_wrong_judge_is_refused_before_any_work() -> None:
    with pytest.raises(
        InputError, match=r"'frases'; did you mean 'phrases'\? \(known: endp.*exact"
    ):
        check_judge(settings_of("frases"))
    for name, changes, field in [
        ("guard", {}, "judge_model"),
        ("endpoint", {"judge_model": "m"}, "judge_url"),
    ]:
        with pytest.raises(InputError, match=f"{name} needs evaluation.{field}"):
            check_judge(settings_of(name, **changes))
    with pytest.raises(InputError, match="exact knows only SPA-VL mini"):
        check_judge(settings_of("exact"), {})
    check_judge(settings_of("exact"), {"row": {}})
    check_judge(settings_of("endpoint", judge_model="m", judge_url="http://localhost:9/v1"))


def test_a_name_stands_for_one_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'exact' exists already"):
        register_judge("exact")(lambda settings, truth: None)
    for _ in range(2):  # a notebook's cell, run twice

        @register_judge("mine")
        def make(settings: EvaluationConfig, truth: dict) -> object:
            return object()

    with pytest.raises(InputError, match="'mine' has no `name`"):
        make_judge("mine", {})


def test_a_judge_returns_a_verdict() -> None:
    with pytest.raises(InputError, match="returned a dict; a judge returns a .*Verdict"):
        judge_all(lambda record: {"verdict": "complied"}, [{"response": "x"}])
