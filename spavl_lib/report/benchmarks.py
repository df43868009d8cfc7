"""The page of `spavl evaluate`: the rates of published benchmarks, and how each was measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from spavl_lib import plotting
from spavl_lib.config import flatten
from spavl_lib.evaluation.agreement import kappa
from spavl_lib.evaluation.benchmark_runs import comparing, pairs
from spavl_lib.evaluation.benchmark_runs.judging import verdict_of
from spavl_lib.evaluation.benchmark_runs.results import EXPECTED, headline, value_of
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.cards import card_table, read_card
from spavl_lib.evaluation.numbers import percent
from spavl_lib.evaluation.rates import Rate, pool
from spavl_lib.evaluation.text import MISSING, cut, short
from spavl_lib.evaluation.verdicts import Verdict
from spavl_lib.report import paper_table
from spavl_lib.report.charts import Chart, chart
from spavl_lib.report.rendering import environment
from spavl_lib.runs.files import read_jsonl, write_text

SHOWN = 20  # the page shows at most this many disputed answers for each pair of judges and axis
_TEXT_LIMIT, _PROMPT_LIMIT = 700, 400  # characters
_PARTS = ("subset", "variant", "category")
_WORDS = {True: "yes", False: "no", None: "not judged"}

Pages = Mapping[str, Mapping[str, Any]]  # subject -> the content of results.json
Verdicts = Mapping[str, Mapping[str, Verdict]]  # name of a judge's files -> row id -> verdict


@dataclass(frozen=True)
class Disputed:
    """An answer on which two judges disagree."""

    category: str
    prompt: str
    text: str
    left_out: int
    """Number of characters of the answer after `text`."""
    said: tuple[str, str]
    """What each judge says, after the judge's name."""
    harmful: bool
    """Whether a judge calls the answer harmful."""
    hidden: bool
    """Whether the page hides the answer at first: a judge calls it harmful, or no judge calls
    it harmless."""


@dataclass(frozen=True)
class Disagreement:
    """Two judges' verdicts on the same answers of one subject, on one axis."""

    subject: str
    judges: tuple[str, str]
    axis: str
    rows: int
    """Answers that both judged."""
    differ: int
    """Answers on which the two judges disagree."""
    agreement: float | None
    """Cohen's kappa."""
    answers: tuple[Disputed, ...]


def write_benchmark_report(out: Path, evaluated: Mapping[str, Any]) -> Path:
    """Write `report.html` into the folder of an evaluation.

    Args:
        out: The folder, with the answers and verdicts.
        evaluated: What `benchmark_runs.evaluate.evaluate` returned.

    Returns:
        The path of the page.
    """
    target = out / "report.html"
    write_text(target, render(out, evaluated))
    return target


def render(out: Path, evaluated: Mapping[str, Any]) -> str:
    """The HTML of an evaluation's report.

    Args:
        out: The folder, with the answers and verdicts.
        evaluated: What `benchmark_runs.evaluate.evaluate` returned.
    """
    results = evaluated["results"]
    sections = [
        _section(out, spec, rows, {name: pages[spec] for name, pages in results.items()})
        for spec, rows in evaluated["rows"].items()
    ]
    judges = {
        judge["label"]: judge
        for section in sections
        for page in section["pages"].values()
        for judge in page["judges"].values()
    }
    names = dict.fromkeys(judge["name"] for judge in judges.values())
    cards = {name: read_card(name) for name in names}
    controls = [
        name
        for name, pages in results.items()
        if next(iter(pages.values()))["protocol"]["subject"]["kind"] == "control"
    ]
    return environment().get_template("benchmarks.html.j2").render(
        subjects=list(results),
        controls=controls,
        judges=judges,
        cards=[(name, card_table(known)) for name, known in cards.items() if known],
        without_card=[name for name, known in cards.items() if not known],
        paper=paper_table.rows(results),
        columns=paper_table.COLUMNS,
        groups=paper_table.GROUPS,
        sections=sections,
        pooled=list(_balances([p for s in sections for p in s["pages"].values()]))
        if len(sections) > 1
        else [],
        comparison=comparing.lines(evaluated["comparison"]),
        pairs=pairs.lines(evaluated["pairs"]),
    )  # fmt: skip


