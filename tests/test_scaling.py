"""Scaling: which arms, of what sizes, trained once each, resumed and shared; what is concluded."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from spavl_lib import plotting, scaling
from spavl_lib.config import load_config
from spavl_lib.errors import InputError
from spavl_lib.run import Run
from tests.helpers import smoke

QUICK = {
    "scaling.sizes": [8, 24], "scaling.question_types": [], "scaling.ablation_rows": 8,
    "scaling.projector": ["trained"], "scaling.min_steps": 1, "scaling.eval_rows": 8,
}  # fmt: skip


def test_the_demos_arms_are_equal_where_they_must_be() -> None:
    config = load_config("demo")
    arms = scaling.plan(config)
    assert {a.seed for a in arms} == {0, 1, 2}
    families = Counter(a.family for a in arms if a.seed == 0)
    assert families == {"size": 5, "questions": 4, "answers": 3, "projector": 2, "rank": 3}
    for arm in arms:
        assert arm.config.seed == arm.config.data.sampling_seed == arm.seed
        rows, dpo = arm.config.data.train_rows, arm.config.dpo
        assert arm.family == "size" or rows == (689 if arm.family == "answers" else 1000)
        assert dpo.learning_rate == (1e-3 if arm.family == "rank" else 1e-4)
        assert dpo.max_steps == max(20, -(-rows // 16))
    shared = [a for a in arms if a.seed == 0 and a.name in ("1,000", "mixed", "trained")]
    assert len(shared) == 3 and len({a.key for a in shared}) == 1  # one training, three names
    assert len({a.key for a in arms}) == 45


def test_arms_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="names no arms|no arms; name them"):
        scaling.plan(load_config("smoke", {"scaling.seeds": []}))
    with pytest.raises(InputError, match="expected NAME=SOURCE"):
        scaling.plan(load_config("demo", {"scaling.answers": ["careful"]}))


@pytest.mark.parametrize(("wanted", "most"), [(0, 3180), (2000, 2000)])
def test_an_ablation_takes_no_more_than_its_poorest_arm_has(wanted: int, most: int) -> None:
    config = load_config("demo", {"scaling.ablation_rows": wanted, "scaling.sizes": []})
    arms = scaling.plan(config)
    rows = {(a.family, a.config.data.train_rows) for a in arms}
    assert rows == {("questions", 1060), ("answers", 689), ("projector", most), ("rank", most)}


def test_arms_are_trained_measured_kept_and_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = smoke(QUICK, run_name="r")
    stage = Run(config, root=tmp_path).stage("scaling")
    summary = scaling.run_scaling(config, stage)
    assert [(r["family"], r["arm"], r["pairs"], r["steps"]) for r in summary["arms"]] == [
        ("size", "8", 8, 1), ("size", "24", 24, 3), ("projector", "trained", 8, 1),
    ]  # fmt: skip
    assert summary["arms"][0]["unsafe_rate"] == summary["arms"][2]["unsafe_rate"]  # one training
    assert summary["base"]["unsafe_rate"]["n"] == summary["arms"][0]["unsafe_rate"]["n"] == 8
    folders = list((stage.path / "arms").iterdir())
    assert len(folders) == 2 and not list(stage.path.rglob("*.safetensors"))
    assert len(list(stage.path.rglob("arms/*/scaling/harm.jsonl"))) == 2
    for figure in (plotting.plot_scaling(summary), plotting.plot_ablations(summary)):
        assert len(plotting.png_bytes(figure)) > 5_000
    # What stands is kept: without the summary, nothing is trained again.
    (stage.path / "summary.json").unlink()
    monkeypatch.setattr(scaling, "train_dpo", lambda *a: pytest.fail("trained again"))
    assert scaling.run_scaling(config, stage) == summary


@pytest.mark.slow
def test_workers_share_the_arms_and_relay_what_stops_them(tmp_path: Path) -> None:
    config = smoke(QUICK | {"scaling.workers": 2}, run_name="r")
    stage = Run(config, root=tmp_path).stage("scaling")
    together = scaling.run_scaling(config, stage)
    alone = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, workers=1))
    other = Run(alone, root=tmp_path / "alone").stage("scaling")
    assert scaling.run_scaling(alone, other)["arms"] == together["arms"]
    log = tmp_path / "w.log"
    log.write_text("bar 10 %\nInputError: row 7 is bad\n  and so is row 8\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 7 is bad\n  and so is row 8"):
        scaling._raise_as(log, 2)
    log.write_text("Segmentation fault", encoding="utf-8")
    with pytest.raises(RuntimeError, match="ended with code -11"):
        scaling._raise_as(log, -11)


def rows(family: str, **unsafe: int) -> list[dict]:
    from spavl_lib.evaluation.metrics import rate

    return [
        {"family": family, "arm": name, "unsafe_rate": rate(k, 100)} for name, k in unsafe.items()
    ]


def test_what_is_concluded() -> None:
    found = scaling.findings
    assert found(rows("size", a=90, b=50, c=5)) == {
        "more_data_is_safer": True, "mixed_is_safest": None,
    }  # fmt: skip
    assert found(rows("size", a=5, b=50))["more_data_is_safer"] is False
    assert found(rows("size", a=50, b=52, c=10))["more_data_is_safer"] is True  # within doubt
    mixed = rows("questions", easy=10, hardq=20, mixed=10)
    assert found(mixed)["mixed_is_safest"] is True
    assert found(rows("questions", easy=9, mixed=10))["mixed_is_safest"] is False
    assert found([]) == {"more_data_is_safer": None, "mixed_is_safest": None}
