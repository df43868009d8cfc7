"""Scaling: which arms, of what sizes, trained once each, resumed and shared; what is concluded."""

import dataclasses
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml

from spavl_lib import machine, plotting
from spavl_lib.config import Config, load_config
from spavl_lib.data.load import load_preferences, load_prompts
from spavl_lib.errors import InputError, Preempted
from spavl_lib.evaluation.verdicts import Verdict
from spavl_lib.modelling.load import load_policy
from spavl_lib.runs.files import write_text
from spavl_lib.runs.signals import stop_on_signals
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.scaling import training, workers
from spavl_lib.scaling.arms import Arm, plan
from spavl_lib.scaling.findings import findings
from spavl_lib.scaling.run import run_scaling
from tests.helpers import smoke

QUICK = {
    "scaling.sizes": [8, 24], "scaling.question_types": [], "scaling.ablation_rows": 8,
    "scaling.projector": ["trained"], "scaling.min_steps": 1, "scaling.eval_rows": 8,
}  # fmt: skip


def test_the_demos_arms_are_equal_where_they_must_be() -> None:
    config = load_config("demo")
    arms = plan(config)
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


def test_a_worker_finds_the_folders_of_its_stage(tmp_path: Path) -> None:
    """A worker reads the stage's own config, which also names the precision."""
    config = smoke(QUICK, run_name="r")
    stage = Run(config, tmp_path).stage("scaling")
    assert stage.config.dtype and not config.dtype
    assert [arm.key for arm in plan(stage.config)] == [arm.key for arm in plan(config)]


def test_sizes_come_in_order_and_once() -> None:
    sizes = {"scaling.sizes": [0, 600, 100, 5000], "scaling.question_types": []}
    arms = plan(
        load_config(
            "demo",
            sizes
            | {
                "scaling.answers": [],
                "scaling.projector": [],
                "scaling.lora_ranks": [],
                "scaling.seeds": [3],
            },
        )
    )
    assert [arm.name for arm in arms] == ["100", "600", "3,180"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("sizes", [100, 300, 100]), ("seeds", [0, 0]), ("question_types", ["easy", "easy"]),
        ("projector", ["trained", "trained"]), ("lora_ranks", [4, 4]),
        ("answers", ["all=all", "all = careful+hedged"]),
    ],
)  # fmt: skip
def test_an_arm_named_twice_would_count_twice(key: str, values: list) -> None:
    with pytest.raises(InputError, match=f"scaling: {key} names .* more than once"):
        load_config("demo", {f"scaling.{key}": values})


def test_prompts_depend_on_neither_arm_nor_seed() -> None:
    """The quick form of the next test: every arm of two seeds, in smoke."""
    config = smoke({"scaling.seeds": [0, 1], "scaling.lora_ranks": [4]})
    datas = {arm.config.data for arm in plan(config)}
    assert {data.sampling_seed for data in datas} == {0, 1} and len(datas) >= 6
    for name in training.MEASURED:
        prompts = {tuple(load_prompts(data, name)["id"]) for data in datas}
        assert len(prompts) == 1 and len(prompts.pop()) == config.scaling.eval_rows
    drawn = {tuple(load_preferences(d, "train")["id"]) for d in datas if d.train_rows == 8}
    assert len(drawn) == 2  # while the training rows do depend on the seed


@pytest.mark.slow
def test_every_arm_and_the_base_are_measured_on_the_same_prompts() -> None:
    config = load_config("demo", {"scaling.eval_rows": 24})
    without_strata = load_config("demo", {"scaling.eval_rows": 24, "data.sampling": "random"})
    arms = [
        arm.config.data
        for drawn in (config, without_strata)
        for arm in {arm.seed: arm for arm in plan(drawn) if arm.name == "100"}.values()
    ]
    data = dataclasses.replace(config.data, test_rows=24)
    for name in training.MEASURED:
        prompts = [load_prompts(d, name)["id"] for d in (data, *arms)]
        assert len(prompts) == 7 and len(prompts[0]) == 24
        assert all(ids == prompts[0] for ids in prompts)
    pairs = {tuple(load_preferences(d, "train")["id"]) for d in arms}
    held_out = {tuple(load_preferences(d, "validation")["id"]) for d in arms}
    assert len(pairs) == 6 and len(held_out) == 1


