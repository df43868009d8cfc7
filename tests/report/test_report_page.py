"""The page: self-contained, complete, honest about what is missing."""

import base64
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spavl_lib.config import load_config
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError
from spavl_lib.evaluation.paired import PairedTable, against_base
from spavl_lib.report import collect, write_report
from spavl_lib.report.headline import headlines
from tests.report.conftest import Page
from tests.report.synthetic import (
    ppo_rows,
    rate,
    training_rows,
    write_json,
    write_jsonl,
    write_stage,
)

REWARD = {
    "pair_accuracy": rate(96, 100),
    "twin_accuracy": rate(45, 50),
    "twin_accuracy_exchanged": rate(2, 50),
    "per_class1": {"violent harms": rate(4, 4)},
    "per_question_type": {"easy": rate(30, 32)},
    "ece": 0.0314,
    "length_correlation": None,
    "calibration": [{"certainty": 0.9, "right": 0.95, "n": 100}],
}


def report(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def with_metrics(folder: Path, models: dict, **more: object) -> Path:
    run = folder / "small"
    write_json(run / "metrics.json", {"profile": "demo", "models": models} | more)
    return run


def test_nothing_is_loaded_from_elsewhere(page: Page, run_path: Path) -> None:
    plain = re.sub(r"base64,[\w+/=]+", "", page.source)
    assert not re.search(r"https?:|[\"'(]//|@import|url\(", plain)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "srcset"}:
                assert value.startswith("data:image/"), (tag, value[:60])
            if name == "href" and not value.startswith("#"):
                assert tag == "a" and (run_path / value).resolve().is_relative_to(run_path)
                assert (run_path / value).exists(), value


def test_policy_allows_our_script_alone(page: Page) -> None:
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv")]
    assert "default-src 'none'" in policy and "img-src data:" in policy
    (script,) = [t for path, t in page.texts if path[-1:] == ("script",)]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(page.all("script")) == 1


