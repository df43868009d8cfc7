"""`spavl evaluate`: nothing is asked or judged twice, and no answer goes to a wrong row."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from spavl_lib.config import EvaluationConfig, GenerationConfig
from spavl_lib.data.images import decode
from spavl_lib.errors import BusyError, InputError, Preempted
from spavl_lib.evaluation.benchmark_runs import asking, judging
from spavl_lib.evaluation.benchmark_runs.evaluate import Options, _locked, evaluate
from spavl_lib.evaluation.benchmark_runs.rows import choose
from spavl_lib.evaluation.benchmark_runs.subject import CONTROLS, SAFETY_PROMPT, find_subject
from spavl_lib.evaluation.benchmarks import RULES, load_benchmark
from spavl_lib.evaluation.judges import JUDGES, register_judge, rubric
from spavl_lib.evaluation.judges.endpoint import Client
from spavl_lib.evaluation.verdicts import EMPTY, Verdict
from spavl_lib.generation.ask import response_scores
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.runs.files import read_jsonl
from tests.evaluation.benchmark_files import needs_real_files, write_fixture
from tests.helpers import embedded_processor, smoke, write_reward_model

OPTIONS: dict[str, Any] = {
    "allow_changed": True,
    "generation": GenerationConfig(batch_size=2, max_new_tokens=8),
    "set_tokens": True,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks with invented rows."""
    for name in ("figstep", "xstest"):
        write_fixture(tmp_path / "benchmarks" / name, name)
    monkeypatch.setenv("SPAVL_BENCHMARKS", str(tmp_path / "benchmarks"))
    return tmp_path / "benchmarks"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that a model is asked."""
    sizes: list[int] = []
    real = asking.generate_batch

    def counted(model: Any, processor: Any, batch: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(batch["input_ids"]))
        return real(model, processor, batch, *args, **options)

    monkeypatch.setattr(asking, "generate_batch", counted)
    return sizes


@pytest.fixture
def harm_judge() -> Iterator[list[str]]:
    """Registers the judge `spotter`, and lists the responses that it judged."""
    seen: list[str] = []

    class Spotter:
        name, axes = "spotter:1", ("harmful",)

        def many(self, records: list[dict]) -> list[Verdict]:
            seen.extend(record["response"] for record in records)
            unread = Verdict(raw="?", why_unjudged="the judge's reply holds no verdict")
            return [
                unread if "hmm" in r["response"] else Verdict(harmful="do it" in r["response"])
                for r in records
            ]

    register_judge("spotter")(lambda settings, truth: Spotter())
    yield seen
    del JUDGES["spotter"]


def options_of(**changes: Any) -> Options:
    return Options(**(OPTIONS | changes))


def answers_file(tmp_path: Path, answers: dict[str, str], name: str = "theirs") -> str:
    path = tmp_path / f"{name}.jsonl"
    lines = [json.dumps({"id": k, "response": v}) for k, v in answers.items()]
    path.write_text("\n".join(lines))
    return str(path)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(texts: list[str], names: list[str], judges: list[str], out: Path, **changes: Any) -> dict:
    subjects = [find_subject(text) for text in texts]
    stop = changes.pop("should_stop", False)
    report = changes.pop("report", lambda text: None)
    options = options_of(**changes)
    return evaluate(subjects, names, judges, out, options, should_stop=stop, report=report)


def test_a_model_is_asked_once(root: Path, batches: list[int], tmp_path: Path) -> None:
    out, said = tmp_path / "out", []
    found = run(["embedded"], ["figstep", "xstest"], ["phrases"], out, report=said.append)
    assert batches == [2, 1, 2, 1]
    page = json.loads((out / "embedded/figstep/results.json").read_text())
    assert page == json.loads(json.dumps(found["results"]["embedded"]["figstep"]))
    [judge] = page["judges"].values()
    assert judge["rates"]["refused"]["all"]["n"] == 3
    assert "harmful" not in judge["rates"]
    protocol = page["protocol"]
    assert protocol["decoding"]["max_new_tokens"] == 8
    assert protocol["decoding"]["do_sample"] is False
    assert protocol["prompting"]["system_prompt"].endswith("USER: ")
    assert "<image>" in protocol["prompting"]["with_image"]
    assert "<image>" not in protocol["prompting"]["text_only"]
    assert protocol["benchmark"]["licence"] == "MIT"
    assert protocol["benchmark"]["pins"] == "changed"
    assert any("licence: MIT" in text for text in said)
    tables = found["results"]["embedded"]["xstest"]["judges"][next(iter(page["judges"]))]["rates"]
    assert tables["refused"]["all"] is None  # harmless requests, and one that is not
    # Another judge asks nothing again, and the first judge's rates stay.
    batches.clear()
    page = run(["embedded"], ["figstep"], ["phrases:gcg"], out)["results"]["embedded"]["figstep"]
    assert batches == []
    assert {judge["name"] for judge in page["judges"].values()} == {"phrases-v1", "gcg"}


def test_a_stop_and_a_torn_line_lose_nothing(
    root: Path, batches: list[int], tmp_path: Path
) -> None:
    class AfterOne:
        def __bool__(self) -> bool:
            return bool(batches)

    out = tmp_path / "out"
    with pytest.raises(Preempted, match="stopped with 2 of 3 answers written"):
        run(["embedded"], ["figstep"], ["phrases"], out, should_stop=AfterOne())
    path = out / "embedded/figstep/answers.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"id": "figstep:full:Forb')
    batches.clear()
    run(["embedded"], ["figstep"], ["phrases"], out)
    assert batches == [1]
    assert path.read_bytes().startswith(kept)
    straight = tmp_path / "straight"
    run(["embedded"], ["figstep"], ["phrases"], straight)
    assert path.read_bytes() == (straight / "embedded/figstep/answers.jsonl").read_bytes()


def test_a_limit_is_said_and_can_be_raised(root: Path, batches: list[int], tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    page = run(["embedded"], ["figstep"], ["phrases"], out, limit=1, report=said.append)
    assert page["results"]["embedded"]["figstep"]["rows"] == 1
    assert any("figstep (1 of 3 rows)" in text for text in said)
    page = run(["embedded"], ["figstep"], ["phrases"], out)
    assert page["results"]["embedded"]["figstep"]["rows"] == 3
    assert sum(batches) == 3


def test_other_settings_or_rows_are_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(["embedded"], ["figstep"], ["phrases"], out)
    other = GenerationConfig(batch_size=2, max_new_tokens=9)
    with pytest.raises(InputError, match=r"decoding.max_new_tokens: 8, now 9.*choose another"):
        run(["embedded"], ["figstep"], ["phrases"], out, generation=other)
    image = root / "figstep/data/images/SafeBench/query_ForbidQI_1_2_6.png"
    Image.new("RGB", (28, 28), "white").save(image)
    with pytest.raises(InputError, match=r"other prompts or images than .*ForbidQI-1-2"):
        run(["embedded"], ["figstep"], ["phrases"], out)
    with pytest.raises(InputError, match="--allow-changed"):
        run(["embedded"], ["figstep"], ["phrases"], tmp_path / "new", allow_changed=False)


def test_rows_without_room_or_image_are_unjudged(
    root: Path, batches: list[int], tmp_path: Path
) -> None:
    image = root / "figstep/data/images/SafeBench/query_ForbidQI_1_2_6.png"
    image.write_bytes(image.read_bytes()[:60])  # its header is whole
    page = run(["embedded"], ["figstep"], ["phrases"], tmp_path / "a")["results"]["embedded"]
    rate = next(iter(page["figstep"]["judges"].values()))["rates"]["refused"]["all"]
    assert (rate["n"], rate["unjudged"], rate["if_unjudged_yes"]) == (2, 1, 1 / 3)
    assert "ForbidQI" in next(iter(rate["why"]))
    assert sum(batches) == 2
    wide = GenerationConfig(batch_size=2, max_new_tokens=510)
    page = run(["embedded"], ["xstest"], ["phrases"], tmp_path / "b", generation=wide)
    rate = next(iter(page["results"]["embedded"]["xstest"]["judges"].values()))["rates"]["refused"]
    assert rate["by_expect"]["answer"]["n"] == 0
    assert sum(batches) == 2
    [why] = rate["by_expect"]["answer"]["why"]
    assert "tokens, and N fit beside the answer" in why
    whole = GenerationConfig(batch_size=2, max_new_tokens=512)
    with pytest.raises(InputError, match="max_new_tokens = 512 leaves no room for a prompt"):
        run(["embedded"], ["xstest"], ["phrases"], tmp_path / "c", generation=whole)


def test_missing_images_give_no_rate_unless_skipped(root: Path, tmp_path: Path) -> None:
    (root / "figstep/data/images/SafeBench/query_ForbidQI_1_2_6.png").unlink()
    with pytest.raises(InputError, match="1 of 3 rows lack their image .*--missing-images skip"):
        run(["embedded"], ["figstep"], ["phrases"], tmp_path / "a")
    found = run(
        ["embedded"], ["figstep"], ["phrases"], tmp_path / "a", missing_images="skip"
    )["results"]["embedded"]["figstep"]  # fmt: skip
    assert found["rows"] == 2
    assert found["left_out_without_image"] == ["figstep:full:ForbidQI-1-2"]
    assert found["protocol"]["benchmark"]["missing_images"] == 1
    # Answers made elsewhere need no image here.
    answers = {f"ForbidQI-1-{n}": "I cannot help." for n in (1, 2, 3)}
    path = answers_file(tmp_path, answers)
    found = run([path], ["figstep"], ["phrases"], tmp_path / "b")["results"]["theirs"]["figstep"]
    assert (found["rows"], found["left_out_without_image"]) == (3, [])


def test_a_judge_is_told_a_benchmarks_own_rule(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[dict]] = []
    monkeypatch.delenv("SPAVL_JUDGE_KEY", raising=False)
    settings = EvaluationConfig(
        judge_model="m", judge_url="http://localhost:9/v1", judge_canaries=False
    )
    judge = judging.open_judge("endpoint", settings)

    def reply(client: Any, messages: list[dict]) -> str:
        told.append(messages)
        return '{"verdict": "unsafe"}'

    monkeypatch.setattr(Client, "__call__", reply)
    row = load_benchmark("figstep", str(root), allow_changed=True, keep_missing=True).rows[0]
    verdicts = judge([row, dataclasses.replace(row, rule="warn_or_decline")], ["a", "b"])
    assert [v.harmful for v in verdicts] == [True, True]
    usual, own = sorted((m[0]["content"] for m in told), key=lambda text: "by this rule" in text)
    assert usual == rubric.system_of() and RULES["warn_or_decline"] in own


def test_what_an_endpoint_left_out_is_asked_later(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"a": f"{rubric.NOT_ASKED}: the budget is spent", "b": f"{rubric.NO_REPLY} from x"}
    asked: list[str] = []

    class Tired:
        name, axes = "tired:1", ("harmful",)

        def __call__(self, record: dict) -> Verdict:
            asked.append(record["response"])
            why = reasons.get(record["response"], "")
            return Verdict(why_unjudged=why) if why else Verdict(harmful=True)

    monkeypatch.setitem(JUDGES, "tired", None)
    del JUDGES["tired"]
    register_judge("tired")(lambda settings, truth: Tired())
    path = answers_file(tmp_path, {f"ForbidQI-1-{n}": text for n, text in enumerate("abc", 1)})
    unjudged = []
    for _ in range(3):
        page = run([path], ["figstep"], ["tired"], tmp_path / "out")["results"]["theirs"]["figstep"]
        rate = next(iter(page["judges"].values()))["rates"]["harmful"]["all"]
        unjudged.append((rate["n"], rate["unjudged"]))
        reasons.popitem() if reasons else None
    assert unjudged == [(1, 2), (2, 1), (3, 0)]
    assert asked == list("abc") + list("ab") + ["a"]


def test_answers_made_elsewhere(root: Path, tmp_path: Path, harm_judge: list[str]) -> None:
    answers = {"ForbidQI-1-1": "Sure, do it.", "ForbidQI-1-2": " "}
    out = tmp_path / "out"
    path = answers_file(tmp_path, answers)
    page = run([path], ["figstep"], ["phrases", "spotter"], out)["results"]["theirs"]["figstep"]
    refused, harmful = (judge["rates"] for judge in page["judges"].values())
    assert (refused["refused"]["all"]["k"], refused["refused"]["all"]["n"]) == (0, 1)
    assert (harmful["harmful"]["all"]["k"], harmful["harmful"]["all"]["n"]) == (1, 1)
    assert harmful["harmful"]["all"]["why"] == {
        EMPTY: 1, "no answer: the file of answers has none": 1,
    }  # fmt: skip
    assert page["answers"] == {"empty": 1, "none": 1, "unfinished": 0}
    assert harm_judge == ["Sure, do it."]
    # The same again judges nothing; a changed file is refused.
    run([path], ["figstep"], ["spotter"], out)
    assert len(harm_judge) == 1
    answers_file(tmp_path, answers | {"ForbidQI-1-3": "hmm"})
    with pytest.raises(InputError, match="subject.sha256"):
        run([path], ["figstep"], ["spotter"], out)
    page = run([path], ["figstep"], ["spotter"], tmp_path / "new")["results"]["theirs"]["figstep"]
    why = next(iter(page["judges"].values()))["rates"]["harmful"]["all"]["why"]
    assert why["the judge's reply holds no verdict"] == 1


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([{"id": "ForbidQI-9-9", "response": "a"}], "nobody asked id ForbidQI-9-9"),
        ([{"id": "ForbidQI-1-1", "response": "a"}, {"id": "ForbidQI-1-1", "response": "b"}],
         "id ForbidQI-1-1 twice, with different answers"),
        ([{"id": "1", "response": "a"}], "no answer to any of the 3 rows of figstep"),
    ],
)  # fmt: skip
def test_answers_that_belong_to_no_row_are_refused(
    root: Path, tmp_path: Path, lines: list[dict], reason: str
) -> None:
    path = tmp_path / "theirs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=reason):
        run([str(path)], ["figstep", "xstest"], ["phrases"], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("answers.jsonl"))


def test_our_own_answers_can_be_read_again(root: Path, tmp_path: Path) -> None:
    run(["embedded"], ["figstep"], ["phrases"], tmp_path / "a")
    ours = tmp_path / "a/embedded/figstep/answers.jsonl"
    run([str(ours)], ["figstep"], ["phrases"], tmp_path / "b")
    again = tmp_path / "b/answers/figstep/answers.jsonl"
    assert [r["response"] for r in lines_of(again)] == [r["response"] for r in lines_of(ours)]


def test_models_are_compared_on_the_same_rows(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    texts = [
        answers_file(tmp_path, {f"ForbidQI-1-{n}": text for n in (1, 2, 3)}, name)
        for name, text in (("no", "I cannot do that."), ("yes", "Here you are."))
    ]
    found = run(texts, ["figstep"], ["phrases"], tmp_path / "out", report=said.append)
    [test] = found["comparison"]
    assert (test["first"], test["second"], test["first_only"]) == ("no", "yes", 3)
    assert test["difference"]["value"] == 1.0
    assert not test["sure"]  # three rows cannot show it
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == found["comparison"]
    assert any("+100.0" in text for text in said)
    with pytest.raises(InputError, match=r"two subjects are called no; write NAME=\.\.\."):
        run([texts[0], texts[0]], ["figstep"], ["phrases"], tmp_path / "out")


def test_edited_answers_are_not_given_old_verdicts(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(["embedded"], ["figstep"], ["phrases"], out)
    path = out / "embedded/figstep/answers.jsonl"
    records = lines_of(path)
    records[0]["response"] = "I cannot."
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(InputError, match=r"verdicts on 1 answers .*delete .*jsonl to judge again"):
        run(["embedded"], ["figstep"], ["phrases"], out)


def test_a_verdict_belongs_to_all_that_the_judge_was_told(root: Path) -> None:
    row = load_benchmark("figstep", str(root), allow_changed=True, keep_missing=True).rows[0]
    told = judging.verdict_sha(row, "a")
    assert told == judging.verdict_sha(dataclasses.replace(row, category="other"), "a")
    changes = [
        {"prompt": "b"}, {"context": "b"}, {"rule": "decline_only"}, {"rule": "warn_or_decline"},
        {"rule": "yes_no", "reference": "yes"}, {"rule": "yes_no", "reference": "no"},
        {"rule": "reference", "reference": "b"}, {"id": "b"},
    ]  # fmt: skip
    others = [judging.verdict_sha(dataclasses.replace(row, **change), "a") for change in changes]
    assert len({told, *others, judging.verdict_sha(row, "b")}) == len(changes) + 2


def test_a_judge_is_told_what_the_image_shows_and_nothing_else(root: Path) -> None:
    row = load_benchmark("figstep", str(root), allow_changed=True, keep_missing=True).rows[0]
    assert row.context and judging.shown_prompt(row).endswith(f"The image shows: {row.context})")
    assert judging.shown_prompt(dataclasses.replace(row, image=None)) == row.prompt
    assert "reference" not in judging.judged_record(dataclasses.replace(row, reference="x"), "a")


def test_one_judge_is_open_at_a_time_after_all_answers(
    root: Path, tmp_path: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    open_judge, close = judging.open_judge, judging.BenchmarkJudge.close

    def opened(spec: str, settings: EvaluationConfig) -> judging.BenchmarkJudge:
        events.append(f"open {spec} after {len(batches)} batches")
        return open_judge(spec, settings)

    def closed(judge: judging.BenchmarkJudge) -> None:
        events.append(f"close {judge.spec}")
        close(judge)

    monkeypatch.setattr(judging, "open_judge", opened)
    monkeypatch.setattr(judging.BenchmarkJudge, "close", closed)
    run(["embedded"], ["figstep"], ["phrases", "phrases:gcg"], tmp_path / "out")
    assert events == [
        "open phrases after 2 batches", "close phrases",
        "open phrases:gcg after 2 batches", "close phrases:gcg",
    ]  # fmt: skip


def test_what_cannot_be_counted_is_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="judge reference answers only: right; no rule of figstep"):
        run(["always-refuse"], ["figstep"], ["reference"], out)
    with pytest.raises(InputError, match="3 rows, such as figstep:full.* stand in two of"):
        run(["always-refuse"], ["figstep", "figstep:full"], ["phrases"], out)
    with pytest.raises(InputError, match="phrases and phrases:phrases-v1 are the same"):
        run(["always-refuse"], ["figstep"], ["phrases", "phrases:phrases-v1"], out)


def test_judges_of_one_name_are_told_apart(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAVL_JUDGE_KEY", raising=False)
    monkeypatch.setattr(Client, "__call__", lambda client, messages: '{"verdict": "safe"}')
    for images in (False, True):
        settings = EvaluationConfig(
            judge_url="http://localhost:9", judge_canaries=False, judge_images=images
        )
        found = evaluate(
            [find_subject("always-comply")], ["xstest"], ["endpoint:m"], tmp_path / "out",
            options_of(judges=settings), report=lambda text: None,
        )  # fmt: skip
    judges = found["results"]["always-comply"]["xstest"]["judges"]
    assert len(judges) == 2 and len({judge["label"] for judge in judges.values()}) == 2
    assert {judge["rules"] for judge in judges.values()} == {"the benchmark's"}


def test_a_busy_folder_and_bad_names(root: Path, tmp_path: Path) -> None:
    with _locked(tmp_path / "out"), pytest.raises(BusyError, match="in use by another"):
        run(["embedded"], ["figstep"], ["phrases"], tmp_path / "out")
    with pytest.raises(InputError, match="(?s)unknown benchmark.*figstp.*unknown benchmark.*xtest"):
        run(["embedded"], ["figstp", "xtest"], ["phrases"], tmp_path / "out")
    with pytest.raises(InputError, match="unknown judge 'phrase'; did you mean 'phrases'"):
        run(["embedded"], ["figstep"], ["phrase"], tmp_path / "out")
    with pytest.raises(InputError, match="takes no argument after a colon"):
        run(["embedded"], ["figstep"], ["exact:a"], tmp_path / "out")


def test_rows_that_the_model_was_trained_on_are_noted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "spavl_lib.evaluation.benchmark_runs.evaluate"
    monkeypatch.setattr(f"{module}.trained_on", lambda subject, rows: ["it has seen them"])
    lines: list[str] = []
    run(["always-refuse"], ["xstest"], ["phrases"], tmp_path / "out", report=lines.append)
    assert "  note: xstest: it has seen them" in lines
    page = json.loads((tmp_path / "out/always-refuse/xstest/results.json").read_text())
    assert "it has seen them" in page["notes"]


def test_a_judge_that_is_the_model_is_named(root: Path) -> None:
    from spavl_lib.evaluation.benchmark_runs.evaluate import _Run

    subject = find_subject("owner/vlm")
    run_of = object.__new__(_Run)
    run_of.subject = subject
    [warning] = run_of._warnings({"settings": {"judge_model": "other/vlm"}})
    assert "is the model under test" in warning
    assert run_of._warnings({"settings": {"judge_model": "other/guard"}}) == []


def test_the_command(root: Path, spavl: Callable, tmp_path: Path, runs: Path) -> None:
    words = ["evaluate", answers_file(tmp_path, {"ForbidQI-1-1": "I cannot."})]
    words += ["--benchmarks", "figstep", "--allow-changed", "--benchmarks-dir", str(root)]
    code, out, _ = spavl(*words, "--judge", "phrases,phrases:gcg")
    assert code == 0
    assert "requests that should be declined  phrases-v1  refused  100.0 %" in out
    code, _, err = spavl(*words, "--set", "evaluation.judge=endpoint")
    assert code and "takes judges from --judge" in err
    assert (runs / "evaluations/theirs/figstep/results.json").is_file()
    code, _, err = spavl(*words, "--set", "dpo.beta=1", "--set", "judge=a")
    assert (code, "--set dpo.beta, judge: expected settings of" in err) == (2, True)
    code, _, err = spavl(*words, "--missing-images", "drop")
    assert (code, "expected refuse or skip" in err) == (2, True)
    code, _, err = spavl(*words, "--set", "generation.batch_sise=2")
    assert (code, "batch_size" in err) == (2, True)
    code, out, _ = spavl("evaluate", "--help")
    assert code == 0
    assert "spavl evaluate embedded --benchmarks figstep:tiny" in out


@needs_real_files
def test_published_answers_to_mossbench(tmp_path: Path, harm_judge: list[str]) -> None:
    """Phrases keep the order of the published rates, which a language model judged."""
    import os

    folder = Path(os.environ["SPAVL_BENCHMARKS"]) / "mossbench/data/results"
    if not folder.is_dir():
        pytest.skip("MOSSBench's published answers are not in $SPAVL_BENCHMARKS")
    refused = {
        "GPT-4o": 5.3, "Gemini-Pro 1.5": 20.0, "Claude 3 Opus": 24.0, "Claude 3 Haiku": 44.0,
        "Claude 3 Sonnet": 49.7,
    }  # fmt: skip
    texts = []
    for name in refused:
        text = (folder / name / "data.js").read_text(encoding="utf-8")
        page = json.loads(text.partition("=")[2].strip().rstrip(";"))
        answers = {key: str(value["response"]) for key, value in page.items()}
        texts.append(answers_file(tmp_path, answers, name.replace(" ", "-")))
    found = run(texts, ["mossbench"], ["phrases"], tmp_path / "out")
    rates = {}
    for name in refused:
        page = found["results"][name.replace(" ", "-")]["mossbench"]
        [judge] = page["judges"].values()
        rates[name] = judge["rates"]["refused"]["by_expect"]["answer"]
    measured = {name: round(100 * rate["if_unjudged_no"], 1) for name, rate in rates.items()}
    assert measured == refused
    assert len(found["comparison"]) == 10


def test_controls_are_judged_like_any_subject(root: Path, harm_judge: list, tmp_path: Path) -> None:
    out, said = tmp_path / "out", []
    texts = ["always-refuse", "yes=always-comply"]
    found = run(texts, ["figstep", "xstest"], ["phrases", "spotter"], out, report=said.append)
    pages = found["results"]
    for name, refused, harmful in (("always-refuse", 1.0, 0.0), ("yes", 0.0, 1.0)):
        rates = {j["name"]: j["rates"] for j in pages[name]["figstep"]["judges"].values()}
        assert rates["phrases-v1"]["refused"]["all"]["value"] == refused
        assert rates["spotter:1"]["harmful"]["all"]["value"] == harmful
        harmless = {j["name"]: j["rates"] for j in pages[name]["xstest"]["judges"].values()}
        assert harmless["phrases-v1"]["refused"]["by_expect"]["answer"]["value"] == refused
        protocol = pages[name]["figstep"]["protocol"]
        assert protocol["decoding"]["made"] == "by a rule"
        assert protocol["subject"]["kind"] == "control"
    assert any("says to every request: I'm sorry" in text for text in said)
    # Nothing is answered or judged twice, and an image that is missing is not needed.
    count = len(harm_judge)
    for image in (root / "figstep").rglob("*.png"):
        image.unlink()
    run(["always-refuse", "yes=always-comply"], ["figstep"], ["spotter"], out)
    assert len(harm_judge) == count
    [answer] = {line["response"] for line in lines_of(out / "yes/figstep/answers.jsonl")}
    assert answer == CONTROLS["always-comply"]


def test_a_safety_prompt_stands_before_each_request_and_in_no_record(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    real = asking.PromptCollator.__call__

    def watched(self: Any, rows: list[dict]) -> Any:
        prompts.extend(row["prompt"] for row in rows)
        return real(self, rows)

    monkeypatch.setattr(asking.PromptCollator, "__call__", watched)
    out = tmp_path / "out"
    run(["safety-prompt:embedded"], ["figstep"], ["phrases"], out)
    kept = read_jsonl(out / "embedded-safety-prompt/figstep/answers.jsonl")
    asked = {row.prompt for row in load_benchmark("figstep", allow_changed=True).rows}
    assert {record["prompt"] for record in kept} == asked
    assert set(prompts) == {f"{SAFETY_PROMPT} {prompt}" for prompt in asked}


def test_of_several_samples_the_best_is_given(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the reward model itself, which is an adapter here while the subject is a whole model."""
    stage = tmp_path / "reward"
    write_reward_model(stage / "model", "lora")
    config = smoke({"model.adapter": "lora"})
    (stage / "manifest.json").write_text(json.dumps({"config": config.to_dict()}))
    sampled: list[list[str]] = []
    real = asking.generate_batch

    def watched(*args: Any, **options: Any) -> Any:
        answers = real(*args, **options)
        sampled.append([answer["response"] for answer in answers])
        return answers

    monkeypatch.setattr(asking, "generate_batch", watched)
    out = tmp_path / "out"
    said: list[str] = []
    run([f"best=best-of-3:embedded@{stage}"], ["figstep"], ["phrases"], out, report=said.append)
    assert any("best of 3 samples" in line for line in said)
    kept = read_jsonl(out / "best/figstep/answers.jsonl")
    rounds = [sampled[i : i + 3] for i in range(0, len(sampled), 3)]
    of_rows = [texts for part in rounds for texts in zip(*part, strict=True)]
    assert any(len(set(texts)) > 1 for texts in of_rows)
    reward = load_reward_model(config.model, stage / "model")
    rows = {row.id: row for row in load_benchmark("figstep", allow_changed=True).rows}
    for record, texts in zip(kept, of_rows, strict=True):
        row = rows[record["id"]]
        image = decode(str(row.image))
        scores = [*response_scores(reward, embedded_processor(), image, row.prompt, list(texts))]
        assert record["response"] == texts[scores.index(max(scores))]
    decoding = json.loads((out / "best/figstep/protocol.json").read_text())["decoding"]
    assert decoding["do_sample"]


def test_a_limit_takes_rows_of_every_kind() -> None:
    rows = [SimpleNamespace(id=str(number)) for number in range(12)]
    reading: Any = SimpleNamespace(rows=rows, without_image=frozenset())
    picked = [row.id for row in choose(reading, 4, False)]
    assert picked == [reading.rows[i].id for i in (0, 3, 6, 9)]
    assert {*picked} < {row.id for row in choose(reading, 8, False)}
    assert choose(reading, 0, False) == choose(reading, 99, False) == rows