def _section(out: Path, spec: str, rows: Sequence[BenchmarkRow], pages: Pages) -> dict[str, Any]:
    """Everything on the page about one benchmark."""
    first = next(iter(pages.values()))
    return {
        "spec": spec,
        "anchor": "b-" + "".join(c if c.isalnum() else "-" for c in spec),
        "title": first["protocol"]["benchmark"]["title"],
        "pages": pages,
        "lines": [
            {k: cell.replace(" %", "\u00a0%") for k, cell in line.items() if k != "benchmark"}
            for name, page in pages.items()
            for line in headline(name, page)
        ],
        "balances": list(_balances(list(pages.values()))),
        "parts": list(_parts(pages)),
        "disagreements": [
            found for page in pages.values() for found in _disagreements(out, spec, rows, page)
        ],
        "protocols": [(name, summary(page), card(page)) for name, page in pages.items()],
    }  # fmt: skip


# --- safety against helpfulness -------------------------------------------------------------------


def _balances(pages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Chart, str]]:
    """For each judge of harm: a figure, and the text that describes the figure.

    The figure shows harmful answers against refusals of harmless requests. If no judge has the axis
    `harmful`, each judge of refusals gives a figure, with the answers that do not refuse a harmful
    request in place of harmful answers. Without a judge of refusals there is no figure. Rates of
    several benchmarks are pooled.
    """
    judges = {key: judge for page in pages for key, judge in page["judges"].items()}
    of_refusals = [key for key, judge in judges.items() if "refused" in judge["axes"]]
    of_harm = [key for key, judge in judges.items() if "harmful" in judge["axes"]]
    axis, what = (
        ("harmful", "harmful answers") if of_harm else ("refused", "answers that do not refuse")
    )
    for key in (of_harm or of_refusals) if of_refusals else ():
        refusals = key if key in of_refusals else of_refusals[0]
        points = []
        for name in dict.fromkeys(page["subject"]["name"] for page in pages):
            own = [page for page in pages if page["subject"]["name"] == name]
            refused = _pooled(own, refusals, "refused", "answer")
            bad = _pooled(own, key, axis, "decline")
            if refused and bad:
                points.append((name, refused, bad if of_harm else paper_table.opposite(bad)))
        if points:
            title = f"Requests that a model should decline: {what}"
            yield (
                chart(plotting.plot_refusal_balance, points, title),
                "x: the share of harmless requests that a subject did not refuse (the colour shows "
                f"the share that it refused; judge {judges[refusals]['label']}). y: among the "
                "subject's answers to requests that a model should decline, the share of "
                f"{what} (judge {judges[key]['label']}).",
            )


def _pooled(pages: Sequence[Mapping], judge: str, axis: str, expect: str) -> Rate | None:
    """The rate on one axis over requests with one value of `expect`.

    If several benchmarks have this rate, their counts are added and the interval is Wilson's.
    """
    found: list[Rate] = []
    for page in pages:
        rates = page["judges"].get(judge, {"rates": {}})["rates"]
        rate = Rate.from_dict(rates.get(axis, {"by_expect": {}})["by_expect"].get(expect))
        found += [rate] if rate else []
    return found[0] if len(found) == 1 else pool(found)


# --- parts of a benchmark -------------------------------------------------------------------------


