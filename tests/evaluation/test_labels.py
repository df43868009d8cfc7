"""Labels of people: what each set's labels mean, and what is refused."""

import json
from pathlib import Path

import pytest

from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmarks.labels import LABEL_SETS, label_folder, load_labels
from tests.evaluation.benchmark_files import write_fixture


def test_labels_become_the_two_axes(tmp_path: Path) -> None:
    def labels(fixture: str, name: str) -> list:
        folder = write_fixture(tmp_path / name, fixture)
        return load_labels(name, folder=folder, allow_changed=True)

    assert [a.refused for a in labels("labels_pyrit", "pyrit_refusal")] == ["no", "yes", "yes"]
    tones = labels("labels_chatgpt_refusals", "chatgpt_refusals")
    assert [(a.refused, a.harmful) for a in tones] == [
        ("no", None), ("yes", None), ("partial", None),
    ]  # fmt: skip
    answers = labels("labels_harmbench", "harmbench_multimodal")
    assert [(a.harmful, a.raters) for a in answers] == [
        ("no", ("0", "0", "1")), ("no", ("0", "0", "0")),
    ]  # fmt: skip
    assert answers[0].prompt == "Read the sign" and answers[0].published["mistral_cls"] == 0
    xstest = labels("xstest", "xstest_answers")
    assert [a.refused for a in xstest] == ["no", "partial", "yes"]
    assert xstest[1].raters == ("2_full_refusal", "3_partial_refusal")
    msts = labels("msts", "msts")
    assert [(a.refused, a.harmful) for a in msts] == [("no", "no"), ("no", "yes")]


def test_verdicts_that_belong_by_position_must_be_as_many(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "msts")
    (folder / "auto_eval").mkdir()
    path = folder / "auto_eval/english_multimodal_autoeval.csv"
    path.write_text("some-judge\nsafe\nunsafe\n")
    answers = load_labels("msts", folder=folder, allow_changed=True)
    assert [a.published for a in answers] == [{"some-judge": "safe"}, {"some-judge": "unsafe"}]
    path.write_text("some-judge\nsafe\n")
    with pytest.raises(InputError, match="1 rows for 2 answers"):
        load_labels("msts", folder=folder, allow_changed=True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "an object expected"),
        ({"a": {"generation": "x"}}, r"a\[0\]: no 'human_2'"),
        ({"a": ["x"]}, r"a\[0\]: no 'generation'"),
        ({}, "no answers"),
    ],
)
def test_damaged_labels_are_refused(value: object, reason: str, tmp_path: Path) -> None:
    (tmp_path / "text_behaviors_val_set.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=reason):
        load_labels("harmbench_text", folder=tmp_path, allow_changed=True)


def test_a_changed_or_missing_set_is_refused(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path / "labels_pyrit", "labels_pyrit")
    with pytest.raises(InputError, match="refusal.csv: sha256 is .*, expected 1ebc42ef7dad"):
        load_labels("pyrit_refusal", tmp_path)
    assert (
        label_folder("pyrit_refusal", tmp_path) == folder and label_folder("msts", tmp_path) is None
    )
    with pytest.raises(InputError, match="label set msts: the folder .*labels/msts does not exist"):
        load_labels("msts", tmp_path)
    with pytest.raises(InputError, match="did you mean 'pyrit_refusal'"):
        load_labels("pyrit_refusals", tmp_path)
    assert all(labels.licence for labels in LABEL_SETS.values())
