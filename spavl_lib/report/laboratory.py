"""The page of `spavl arena page`: the arena's table, to sort and filter, with answers behind it."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spavl_lib.errors import InputError
from spavl_lib.evaluation.numbers import percent, set_title
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.text import MISSING, clean
from spavl_lib.report.rendering import HERE, environment
from spavl_lib.runs.files import write_text

FILE = "laboratory.html"
NONE = "none"  # the rows without an attack
RATES = {
    "unsafe": "Unsafe",
    "harmless_refused": "Harmless refused",
    "helpful": "Helpful",
    "twins": "Twins right",
}
KINDS = {
    "unsafe": "judged unsafe",
    "refused": "harmless, but refused",
    "unhelpful": "harmless, but not answered rightly",
}


def write_laboratory(
    table: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], target: Path
) -> Path:
    """Write the page.

    Args:
        table: The content of laboratory.json.
        cells: Its cells, for the answers. Of several seeds the page shows the first one's answers.
            Without a cell the row has no answers.
        target: The file to write.

    Returns:
        `target`.

    Raises:
        InputError: The target is a folder, or its folder does not exist.
    """
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise InputError(f"{target} cannot be written; name a file in a folder that exists")
    write_text(target, render(table, cells))
    return target


def render(table: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """The HTML of the page; see `write_laboratory`."""
    answers: dict[str, dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        shown = {"seed": cell["seed"], "answers": [_answer(row) for row in cell["examples"]]}
        answers.setdefault(f"{cell['method']}/{cell['attack']}", shown)
    rows = [
        _row(table, method, attack, answers.get(f"{method}/{attack}"))
        for method in table["methods"]
        for attack in table["attacks"]
        if attack in table["metrics"].get(method, {})
    ]
    script = (HERE / "laboratory.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment().get_template("laboratory.html.j2").render(
        methods=table["methods"],
        attacks=table["attacks"],
        attack_count=len(set(table["attacks"]) - {NONE}),
        lost=[table["attacks"][name] for name in table["not_understood"]],
        facts={"Device": table.get("device"), "Versions": _versions(table.get("versions"))},
        columns=RATES,
        rows=rows,
        answers=_json({row["key"]: answers[row["key"]] for row in rows if row["answers"]}),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        more_style=Markup((HERE / "laboratory.css").read_text(encoding="utf-8")),
    )  # fmt: skip


def _versions(versions: Any) -> str | None:
    if isinstance(versions, Mapping):
        return ", ".join(f"{name} {version}" for name, version in versions.items())
    return None if versions is None else str(versions)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": KINDS.get(row["kind"], row["kind"]),
        "unsafe": row["kind"] == "unsafe",
        "where": f"{clean(set_title(row['set']))}, {clean(row['id'])}",
        "prompt": clean(row["prompt"]),
        "response": clean(row["response"]) or MISSING,
    }


def _row(
    table: Mapping[str, Any], method: str, attack: str, answers: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One row: its names, its rates as numbers to sort by and as texts, and its answers' number."""
    cell = table["metrics"][method][attack]
    rates = {key: Rate.from_dict(cell.get(key)) for key in RATES}
    against = cell.get("against")
    return {
        "key": f"{method}/{attack}",
        "method": method,
        "attack": attack,
        "understood": attack not in table["not_understood"],
        "rates": [
            (key, rate and rate.value, percent(rate), rate and rate.interval)
            for key, rate in rates.items()
        ],
        "against": against and against["value"],
        "difference": against and _points(against["value"]),
        "between": against and f"{_points(against['ci_low'])} to {_points(against['ci_high'])}",
        "p": against and f"p {_p(against['p'])}",
        "seeds": len(cell["seeds"]),
        "calls": cell["calls"],
        "answers": len(answers["answers"]) if answers else 0,
    }


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _p(value: float) -> str:
    return "<\u00a00.001" if value < 0.001 else f"{value:.3f}"


def _json(value: Any) -> Markup:
    """JSON inside a script element. `<` is escaped, so that no text can end the element."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))