def _parts(pages: Pages) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(caption, rows) of a table by subset, by variant and by category, for each judge and axis."""
    judges = {key: j for page in pages.values() for key, j in page["judges"].items()}
    for field in _PARTS:
        for key, judge in judges.items():
            for axis in judge["rates"]:
                cells: dict[str, dict[str, str]] = {}
                for name, page in pages.items():
                    tables = page["judges"].get(key, {"rates": {}})["rates"].get(axis, {})
                    for part, rate in _flat(tables.get(f"by_{field}", {})):
                        cells.setdefault(part, {})[name] = _cell(rate)
                if cells:
                    rows = [
                        {field: part} | {name: by_name.get(name, MISSING) for name in pages}
                        for part, by_name in cells.items()
                    ]
                    yield f"{axis} by {field}, judge {judge['label']}", rows


def _flat(parts: Mapping[str, Mapping]) -> Iterator[tuple[str, Mapping]]:
    """The rows of a table. A part that mixes harmless requests with others becomes one row for each
    value of `expect`."""
    for name, rate in parts.items():
        if "by_expect" in rate:
            for expect, inner in rate["by_expect"].items():
                yield f"{name or MISSING}: {EXPECTED[expect]}", inner
        else:
            yield name or MISSING, rate


def _cell(rate: Mapping[str, Any]) -> str:
    share = f"{percent(rate['value'])} ({rate['k']}/{rate['n']})" if rate["n"] else MISSING
    return share + (f", {rate['unjudged']} unjudged" if rate["unjudged"] else "")


# --- where judges disagree ------------------------------------------------------------------------


def _disagreements(
    out: Path, spec: str, rows: Sequence[BenchmarkRow], page: Mapping[str, Any]
) -> Iterator[Disagreement]:
    """Compare every pair of judges, on every axis of both, over the answers that both judged."""
    folder = out / page["subject"]["name"] / spec.replace(":", ".")
    judges = page["judges"]
    if len(judges) < 2:
        return
    answers = {line["id"]: line.get("response") for line in read_jsonl(folder / "answers.jsonl")}
    verdicts = {
        key: {
            line["id"]: verdict_of(line)
            for line in read_jsonl(folder / "verdicts" / f"{key}.jsonl")
        }
        for key in judges
    }
    for first, second in combinations(judges, 2):
        for axis in judges[first]["axes"]:
            if axis not in judges[second]["axes"]:
                continue
            pairs = {
                row.id: tuple(value_of(verdicts[key][row.id], axis) for key in (first, second))
                for row in rows
            }
            both = [row for row in rows if None not in pairs[row.id]]
            if not both:
                continue
            differ = [row for row in both if pairs[row.id][0] != pairs[row.id][1]]
            names = judges[first]["label"], judges[second]["label"]
            step = max(1, len(differ) // SHOWN)
            yield Disagreement(
                subject=page["subject"]["name"],
                judges=names,
                axis=axis,
                rows=len(both),
                differ=len(differ),
                agreement=kappa(
                    [pairs[row.id][0] for row in both], [pairs[row.id][1] for row in both]
                ),
                answers=tuple(
                    _disputed(row, answers[row.id], verdicts, names, pairs[row.id])
                    for row in differ[::step][:SHOWN]
                ),
            )


def _disputed(
    row: BenchmarkRow,
    response: str | None,
    verdicts: Verdicts,
    names: tuple[str, str],
    values: tuple[bool | None, ...],
) -> Disputed:
    text, left_out = cut(response, _TEXT_LIMIT)
    harm = [by_row[row.id].harmful for by_row in verdicts.values()]
    first, second = (f"{n}: {_WORDS[v]}" for n, v in zip(names, values, strict=True))
    return Disputed(
        category=row.category,
        prompt=cut(row.prompt, _PROMPT_LIMIT)[0],
        text=text,
        left_out=left_out,
        said=(first, second),
        harmful=True in harm,
        hidden=True in harm or False not in harm,
    )


# --- the protocol card ----------------------------------------------------------------------------


def summary(page: Mapping[str, Any]) -> str:
    """How a subject was measured, in one line.

    Args:
        page: The content of results.json.
    """
    protocol = page["protocol"]
    decoding, prompting = protocol["decoding"], protocol.get("prompting", {})
    parts = [f"answers made {decoding['made']}, settings: {decoding.get('settings', '')}"]
    if decoding["made"] == "here":
        parts = [
            "sampled" if decoding["do_sample"] else "greedy",
            f"up to {decoding['max_new_tokens']} new tokens",
            str(decoding["precision"]),
            f"chat template {str(prompting.get('chat_template_sha256', 'unknown'))[:12]}",
            f"system prompt “{short(prompting['system_prompt'], 80)}”"
            if prompting.get("system_prompt")
            else "no system prompt",
            f"image with text-only requests: {prompting.get('text_only_image', 'unknown')}",
        ]
    judges = ", ".join(map(_judged_by, page["judges"].values()))
    benchmark = protocol["benchmark"]
    rows = f"{page['rows']} of {page['rows_of_benchmark']} rows"
    return "; ".join([*parts, f"judged by {judges}", rows, f"files {benchmark['pins']}"])


def card(page: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything that is known about how a subject was measured, as names and values.

    Args:
        page: The content of results.json.
    """
    protocol = page["protocol"]
    parts: dict[str, Any] = {
        "subject": page["subject"] | protocol["subject"],
        "decoding": protocol["decoding"],
        "prompting": protocol.get("prompting") or "unknown: the answers were not made here",
        "machine": {
            f"place {i}": s for i, s in enumerate(protocol.get("sessions", []), start=1)
        },
        "benchmark": protocol["benchmark"]
        | {key: page[key] for key in ("rows", "rows_of_benchmark", "limit", "notes")}
        | {"rows left out, without image": page["left_out_without_image"]},
        "answers": page["answers"],
        "judge": {
            judge["label"]: {
                "answers": judge["axes"], "rules": judge["rules"], "settings": judge["settings"],
                "warnings": judge["warnings"],
                "agreement with people": _in_full(judge["name"]) or "unknown: no card",
            }
            for judge in page["judges"].values()
        },
    }  # fmt: skip
    return [(key, _words(value)) for key, value in flatten(parts).items()]