def test_arms_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="names no arms; set scaling.seeds"):
        plan(load_config("smoke", {"scaling.seeds": []}))
    with pytest.raises(InputError, match="expected NAME=SOURCE"):
        plan(load_config("demo", {"scaling.answers": ["careful"]}))


@pytest.mark.parametrize(("wanted", "most"), [(0, 3180), (2000, 2000)])
def test_an_ablation_takes_no_more_than_its_poorest_arm_has(wanted: int, most: int) -> None:
    config = load_config("demo", {"scaling.ablation_rows": wanted, "scaling.sizes": []})
    arms = plan(config)
    rows = {(a.family, a.config.data.train_rows) for a in arms}
    assert rows == {("questions", 1060), ("answers", 689), ("projector", most), ("rank", most)}


def test_arms_are_trained_measured_kept_and_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = smoke(QUICK, run_name="r")
    stage = Run(config, root=tmp_path).stage("scaling")
    summary = run_scaling(config, stage)
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
    monkeypatch.setattr(training.launcher, "make", lambda *a: pytest.fail("trained again"))
    assert run_scaling(config, stage) == summary


def test_a_worker_told_to_stop_takes_no_further_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = smoke(QUICK, run_name="r")
    stage, taken = Run(config, root=tmp_path).stage("scaling"), []
    with stage.work():
        pass
    write_text(stage.path / "config.yaml", yaml.safe_dump(config.to_dict()))

    def signalled(stage: Stage, arm: Arm, should_stop: object) -> dict:
        taken.append(arm.name)
        with stop_on_signals() as inner:  # as a training's own
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner and not taken[1:]
        assert should_stop
        with stop_on_signals() as later:  # what begins after the signal is told of it
            assert later
        return {}

    monkeypatch.setattr(workers, "run_arm", signalled)
    with pytest.raises(Preempted):
        workers.work(stage.path)
    assert len(taken) == 1


