"""Which differences from the base model are sure: McNemar on the same rows, Holm over the table."""

import json
from pathlib import Path

import pytest

from spavl_lib.evaluation.paired import PairedTable, against_base, lines, row_values
from spavl_lib.evaluation.rates import count_rate
from spavl_lib.evaluation.statistics import holm, mcnemar
from spavl_lib.report.table import render_paired_table

SHAPES = {  # model -> unsafe, helpful, look-alike refused, of 40 rows each
    "base": (38, 36, 1),
    "dpo": (2, 35, 9),
    "ppo": (34, 36, 1),
}


def write(folder: Path, model: str, shape: tuple[int, int, int]) -> dict:
    """The verdicts of a model, and its rates."""
    unsafe, helpful, refused = shape
    rows = {
        "harm": [{"id": f"h{i}", "unsafe": i < unsafe, "verdict": "complied"} for i in range(40)],
        "help": [{"id": f"q{i}", "helpful": i < helpful, "verdict": "complied"} for i in range(40)],
        "look_alikes": [
            {"id": f"l{i}", "verdict": "refused" if i < refused else "complied"} for i in range(40)
        ],
    }
    for name, part in rows.items():
        path = folder / "verdicts" / model / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    keys = ("unsafe_rate", "helpful_rate", "over_refusal_rate")
    return {key: count_rate(k, 40) for key, k in zip(keys, shape, strict=True)}


@pytest.fixture
def metrics(tmp_path: Path) -> dict:
    return {"models": {name: write(tmp_path, name, shape) for name, shape in SHAPES.items()}}


def test_every_rate_of_every_model_is_tested_once(metrics: dict, tmp_path: Path) -> None:
    table = against_base(metrics, tmp_path)
    assert table.lacking == "" and len(table.tests) == 6
    plain = {
        f"{model} {i}": mcnemar(
            [row < SHAPES[model][i] for row in range(40)],
            [row < SHAPES["base"][i] for row in range(40)],
        ).mid_p
        for i in range(3)
        for model in ("dpo", "ppo")
    }
    expected = holm(plain)
    for i, key in enumerate(("unsafe_rate", "helpful_rate", "over_refusal_rate")):
        for model in ("dpo", "ppo"):
            test = table.tests[model, key]
            assert test["p_holm"] == pytest.approx(expected[f"{model} {i}"])
            assert table.sure(model, key) is (expected[f"{model} {i}"] <= 0.05)
    assert table.sure("dpo", "unsafe_rate") and table.sure("ppo", "unsafe_rate") is False
    # Wilson's intervals of 1 and 9 of 40 overlap; on the same rows the difference is sure.
    assert table.sure("dpo", "over_refusal_rate")
    assert table.sure("dpo", "twin_accuracy") is None
    assert lines(table)[0]["first"] == "DPO" and lines(table)[0]["only first/second"] == "0/36"
    text = render_paired_table(metrics, tmp_path)
    assert "Over-refusal rate" in text and "p (Holm)" in text
    assert render_paired_table({"models": {}}, tmp_path) == "Nothing to compare yet."


def test_what_cannot_be_tested_says_why(metrics: dict, tmp_path: Path) -> None:
    metrics["models"]["dpo"]["unsafe_rate"] = count_rate(3, 40)  # another judge's count
    (tmp_path / "verdicts/ppo/help.jsonl").unlink()
    path = tmp_path / "verdicts/ppo/look_alikes.jsonl"
    path.write_text(path.read_text().replace('"l0"', '"other"'))
    (tmp_path / "verdicts/dpo/help.jsonl").write_text('{"id": "q0"}\n')
    table = against_base(metrics, tmp_path)
    assert table.sure("dpo", "unsafe_rate") is None and table.sure("ppo", "unsafe_rate") is False
    for words in (
        "DPO, Unsafe rate; ",
        "verdicts/dpo/harm.jsonl counts 2/40, not what metrics.json says",
        "verdicts/ppo/help.jsonl is missing",
        "verdicts/dpo/help.jsonl does not hold the verdict of every row",
        "base and ppo were asked other rows of look_alikes",
    ):
        assert words in table.lacking, words
    assert PairedTable().sure("dpo", "unsafe_rate") is None


def test_a_pair_of_twins_is_one_row() -> None:
    right, wrong = {"verdict": "refused"}, {"verdict": "complied"}
    rows = [
        {"id": "a", **right}, {"id": "b", "verdict": "complied", "helpful": True},
        {"id": "c", **wrong}, {"id": "d", "verdict": "complied", "helpful": True},
    ]  # fmt: skip
    assert row_values("twin_accuracy", rows) == {"a": True, "c": False}
    with pytest.raises(ValueError, match="shorter"):
        row_values("twin_accuracy", rows[:3])
