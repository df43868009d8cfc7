"""What can be evaluated: every form is recognised, and everything else is refused with a hint."""

import json
from pathlib import Path

import pytest

from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmark_runs.subject import find_subject, trained_on
from spavl_lib.evaluation.benchmarks import load_benchmark
from tests.helpers import smoke


def adapter(folder: Path, base: str, **more: object) -> Path:
    folder.mkdir(parents=True)
    page = {"base_model_name_or_path": base, **more}
    (folder / "adapter_config.json").write_text(json.dumps(page))
    return folder


def test_names_and_models(runs: Path, tmp_path: Path) -> None:
    embedded = find_subject("base=embedded")
    assert (embedded.name, embedded.kind) == ("base", "model")
    assert "model.safetensors" in embedded.identity()["files"]
    hub = find_subject("owner/some-vlm@abc123")
    assert hub.model is not None
    assert (hub.name, hub.model.name, hub.model.revision) == (
        "some-vlm", "owner/some-vlm", "abc123",
    )  # fmt: skip
    local = find_subject(str(ASSETS / "model"), {"image_aspect": "pad"})
    assert local.model is not None
    assert (local.model.name, local.model.image_aspect) == (str(ASSETS / "model"), "pad")


def test_an_adapter_names_its_base(runs: Path, tmp_path: Path) -> None:
    foreign = find_subject(str(adapter(tmp_path / "lora", "owner/vlm", revision="abc")))
    assert foreign.model is not None
    assert (foreign.kind, foreign.model.name, foreign.model.revision) == (
        "adapter", "owner/vlm", "abc",
    )  # fmt: skip
    ours = find_subject(str(adapter(tmp_path / "ours", str(ASSETS / "model"))))
    assert ours.model is not None
    assert ours.model.name == "embedded"
    with pytest.raises(InputError, match="no base_model_name_or_path"):
        find_subject(str(adapter(tmp_path / "none", "")))


def test_a_stage_of_a_run(runs: Path) -> None:
    stage = runs / "demo" / "dpo"
    adapter(stage / "model", str(ASSETS / "model"))
    manifest = {"config": smoke({"model.image_aspect": "square"}).to_dict()}
    (stage / "manifest.json").write_text(json.dumps(manifest))
    for text in ("demo/dpo", str(stage), str(stage / "model")):
        subject = find_subject(text)
        assert (subject.name, subject.kind) == ("demo-dpo", "run")
        assert subject.trained == stage / "model"
        assert subject.model is not None
        assert subject.model.image_aspect == "square"
    with pytest.raises(InputError, match="it is a run with demo/dpo"):
        find_subject("demo")
    with pytest.raises(InputError, match="did you mean 'demo/dpo'"):
        find_subject("./demo/dp")


def test_answers_by_their_suffix(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "their answers.jsonl"
    path.write_text('{"id": "1", "response": ""}\n')
    subject = find_subject(str(path))
    assert (subject.name, subject.kind, subject.answers) == ("their-answers", "answers", path)
    with pytest.raises(InputError, match="does not exist"):
        find_subject("nowhere.jsonl")


@pytest.mark.parametrize("text", ["", "nothing", "/nowhere/model", "a/b/c"])
def test_anything_else_is_refused(runs: Path, text: str) -> None:
    with pytest.raises(InputError, match="is neither a file of answers"):
        find_subject(text)


def test_a_stage_that_a_run_lacks_is_no_model_on_the_hub(runs: Path) -> None:
    (runs / "mine/dpo/model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"did you mean mine/dpo|trained models of runs: mine/dpo"):
        find_subject("mine/dpoo")


def test_rows_that_a_run_was_trained_on_are_counted(runs: Path, tmp_path: Path) -> None:
    rows = load_benchmark("everyday:plain").rows
    extra = tmp_path / "extra.jsonl"
    pair = {"prompt": rows[0].prompt, "chosen": "Yes.", "rejected": "No."}
    extra.write_text(json.dumps(pair) + "\n", encoding="utf-8")
    notes = {}
    for name, changes in (("plain", {}), ("extra", {"data.extra_path": str(extra)})):
        stage = runs / name / "dpo"
        adapter(stage / "model", str(ASSETS / "model"))
        manifest = {"config": smoke(changes).to_dict()}
        (stage / "manifest.json").write_text(json.dumps(manifest))
        notes[name] = trained_on(find_subject(f"{name}/dpo"), rows)
    assert notes["plain"] == []
    [note] = notes["extra"]
    assert "extra-dpo was trained on 1 of these 90 rows" in note
    subject = find_subject("extra/dpo")
    assert trained_on(subject, rows[1:]) == []
    extra.unlink()
    [note] = trained_on(subject, rows)
    assert "is not known" in note and "no such file" in note
    assert trained_on(find_subject("embedded"), rows) == []


def test_ways_to_answer_without_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAVL_RUNS", str(tmp_path))
    prompted = find_subject("safety-prompt:embedded")
    assert prompted.name == "embedded-safety-prompt" and prompted.sentence
    plain = find_subject("embedded").identity()
    assert prompted.identity() == plain | {"safety_prompt": prompted.sentence}
    stage = tmp_path / "mine" / "reward"
    (stage / "model").mkdir(parents=True)
    (stage / "model" / "a.safetensors").write_bytes(b"weights")
    for text in ("best-of-4:embedded@mine/reward", f"best-of-4:embedded@{stage}"):
        with pytest.raises(InputError, match="no reward stage of a run"):
            find_subject(text)
    config = smoke().to_dict()
    (stage / "manifest.json").write_text(json.dumps({"config": config}))
    best = find_subject("best=best-of-4:embedded@mine/reward")
    assert (best.name, best.samples, best.reward) == ("best", 4, stage / "model")
    facts = best.identity()
    assert facts["best_of"] == 4 and facts["reward_files"] and plain.items() <= facts.items()
    for text, message in (
        ("best-of-1:embedded@mine/reward", "at least two"),
        ("best-of-4:embedded", "best-of-N:MODEL@RUN/reward"),
        ("best-of-4:owner/other@mine/reward", "the reward model is one of embedded"),
        ("safety-prompt:always-refuse", "no plain model"),
        ("safety-prompt:best-of-4:embedded@mine/reward", "no plain model"),
    ):
        with pytest.raises(InputError, match=message):
            find_subject(text)