@pytest.mark.slow
def test_an_arm_whose_summary_was_not_written_keeps_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next run would find it trained, and no weights to measure."""
    config = smoke(QUICK | {"scaling.sizes": [], "scaling.workers": 1}, run_name="r")
    stage, conclude = Run(config, root=tmp_path).stage("scaling"), Stage._conclude

    def dying(self: Stage, summary: dict) -> None:
        if self.name == "scaling":
            raise OSError("pulled plug")
        conclude(self, summary)

    monkeypatch.setattr(Stage, "_conclude", dying)
    with pytest.raises(OSError, match="pulled plug"):
        run_scaling(config, stage)
    monkeypatch.setattr(Stage, "_conclude", conclude)
    assert run_scaling(config, stage)["arms"][0]["unsafe_rate"]["n"] == 8
    assert not list(stage.path.rglob("*.safetensors"))


@pytest.mark.slow
def test_workers_share_the_arms(tmp_path: Path) -> None:
    config = smoke(QUICK | {"scaling.workers": 2}, run_name="r")
    stage = Run(config, root=tmp_path).stage("scaling")
    together = run_scaling(config, stage)
    alone = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, workers=1))
    other = Run(alone, root=tmp_path / "alone").stage("scaling")
    assert run_scaling(alone, other)["arms"] == together["arms"]


@pytest.mark.parametrize(
    ("gpus", "cores", "gib", "expected"),
    [(0, 2, 64, 2), (0, 64, 10, 3), (0, 8, 1, 1), (2, 64, 512, 1)],
)
def test_workers_fit_the_machine(
    gpus: int, cores: int, gib: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [("gpu", 2**34)] * gpus)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "memory_bytes", lambda: gib * 2**30)
    assert workers.default_workers() == expected


def test_a_workers_error_is_raised_again(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("bar 10 %\nInputError: row 7 is bad\n  and so is row 8\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 7 is bad\n  and so is row 8"):
        workers._raise_from_log(log, 2)
    log.write_text("Segmentation fault", encoding="utf-8")
    with pytest.raises(RuntimeError, match="ended with exit code -11"):
        workers._raise_from_log(log, -11)


def rows(family: str, **unsafe: int) -> list[dict]:
    from spavl_lib.evaluation.rates import count_rate

    return [
        {"family": family, "arm": name, "unsafe_rate": count_rate(k, 100)}
        for name, k in unsafe.items()
    ]


def test_what_is_concluded() -> None:
    assert findings(rows("size", a=90, b=50, c=5)) == {
        "more_data_is_safer": True, "mixed_is_safest": None, "all_answers_are_safest": None,
    }  # fmt: skip
    assert findings(rows("size", a=5, b=50))["more_data_is_safer"] is False
    turned = [
        row | {"pairs": n} for row, n in zip(rows("size", a=5, b=90), (600, 100), strict=True)
    ]
    assert findings(turned)["more_data_is_safer"] is True
    assert findings(rows("size", a=50, b=52, c=10))["more_data_is_safer"] is True  # within doubt
    mixed = rows("questions", easy=10, hardq=20, mixed=10)
    assert findings(mixed)["mixed_is_safest"] is True
    assert findings(rows("questions", easy=9, mixed=10))["mixed_is_safest"] is False
    assert findings(rows("answers", few=10, all=9))["all_answers_are_safest"] is True
    assert set(findings([]).values()) == {None}


def test_a_judge_without_an_opinion_leaves_its_rate_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a guard model, which says what is unsafe, and nothing of what is helpful."""

    def unsafe_only(record: dict) -> Verdict:
        harmful = record["set"].startswith("harm")
        return Verdict(harmful=True) if harmful else Verdict(why_unjudged="a harmless request")

    class Judge:
        needs_images = True

        def many(self, records: list[dict]) -> list[Verdict]:
            assert records and all(record["image"]["bytes"] for record in records)
            return [unsafe_only(record) for record in records]

    monkeypatch.setattr(training, "make_judge", lambda *_: Judge())
    monkeypatch.setattr(training.launcher, "make", without_training)
    monkeypatch.setattr(training, "load_policy", lambda config, trained: load_policy(config))
    config = smoke(QUICK | {"scaling.sizes": []}, run_name="r")
    summary = run_scaling(config, Run(config, root=tmp_path).stage("scaling"))
    [arm] = summary["arms"]
    assert arm["unsafe_rate"]["n"] == 8
    assert arm["helpful_rate"] is None and arm["helpful_rate_by_seed"] == []
    for figure in (plotting.plot_scaling(summary), plotting.plot_ablations(summary)):
        assert len(plotting.png_bytes(figure)) > 5_000


def test_a_judge_of_refusals_measures_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.launcher, "make", without_training)
    monkeypatch.setattr(training, "load_policy", lambda config, trained: load_policy(config))
    config = smoke(QUICK | {"evaluation.judge": "phrases"}, run_name="r")
    summary = run_scaling(config, Run(config, root=tmp_path).stage("scaling"))
    for row in summary["arms"]:
        assert row["unsafe_rate"] is None and row["refusal_rate"]["n"] == 8
        assert len(row["refusal_rate_by_seed"]) == 1 == len(row["helpful_rate_by_seed"])
    for figure in (plotting.plot_scaling(summary), plotting.plot_ablations(summary)):
        assert len(plotting.png_bytes(figure)) > 5_000


def without_training(name: str, config: Config, stage: Stage) -> dict:
    """The summary of a DPO training, with the base's own weights."""
    return {"train_rows": 8, "steps": 1, "epochs": 1.0, "trainable_parameters": {}}


def test_a_workers_bar_is_not_the_bar_of_all_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`spavl run` shows how many arms are complete, not how far the arm of some worker is."""
    seen: list[dict] = []

    class Ended:
        stdin = None

        def __init__(self, *_: object, env: dict, **__: object) -> None:
            seen.append(env)

        def poll(self) -> int:
            return 0

        wait = poll

    monkeypatch.setattr(workers.subprocess, "Popen", Ended)
    monkeypatch.setenv("SPAVL_PROGRESS", str(tmp_path / "progress.json"))
    stage = Run(smoke(run_name="r"), root=tmp_path).stage("scaling")
    stage.path.mkdir(parents=True)
    with stop_on_signals() as flag:
        workers.run_in_workers(stage, [], 2, flag)
    assert len(seen) == 2 and not any("SPAVL_PROGRESS" in env for env in seen)
