"""Every notebook, executed in the smoke profile: the whole sequence, and the last one alone.

Bare papermill executes two of the sequence's notebooks; `spavl run all` keeps what they made and
executes the others, on two cores side by side.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from spavl_lib import cli, rerun
from spavl_lib.arena.methods import find_method
from spavl_lib.notebook.execute import stage_of
from tests.notebooks.conftest import ALL, NOTEBOOKS, REPO, execute, papermill

RATES = ("unsafe_rate", "helpful_rate", "over_refusal_rate", "twin_accuracy")
KEYS = {"profile", "run_name", "device", "models", "reward_model", "timing_s", "peak_memory_gib"}

pytestmark = [
    pytest.mark.notebooks,
    pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks/ in this checkout yet"),
]


@pytest.fixture(scope="module")
def runs(chain_runs: Path) -> Path:
    return chain_runs


def run_all(*words: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `spavl run all` in this process."""
    monkeypatch.setenv("SPAVL_RUNS", str(runs))
    monkeypatch.chdir(REPO)
    with pytest.raises(SystemExit) as caught:
        cli.main([*ALL, *words])
    return caught.value.code


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def strict_json(path: Path) -> Any:
    def refuse(text: str) -> None:
        raise AssertionError(f"{path} holds {text}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def check_rate(rate: dict | None, name: str) -> None:
    if rate is None:  # missing is missing, never 0
        return
    assert set(rate) == {"k", "n", "value", "ci_low", "ci_high"}, name
    assert 0 <= rate["k"] <= rate["n"] > 0, name
    assert rate["value"] == pytest.approx(rate["k"] / rate["n"], abs=1e-3), name
    assert 0 <= rate["ci_low"] <= rate["value"] <= rate["ci_high"] <= 1, name
    assert rate["ci_low"] < rate["ci_high"], name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_ran_whole_and_left_its_stage(path: Path, chain: tuple[Path, str]) -> None:
    stage = chain[0] / stage_of(path)
    assert all(map(math.isfinite, numbers(strict_json(stage / "summary.json"))))
    manifest = strict_json(stage / "manifest.json")
    assert manifest["wall_time_s"] > 0
    assert manifest["seed"] == 1
    executed = nbformat.read(stage / "executed.ipynb", as_version=4)
    cells = [c for c in executed.cells if c.cell_type == "code" and c.source.strip()]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    source = nbformat.read(path, as_version=4)
    ours = [c.source for c in source.cells if c.cell_type == "code" and c.source.strip()]
    injected = [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert [c.source for c in cells if c not in injected] == ours
    assert len(injected) == 1


def test_figures_are_pictures(chain: tuple[Path, str]) -> None:
    from PIL import Image

    figures = sorted(chain[0].glob("*/figures/*.png"))
    assert figures
    for path in figures:
        with Image.open(path) as picture:
            lowest, highest = picture.convert("L").getextrema()
        assert highest - lowest > 50, f"{path} is blank"


def test_metrics_are_whole_and_finite(chain: tuple[Path, str]) -> None:
    metrics = strict_json(chain[0] / "metrics.json")
    assert set(metrics) >= KEYS
    assert (metrics["profile"], metrics["run_name"]) == ("smoke", "chain")
    assert all(map(math.isfinite, numbers(metrics)))
    trained = {stage_of(p) for p in NOTEBOOKS} & {"dpo", "ppo"}
    assert set(metrics["models"]) >= {"base"} | trained
    for model, rates in metrics["models"].items():
        for name in RATES:
            check_rate(rates[name], f"{model}.{name}")
        assert rates["unsafe_rate"] is not None, model
        assert rates["per_class"], model
    if (chain[0] / "reward").is_dir():
        check_rate(metrics["reward_model"]["pair_accuracy"], "pair_accuracy")
        assert 0 <= metrics["reward_model"]["ece"] <= 1
    stages = {stage_of(p) for p in NOTEBOOKS}
    assert set(metrics["timing_s"]) >= stages | {"total"}
    times = [value for name, value in metrics["timing_s"].items() if name != "total"]
    assert metrics["timing_s"]["total"] == pytest.approx(sum(times), abs=0.1)
    assert set(metrics["peak_memory_gib"]) >= stages


def test_the_report_stands_alone(chain: tuple[Path, str]) -> None:
    run, printed = chain
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(page) > 10_000
    for attribute in ('src="http', "src='http", '<link rel="stylesheet"', "@import"):
        assert attribute not in page
    assert "report.html" in printed
    for rates in strict_json(run / "metrics.json")["models"].values():
        for name in RATES:
            assert not rates[name] or f"{rates[name]['k']}/{rates[name]['n']}" in printed


def test_a_second_run_keeps_every_stage(
    chain: tuple[Path, str], runs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    run, _ = chain
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/executed.ipynb")}
    assert run_all(runs=runs, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    for path in NOTEBOOKS:
        assert f"{stage_of(path)}: done, kept" in said
    assert {p: p.stat().st_mtime_ns for p in run.glob("*/executed.ipynb")} == before


def test_changed_settings_are_refused(
    chain: tuple[Path, str], runs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    assert run_all("--set", "dpo.beta=0.7", runs=runs, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "dpo.beta: 0.1 -> 0.7" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_one_after_another_they_leave_the_same_numbers(
    chain: tuple[Path, str], tmp_path: Path, warm_kernels: None
) -> None:
    done = execute("spavl_lib.cli", *ALL, "--lanes", "1", runs=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "one notebook at a time: as asked" in done.stdout
    runs = chain[0], tmp_path / "chain"
    for name in map(stage_of, NOTEBOOKS):
        stages = [run / name for run in runs]
        assert list(rerun.result_differences(*stages)) == [], name
        for variant in sorted(p for p in stages[0].glob("variants/*/*") if p.is_dir()):
            other = stages[1] / variant.relative_to(stages[0])
            assert list(rerun.result_differences(variant, other)) == [], variant
        figures = [sorted(stage.glob("figures/*.png")) for stage in stages]
        assert [p.read_bytes() for p in figures[0]] == [p.read_bytes() for p in figures[1]], name
    metrics = [rerun._compared(strict_json(run / "metrics.json")) for run in runs]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
@pytest.mark.skipif(
    "06_safety_helpfulness" not in [p.stem for p in NOTEBOOKS], reason="no notebook 06 yet"
)
def test_the_last_notebook_alone_makes_what_it_needs(tmp_path: Path, warm_kernels: None) -> None:
    """Bare papermill, nothing made before."""
    out = tmp_path / "out.ipynb"
    papermill("06_safety_helpfulness", out, tmp_path / "runs", profile="smoke")
    run = tmp_path / "runs" / "smoke"
    for stage in ("reward", "ppo", "dpo", "inference", "evaluation"):
        assert (run / stage / "summary.json").is_file(), stage
    assert {"base", "dpo", "ppo"} <= set(strict_json(run / "metrics.json")["models"])
    assert nbformat.read(out, as_version=4).metadata.papermill["exception"] is None


def test_the_lesson_on_practice_runs_apart_from_the_sequence(
    chain: tuple[Path, str], runs: Path, tmp_path: Path
) -> None:
    """It uses the reward model of the run, and leaves the run's other stages as they are."""
    run, _ = chain
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/summary.json")}
    out = tmp_path / "out.ipynb"
    papermill("03b_ppo_in_practice", out, runs, profile="smoke", seed=1, run_name="chain")
    variants = strict_json(run / "practice/summary.json")["variants"]
    assert list(variants) == ["free_kl", "high_kl", "original", "rloo"]
    assert all(v["steps"] == 3 for v in variants.values())
    cells = [c for c in nbformat.read(out, as_version=4).cells if c.cell_type == "code"]
    said = "".join(o.get("text", "") for c in cells for o in c.outputs)
    assert "norm of the policy's gradient: 0.000\n" in said
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_scaling_runs_alone_and_apart_from_the_sequence(tmp_path: Path, warm_kernels: None) -> None:
    out = tmp_path / "out.ipynb"
    papermill("07_scaling_and_ablations", out, tmp_path / "runs", profile="smoke")
    stage = tmp_path / "runs/smoke/scaling"
    summary = strict_json(stage / "summary.json")
    assert {row["family"] for row in summary["arms"]} == {"size", "questions"}
    for row in summary["arms"]:
        check_rate(row["unsafe_rate"], row["arm"])
    assert len(list((stage / "figures").glob("*.png"))) == 2


@pytest.mark.slow
def test_the_laboratory_makes_a_small_table_of_its_own(tmp_path: Path, warm_kernels: None) -> None:
    out = tmp_path / "out.ipynb"
    papermill("08_laboratory", out, tmp_path / "runs", profile="smoke")
    stage = tmp_path / "runs/smoke/laboratory"
    table = strict_json(stage / "laboratory.json")
    assert set(table["metrics"]) == {"base", "dpo"}
    assert {"none", "one_word", "one_word_prudence"} == set(table["metrics"]["dpo"])
    assert strict_json(stage / "summary.json")["published"] is False
    dpo = f"arena-smoke-dpo-{find_method('dpo').chosen():g}-0"
    assert {p.name for p in (stage / "runs").iterdir()} == {"arena-smoke-base-0", dpo}
    assert not list((tmp_path / "runs").glob("arena-*"))
    assert len(list((stage / "figures").glob("*.png"))) == 3
