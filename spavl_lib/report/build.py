"""Build the report's page: collect the contents of every section, and render the template."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spavl_lib import plotting
from spavl_lib.errors import InputError
from spavl_lib.evaluation.numbers import (
    HARMLESS_TITLES,
    Metric,
    harm_metric,
    measured_metrics,
    measured_on,
    model_title,
    models_of,
    read_metrics,
    read_rate,
)
from spavl_lib.evaluation.paired import MEANING, PairedTable, against_base
from spavl_lib.evaluation.paired import lines as paired_lines
from spavl_lib.evaluation.people.table import HEADING, people_notes, people_rows
from spavl_lib.evaluation.rates import Rate
from spavl_lib.plotting.results import class_order, class_rates
from spavl_lib.report import collect, gallery
from spavl_lib.report.charts import Chart, chart, saved_figures
from spavl_lib.report.headline import headlines
from spavl_lib.report.lacks import lacks
from spavl_lib.report.rendering import HERE, environment
from spavl_lib.report.training import curves, policy_page, reward_page
from spavl_lib.runs.files import write_text


@dataclass(frozen=True)
class Cell:
    """One rate of one model, and its difference from the base model."""

    rate: Rate | None
    delta: float | None = None
    """Difference from the base model in percentage points."""
    sure: bool = False
    """Whether the paired test finds a difference from the base model on the same rows."""
    good: bool = False
    """Whether the difference is an improvement."""


def build_report(run_path: Path) -> Path:
    """Write the report, as `spavl_lib.report.write_report` describes."""
    if not run_path.is_dir():
        raise InputError(f"{run_path}: no such run folder; `spavl run` makes one")
    target = run_path / "report.html"
    write_text(target, render(run_path))
    return target


def render(run_path: Path) -> str:
    """The HTML of a run folder's report."""
    problems: list[str] = []
    metrics_path = run_path / "metrics.json"
    metrics = read_metrics(metrics_path) if metrics_path.is_file() else {}
    stages = collect.read_stages(run_path, problems)
    manifests = [stage.manifest for stage in stages if stage.manifest]
    config = collect.run_config(stages)
    models = models_of(metrics)
    paired = against_base(metrics, run_path / "evaluation")
    compared = _model_to_compare(models, run_path / "evaluation")
    mini = _is_mini(metrics, config)
    cards, total = gallery.build_gallery(run_path / "evaluation", compared, placeholders=mini)
    name = run_path.resolve().name
    commands = collect.commands(name, config, manifests)
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment().get_template("template.html.j2").render(
        name=name,
        profile=metrics.get("profile") or config.get("profile"),
        device=next((m["device"] for m in (metrics, *manifests) if m.get("device")), None),
        date=max((str(m["started"]) for m in manifests if m.get("started")), default="")[:10],
        mini=mini,
        measured_on=measured_on(metrics),
        lacks=lacks(metrics, run_path / "data" / "summary.json"),
        judge=str(metrics.get("judge") or ""),
        sentences=headlines(metrics, paired),
        metrics_list=measured_metrics(models),
        harm=harm_metric(models),
        harmless_titles=list(HARMLESS_TITLES.values()),
        harmless=_harmless(models),
        results=_results(models, paired),
        paired_lines=paired_lines(paired),
        paired_meaning=MEANING,
        paired_lacking=paired.lacking,
        people_heading=HEADING,
        people_rows=list(people_rows(metrics)),
        people_notes=people_notes(metrics),
        held_out=_held_out(models),
        checks=_control_rows(models),
        reward=reward_page(
            metrics.get("reward_model"), next(s for s in stages if s.name == "reward")
        ),
        policies=[page for page in map(policy_page, stages) if page],
        charts=_charts(metrics, models),
        classes=_classes(models),
        curves=[curves(stage) for stage in stages if stage.rows],
        cards=cards,
        rows_total=total,
        sets=gallery.sets_of(cards),
        last=model_title(compared) if compared else None,
        figures=[(stage.name, saved_figures(stage.path)) for stage in stages],
        stages=stages,
        timing=metrics.get("timing_s") or {},
        settings=collect.settings(config),
        notes=[*problems, *collect.disagreements(stages)],
        checkout=commands.checkout,
        run_command=commands.run,
        report_command=commands.report,
        rerun_command=commands.rerun if any(stage.done for stage in stages) else None,
        files=collect.files(run_path, stages),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
    )  # fmt: skip