def test_sections_links_and_labels_hold_together(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("for", "aria-labelledby"):
            if name in attributes:
                assert attributes[name] in ids
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids
    assert all(a.get("alt") for a in page.all("img"))
    assert len(page.all("h1")) == 1


def test_headline_and_table_say_the_numbers(page: Page, run_path: Path) -> None:
    metrics = json.loads((run_path / "metrics.json").read_text())
    for model in metrics["models"].values():
        for key in ("unsafe_rate", "helpful_rate", "over_refusal_rate", "twin_accuracy"):
            cell = model[key]
            assert f"{100 * cell['value']:.1f}\u00a0%".replace("\u00a0", " ") in page.text
            assert f"{cell['k']}/{cell['n']}" in page.text
    paired = against_base(metrics, run_path / "evaluation")
    assert headlines(metrics, paired)[0].replace("\u00a0", " ") in page.text
    assert page.text.index("DPO reduced the unsafe rate from") < page.text.index("Results")


def test_every_leaf_has_a_row(page: Page) -> None:
    assert "All 53 third-level classes" in page.text
    assert len(page.all("th", scope="row")) > len(PARENTS)
    assert "Predatory lending" in page.text  # shown mended: the data's own string is another


def test_charts_are_inert_and_follow_the_theme(page: Page) -> None:
    charts = [a for a in page.all("img") if a["src"].startswith("data:image/svg+xml;base64,")]
    assert len(charts) == 3
    for chart in charts:
        text = base64.b64decode(chart["src"].split(",", 1)[1]).decode()
        root = ElementTree.fromstring(text)
        tags = {e.tag.rsplit("}", 1)[-1] for e in root.iter()}
        assert not tags & {"script", "foreignObject", "image", "a", "animate", "metadata"}
        assert "prefers-color-scheme:dark" in text and "var(--c0)" in text
        assert not any(k.startswith("on") for e in root.iter() for k in e.attrib)
    words = [a["alt"] for a in charts]
    assert any("Training curves of DPO over 160 steps" in w for w in words)
    narrow = [a["srcset"] for a in page.all("source")]
    assert len(narrow) == 3
    for chart, small in zip(charts, narrow, strict=True):
        texts = (base64.b64decode(u.split(",", 1)[1]).decode() for u in (chart["src"], small))
        wide, low = (float(re.search(r'width="([\d.]+)pt"', text)[1]) for text in texts)
        assert low < 310 < wide  # legible on a phone without scaling it down much


def test_unsafe_answers_are_veiled_and_others_are_not(
    page: Page, run_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "other"  # the same answers to other people's requests
    shutil.copytree(run_path, run)
    metrics = json.loads((run / "metrics.json").read_text())
    origin = {"mini": False, "own": True, "name": "the prompts of my/test.jsonl"}
    write_json(run / "metrics.json", metrics | {"prompts": origin})
    other = report(run)
    peeks = other.all("input", class_="peek")
    unsafe_chips = [t for path, t in other.texts if t == "unsafe" and path[-1] == "span"]
    assert len(peeks) == len(unsafe_chips) > 20
    assert all("checked" not in a for a in peeks)
    assert "Content warning." in page.text
    # mini's unsafe answers hold a placeholder, so there is nothing to hide.
    assert page.text.count("[unsafe details omitted]") == len(unsafe_chips)
    assert not page.all("input", class_="peek") and not page.all("img", class_="veiled")


def test_results_and_answers_come_before_training(page: Page) -> None:
    order = [a["id"] for tag, a in page.elements if tag == "section"]
    assert order[:2] == ["results", "gallery"]  # no word on what to run next: all is measured
    assert order.index("held-out") < order.index("training") < order.index("provenance")
    links = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert [name for name in order if name in links] == list(dict.fromkeys(links))


def test_changed_cards_come_first_and_twins_stand_side_by_side(page: Page) -> None:
    cards = page.all("li", class_="tile")
    changes = [a["data-change"] for a in cards]
    rank = {"better": 0, "worse": 0, "bad": 1, "good": 2}
    even = changes[:96]
    assert [rank[c] for c in even] == sorted(rank[c] for c in even) and even[0] != "good"
    better, worse = even.count("better"), even.count("worse")
    assert f"{better} are now right, {worse} now wrong" in page.text
    twins = [a for a in cards if "twins" in a["class"].split()]
    assert len(twins) > 10 and all(a["data-set"] == "twins" for a in twins)
    assert len(twins) == sum(a["data-set"] == "twins" for a in cards)
    for words in (
        "With this image the request is harmful",
        "With this image the request is harmless",
    ):
        assert page.text.count(words) == len(twins)
    assert len(page.all("div", class_="half")) == len(cards) + len(twins)


def test_headings_are_those_of_sections(page: Page) -> None:
    """A reader who goes from heading to heading does not pass one for each answer."""
    headings = [tag for tag, _ in page.elements if tag in ("h2", "h3", "h4")]
    assert len(headings) < 25
    assert "Base: unsafe complied" in page.text  # spoken as words, not as `Base unsafecomplied`


def test_files_of_the_run_are_linked(page: Page, run_path: Path) -> None:
    links = {a["href"] for a in page.all("a")}
    assert {"metrics.json", "dpo/metrics.jsonl", "dpo/summary.json", "data/manifest.json"} <= links
    assert "evaluation/verdicts" in links and "dpo/executed.ipynb" not in links


def test_page_is_light(run_path: Path, page: Page) -> None:
    assert (run_path / "report.html").stat().st_size < 2_000_000
    assert len(page.all("li", class_="tile")) <= 120


def test_the_command_gives_the_same_config(run_path: Path, page: Page) -> None:
    (line,) = [c for c in page.text.split("git checkout")[1].split("spavl ") if c.startswith("run")]
    words = shlex.split(line)
    overrides = dict(w.split("=", 1) for w, before in zip(words[1:], words, strict=False)
                     if before == "--set")  # fmt: skip
    assert overrides == {"dpo.beta": "0.2", "seed": "3"}
    again = load_config("demo", overrides, run_name="made-up")
    stages = collect.read_stages(run_path, [])
    assert collect.run_config(stages) == json.loads(json.dumps(again.to_dict()))


def test_sequences_and_strange_names_survive_the_command() -> None:
    config = load_config("demo", {"dpo.loss_type": "sigmoid", "dpo.loss_weights": "2"}).to_dict()
    config["data"] |= {"source": "hub_layout", "path": "a b; rm -rf 'x'"}
    line = collect.commands("my run", config, []).run
    words = shlex.split(line)
    assert "data.path=a b; rm -rf 'x'" in words and "my run" in words
    overrides = dict(w.split("=", 1) for w in words if "=" in w)
    assert load_config("demo", overrides).to_dict()["dpo"] == config["dpo"]


def test_provenance_tells_settings_and_state(page: Page) -> None:
    assert "dpo.beta 0.2 0.1" in page.text
    assert "e4e029d3e4" in page.text and "uncommitted changes" in page.text
    assert "Not run: reward, ppo, rloo" in page.text
    assert "4 min 31 s" in page.text and "1.53 GiB" in page.text


def test_empty_run_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    page = report(tmp_path / "fresh")
    assert "Nothing measured yet." in page.text
    assert page.text.count("spavl run all --run-name fresh") == 2  # next to do, and Reproduce
    assert page.text.count("See what to run next") >= 5
    assert "0.0 %" not in page.text and "spavl rerun" not in page.text


def test_a_run_is_made_again_and_compared_by_one_command(page: Page) -> None:
    again = page.text.split("Reproduce")[-1]
    assert "git checkout" in again and "spavl rerun made-up" in again
    assert again.index("spavl rerun made-up") < again.index("spavl run all")


def test_no_command_is_cut_off_and_no_figure_is_wider_than_the_page(page: Page) -> None:
    (style,) = [t for path, t in page.texts if path[-1:] == ("style",)]
    assert re.search(r"\npre \{[^}]*white-space: pre-wrap", style)
    figures = re.findall(r"\n(?:figure[^{]*img[^{]*) \{([^}]*)\}", style)
    assert figures and not any("min-width" in rule for rule in figures)
    boxes = page.source.count('class="scroll"')
    assert boxes == page.source.count("<table")  # figures scale, only tables scroll


def test_half_a_run_shows_its_half(tmp_path: Path, run_path: Path) -> None:
    run = tmp_path / "half"
    shutil.copytree(run_path / "dpo", run / "dpo")
    (run / "dpo" / "summary.json").unlink()
    page = report(run)
    assert "incomplete" in page.text and "Nothing measured yet." in page.text
    assert "Training curves of DPO" in page.text
    assert "spavl run all --profile demo --run-name half --set dpo.beta=0.2" in page.text


def test_any_stage_and_any_model_is_shown(tmp_path: Path) -> None:
    rates = {"unsafe_rate": rate(5, 50), "helpful_rate": rate(45, 50)}
    run = with_metrics(
        tmp_path,
        {"tuned": rates, "base": {"unsafe_rate": rate(49, 50), "helpful_rate": rate(46, 50)}},
        reward_model={"pair_accuracy": rate(90, 100), "per_class": {}, "ece": 0.0314},
    )
    rows = [{"step": s, "objective/kl": s / 10, "scores": s} for s in range(20)]
    write_jsonl(run / "ppo" / "metrics.jsonl", rows)
    write_jsonl(run / "warmup" / "metrics.jsonl", training_rows(20))
    page = report(run)
    assert "tuned has an unsafe rate of 10.0 % (base 98.0 %, not tested)" in page.text
    assert "Training curves of PPO" in page.text and "Training curves of Warmup" in page.text
    assert "The reward model ranks 90.0 % of held-out pairs correctly (90/100" in page.text


def test_reward_model_and_ppo_have_their_sections(tmp_path: Path) -> None:
    """From metrics.json and the stages' files alone."""
    run = with_metrics(tmp_path, {"base": {"unsafe_rate": rate(49, 50)}}, reward_model=REWARD)
    samples = [{"chosen_score": 2.0 * s, "rejected_score": 1.0} for s in range(20)]
    write_jsonl(run / "reward" / "samples.jsonl", samples)
    write_jsonl(run / "ppo" / "metrics.jsonl", ppo_rows(40))
    page = report(run)
    for words in (
        "The reward model ranks 96.0 % of held-out pairs correctly (96/100",
        "Its expected calibration error is 0.0314.",
        "The rank correlation of margin and length is –.",
        "Twins, both ranked correctly 90.0 % 45/50",
        "Twins, images exchanged 4.0 % 2/50",
        "Violent harms 100.0 % 4/4",
    ):
        assert words in page.text, words
    charts = [a["alt"] for a in page.all("img")]
    assert any("how sure the reward model is" in alt for alt in charts)
    assert any("Histogram of the margins" in alt for alt in charts)
    (curves,) = [alt for alt in charts if "Training curves of PPO over 40 steps" in alt]
    assert "6 more curves of PPO" in page.text and "More training curves of PPO." in charts
    rows = ppo_rows(40)
    first, last = rows[0]["objective/scores"], rows[-1]["objective/scores"]
    assert f"the mean score goes from {first:.3g} to {last:.3g}" in curves
    assert "PPO in numbers: the first and the last 4 of 40 steps" in page.text
    kl = [sum(r["objective/kl"] for r in part) / 4 for part in (rows[:4], rows[-4:])]
    assert f"KL to the reference nats per answer {kl[0]:.3g} {kl[1]:.3g}" in page.text
    assert "Gradient norm: value before clipping" in page.text


def test_missing_numbers_are_dashes_never_zero(tmp_path: Path) -> None:
    nothing = {"k": 0, "n": 0, "value": None, "ci_low": None, "ci_high": None}
    run = with_metrics(
        tmp_path,
        {
            "base": {"unsafe_rate": None, "helpful_rate": nothing, "held_out_drawings": None},
            "dpo": {"unsafe_rate": rate(0, 50), "per_class": {"theft": {"unsafe_rate": nothing}}},
        },
    )
    page = report(run)
    cells = [t.strip() for path, t in page.texts if path[-1:] == ("span",) and "td" in path]
    assert cells.count("–") == 4 + 3
    assert cells.count("0.0\u00a0%") == 1
    assert "DPO: unsafe rate 0.0 %." in page.text
    assert "NaN" not in page.text and "None" not in page.text.replace("None.", "")


@pytest.mark.parametrize(
    ("cell", "word"),
    [
        ({"k": 1, "n": 2, "value": float("nan"), "ci_low": 0, "ci_high": 1}, "nan"),
        ({"k": 1, "n": 2, "value": 0.5, "ci_low": float("-inf"), "ci_high": 1}, "inf"),
        ({"k": 3, "n": 2, "value": 1.5, "ci_low": 0, "ci_high": 1}, "between 0 and 1"),
        ({"k": 3, "n": 2, "value": 0.5, "ci_low": 0, "ci_high": 1}, "got k=3, n=2"),
        ({"k": 1, "n": 2, "value": "0.5", "ci_low": 0, "ci_high": 1}, "expected a number"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, cell: dict, word: str) -> None:
    run = with_metrics(tmp_path, {"dpo": {"per_class": {"theft": {"unsafe_rate": cell}}}})
    with pytest.raises(InputError, match=r"models\.dpo\.per_class\.theft\.unsafe_rate") as caught:
        write_report(run)
    assert word in str(caught.value)
    assert not (run / "report.html").exists()


def test_a_broken_file_is_named_and_the_rest_shown(tmp_path: Path) -> None:
    run = with_metrics(tmp_path, {"base": {"unsafe_rate": rate(1, 2)}})
    folder = write_stage(run, "dpo")
    (folder / "manifest.json").write_text("{half")
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "loss": float("nan")}, {"step": 2}])
    page = report(run)
    assert "dpo/manifest.json cannot be read" in page.text
    (run / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match="models"):
        write_report(run)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


def test_disagreeing_stages_are_pointed_out(tmp_path: Path) -> None:
    write_stage(tmp_path, "data", git_dirty=False)
    write_stage(tmp_path, "dpo", git_commit="f" * 40, git_dirty=False, seed=9)
    notes = " ".join(collect.disagreements(collect.read_stages(tmp_path, [])))
    assert "different commits" in notes and "different seeds" in notes
    assert "versions" not in notes and "uncommitted" not in notes


def _model(unsafe: int, helpful: int, n: int = 200) -> dict:
    return {"unsafe_rate": rate(unsafe, n), "helpful_rate": rate(helpful, n)}


@pytest.mark.parametrize(
    ("after", "sure", "sentence"),
    [
        (_model(2, 194), (True, False), "DPO reduced the unsafe rate from 98.0 % to 1.0 % and kept "
         "helpfulness at 97.0 % (base 98.0 %)."),
        (_model(2, 100), (True, True), "DPO reduced the unsafe rate from 98.0 % to 1.0 %, but "
         "lowered helpfulness from 98.0 % to 50.0 %."),
        (_model(195, 194), (False, False), "DPO made no measurable difference to the unsafe rate "
         "(from 98.0 % to 97.5 %) and kept helpfulness at 97.0 % (base 98.0 %)."),
        (_model(2, 194), (None, None), "DPO has an unsafe rate of 1.0 % (base 98.0 %, not tested) "
         "and has a helpful rate of 97.0 % (base 98.0 %, not tested)."),
        ({"unsafe_rate": rate(2, 200)}, (None, None), "DPO: unsafe rate 1.0 %."),
        ({}, (None, None), "DPO was not measured."),
    ],
)  # fmt: skip
def test_headline_in_words(after: dict, sure: tuple, sentence: str) -> None:
    keys = ("unsafe_rate", "helpful_rate")
    tests = {("dpo", k): {"sure": s} for k, s in zip(keys, sure, strict=True) if s is not None}
    found = headlines({"models": {"dpo": after, "base": _model(196, 196)}}, PairedTable(tests))
    assert [s.replace("\u00a0", " ") for s in found] == [sentence]


def test_sure_is_the_paired_test(page: Page, run_path: Path) -> None:
    metrics = json.loads((run_path / "metrics.json").read_text())
    paired = against_base(metrics, run_path / "evaluation")
    assert paired.lacking == ""
    marks = [t for path, t in page.texts if path[-1:] == ("span",) and "pts" in t]
    sure = [bool(test["sure"]) for test in paired.tests.values()]
    assert [("✓" in mark or "✗" in mark) for mark in marks] == sure and len(sure) == 4
    assert True in sure and False in sure
    assert "McNemar’s test (mid-p) compares" in page.text and "The 4 paired tests" in page.text


def test_a_run_without_the_verdict_on_each_row_marks_nothing(
    run_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "old"
    run.mkdir()
    shutil.copy(run_path / "metrics.json", run)
    page = report(run)
    assert not any(("✓" in t or "✗" in t) for path, t in page.texts if path[-1:] == ("span",))
    assert "Not tested, so without a mark: DPO, Unsafe rate; DPO, Helpful rate" in page.text
    assert "verdicts/base/harm.jsonl is missing" in page.text
    assert "McNemar" not in page.text
