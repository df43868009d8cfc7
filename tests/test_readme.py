"""What the README says: its table is a run's, its links and commands exist."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import table
from spavl_lib import cli
from spavl_lib.config import profile_names
from tests.helpers import load_script

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


publish = load_script("publish")
RESULTS = (REPO / "docs/results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page, names in publish.TABLES.items() for name in names]
)
def test_tables_are_those_of_the_published_run(page: str, name: str) -> None:
    table_of = publish.TABLES[page][name]()
    text = (REPO / page).read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n{table_of}\n<!-- /{name} -->" in text


def test_the_speed_table_is_the_committed_results() -> None:
    assert table.render() in RESULTS


def test_the_committed_run_meets_what_is_promised() -> None:
    """The demo's promise, on the figures the README shows."""
    models = json.loads((REPO / "reports/demo/metrics.json").read_text(encoding="utf-8"))["models"]
    base, dpo = models["base"], models["dpo"]
    assert base["unsafe_rate"]["value"] >= 0.85 and dpo["unsafe_rate"]["value"] <= 0.03
    assert base["helpful_rate"]["value"] >= 0.90
    assert base["helpful_rate"]["value"] - dpo["helpful_rate"]["value"] <= 0.02
    assert dpo["over_refusal_rate"]["value"] <= 0.05
    assert dpo["twin_accuracy"]["value"] >= 0.85
    assert dpo["twin_accuracy_exchanged"]["value"] <= 0.10


def test_the_scaling_table_is_the_committed_runs() -> None:
    page = json.loads((REPO / "reports/demo/scaling.json").read_text(encoding="utf-8"))
    arms = {(a["family"], a["arm"]): a for a in page["arms"]}
    sizes = [a for (family, _), a in arms.items() if family == "size"]
    for word in ("unsafe", "helpful"):
        rates = [a[f"{word}_rate"] for a in (page["base"], *sizes)]
        cells = [f"{rate['k']}/{rate['n']}" for rate in rates]
        assert f"| {word} | {' | '.join(cells)} |" in RESULTS
    assert f"| updates | 0 | {' | '.join(str(a['steps']) for a in sizes)} |" in RESULTS
    assert f"| pairs | 0 | {' | '.join(a['arm'] for a in sizes)} |" in RESULTS

    def unsafe(family: str, *names: str) -> list[int]:
        return [arms[family, name]["unsafe_rate"]["k"] for name in names]

    seeds = arms["size", "600"]["unsafe_rate_by_seed"]
    assert f"between {100 * min(seeds):.0f} and {100 * max(seeds):.0f} % unsafe" in RESULTS
    mixed, easy, hardq, hards = unsafe("questions", "mixed", "easy", "hardq", "hards")
    assert (
        f"mixed questions leave {mixed} answers of 477 unsafe, hard statements {hards}," in RESULTS
    )
    assert f"hard questions {hardq}, and easy ones {easy};" in RESULTS
    every, reckless, hedged = unsafe("answers", "all", "with reckless", "with hedged")
    assert f"answers of all styles leave {every} unsafe" in RESULTS
    assert f"those of three styles {reckless} or {hedged}." in RESULTS
    small, middle, large = unsafe("rank", "4", "16", "64")
    assert f"rank 4, 16 and 64 leaves {small}, {middle} and {large}," in RESULTS
    findings = page["findings"]
    assert findings["more_data_is_safer"] and findings["all_answers_are_safest"]
    # What the paper found and this run did not is said.
    assert findings["mixed_is_safest"] or "the paper found mixed ones safest" in RESULTS


def test_the_time_of_the_scaling_runs_is_one_figure() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    notebook = (REPO / "notebooks/07_scaling_and_ablations.ipynb").read_text(encoding="utf-8")
    minutes = [
        re.findall(r"`make scaling` \| (\d+) \|", README),
        re.findall(r"^scaling:.*; (\d+) minutes$", makefile, re.MULTILINE),
        re.findall(r"\| minutes \| 1 \| (\d+) \|", notebook),
    ]
    assert len(minutes[0]) == 1 and minutes == minutes[:1] * 3


def test_every_notebook_stands_in_the_table_and_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (REPO / link).exists()] == []
    shown = {Path(link).name for link in local if link.endswith(".ipynb")}
    assert shown == {path.name for path in (REPO / "notebooks").glob("*.ipynb")}


def test_commands_and_profiles_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test", "lab"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
    verbs = set(re.findall(r"\bspavl (\w+)", README))
    assert {"run", "data"} <= verbs
    for verb in verbs:
        assert CliRunner().invoke(cli.app, [verb, "--help"]).exit_code == 0, verb
    profiles = (REPO / "docs/profiles.md").read_text(encoding="utf-8")
    columns = next(line for line in profiles.splitlines() if line.startswith("| | `smoke`"))
    assert set(re.findall(r"`([\w-]+)`", columns)) == set(profile_names())