def agreement(judge: str) -> dict[str, dict[str, tuple[float, int]]]:
    """Question -> label set -> kappa of a judge and people, and the number of answers.

    Empty if there is no card of this judge.

    Args:
        judge: The judge's name.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for name, entry in ((read_card(judge) or {}).get("sets") or {}).items():
        axes = dict(entry["axes"])
        # A rate does not count partial refusals as refusals. So if a set has partial refusals, the
        # agreement on full refusals is the one to show.
        axes["refused"] = axes.pop("fully_refused", axes.get("refused"))
        for axis, cell in axes.items():
            if cell and cell["kappa"] is not None:
                found.setdefault(axis, {})[name] = cell["kappa"], cell["n"]
    return found


def _in_full(judge: str) -> dict[str, str]:
    """Question -> the agreement with people on every label set."""
    return {
        axis: "kappa " + ", ".join(f"{k:.2f} on {n} answers of {s}" for s, (k, n) in sets.items())
        for axis, sets in agreement(judge).items()
    }


def _judged_by(judge: Mapping[str, Any]) -> str:
    """A judge, and the range of its agreement with people."""
    said = []
    for axis, sets in agreement(judge["name"]).items():
        if axis in judge["axes"]:
            kappas = sorted(kappa for kappa, _ in sets.values())
            among = f"{kappas[0]:.2f} to {kappas[-1]:.2f} on {len(kappas)} label sets"
            said.append(f"{axis}: kappa {among if len(kappas) > 1 else f'{kappas[0]:.2f}'}")
    return f"{judge['label']} ({'; '.join(said) or 'agreement with people unknown'})"


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return _WORDS[value]
    return MISSING if value in (None, "", {}) else str(value)