def _is_mini(metrics: dict, config: dict) -> bool:
    """Whether the run trained on SPA-VL mini and was asked its prompts. Then no image is hidden."""
    origin = metrics.get("prompts")
    asked_mini = not isinstance(origin, dict) or bool(origin.get("mini"))
    return (config.get("data") or {}).get("source") == "mini" and asked_mini


def _model_to_compare(models: dict, evaluation: Path) -> str | None:
    """The trained model that the page compares with the base model; None if there is none.

    It is `dpo` if that was evaluated, else the last trained model.
    """
    names = list(models) or sorted(f.name for f in (evaluation / "verdicts").glob("*"))
    trained = [name for name in names if name != "base"]
    if "dpo" in trained:
        return "dpo"
    return trained[-1] if trained else None


def _cell(metric: Metric, rate: Rate | None, base: Rate | None, sure: bool | None) -> Cell:
    if rate is None or base is None:
        return Cell(rate)
    delta = 100 * (rate.value - base.value)
    better = delta < 0 if metric.good == "low" else delta > 0
    return Cell(rate, delta, bool(sure), better)


def _results(models: dict, paired: PairedTable) -> list[tuple[str, list[Cell]]]:
    """Each model's title and its rates, compared with the base model."""
    rows = []
    metrics = measured_metrics(models)
    for name, cells in models.items():
        base = models.get("base", {}) if name != "base" else {}
        rows.append(
            (
                model_title(name),
                [
                    _cell(
                        m, read_rate(cells, m.key), read_rate(base, m.key), paired.sure(name, m.key)
                    )
                    for m in metrics
                ],
            )
        )
    return rows


def _held_out(models: dict) -> list[tuple[str, list[tuple[Rate | None, Rate | None]]]]:
    """Each model's rates on held-out drawings, and on the familiar drawings for comparison."""
    return [
        (
            model_title(name),
            [
                (read_rate(cells.get("held_out_drawings"), m.key), read_rate(cells, m.key))
                for m in measured_metrics(models)
            ],
        )
        for name, cells in models.items()
        if cells.get("held_out_drawings")
    ]  # fmt: skip


def _harmless(models: dict) -> list[tuple[str, list[Rate | None]]]:
    """Each model's refusals of harmless requests, set by set."""
    return [
        (model_title(name), [read_rate(cells["harmless_refused"], key) for key in HARMLESS_TITLES])
        for name, cells in models.items()
        if cells.get("harmless_refused")
    ]


def _control_rows(models: dict) -> list[tuple[str, Rate | None, Any]]:
    """Each model's title, twin accuracy with exchanged images, and unparsed responses."""
    return [
        (model_title(name), read_rate(cells, "twin_accuracy_exchanged"), cells.get("unparsed"))
        for name, cells in models.items()
        if "twin_accuracy_exchanged" in cells or "unparsed" in cells
    ]


def _charts(metrics: dict, models: dict) -> dict[str, Chart]:
    if not models:
        return {}
    charts = {"safety_helpfulness": chart(plotting.plot_safety_helpfulness, metrics)}
    if any(cells.get("per_class") for cells in models.values()):
        charts["classes"] = chart(plotting.plot_unsafe_by_class, metrics)
    return charts


def _classes(models: dict) -> dict[str, list[tuple[str, list[tuple[Rate | None, Rate | None]]]]]:
    """class1 -> its tertiary classes, each with the unsafe and helpful rate of every model.

    If the judge gave no unsafe rates, refusal rates stand in their place.
    """
    key = harm_metric(models).key
    by_model = [
        (class_rates(cells, key, 3), class_rates(cells, "helpful_rate", 3))
        for cells in models.values()
    ]
    order = class_order({name for unsafe, _ in by_model for name in unsafe}, 3)
    classes: dict[str, list] = {}
    for class1, class3 in order:
        rates = [(unsafe.get(class3), helpful.get(class3)) for unsafe, helpful in by_model]
        classes.setdefault(class1, []).append((class3, rates))
    return classes
