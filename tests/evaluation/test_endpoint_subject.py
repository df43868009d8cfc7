"""A model behind an endpoint as the subject of an evaluation."""

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from spavl_lib.config import EvaluationConfig, GenerationConfig
from spavl_lib.errors import InputError, Preempted
from spavl_lib.evaluation.benchmark_runs.endpoint_asking import EndpointAsker
from spavl_lib.evaluation.benchmark_runs.evaluate import Options, evaluate
from spavl_lib.evaluation.benchmark_runs.subject import Subject, find_subject
from spavl_lib.evaluation.judges import endpoint
from spavl_lib.report.benchmarks import render
from tests.evaluation.benchmark_files import write_fixture
from tests.evaluation.test_model_judges import Server, server  # noqa: F401 - a fixture


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Benchmarks of invented rows, and a cache and waits of their own."""
    write_fixture(tmp_path / "benchmarks/figstep", "figstep")
    for number in (1, 2, 3):  # equal requests would be sent once
        name = f"figstep/data/images/SafeBench/query_ForbidQI_1_{number}_6.png"
        Image.new("RGB", (28, 28), (9 * number, 0, 0)).save(tmp_path / "benchmarks" / name)
    monkeypatch.setenv("SPAVL_BENCHMARKS", str(tmp_path / "benchmarks"))
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPAVL_JUDGE_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(endpoint, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(endpoint, "TRIES", 2)
    return tmp_path


def run(subject: Subject, out: Path, **options: object) -> dict:
    settings = {
        "allow_changed": True,
        "generation": GenerationConfig(batch_size=8, max_new_tokens=77),
    }
    chosen = Options(**settings | {"set_tokens": True} | options)
    return evaluate([subject], ["figstep"], ["phrases"], out, chosen, report=lambda text: None)


def subject_of(server: Server) -> Subject:  # noqa: F811
    return find_subject(f"vlm=endpoint:owner/vlm@{server.url}")


def test_it_is_asked_with_its_images_once(server: Server, root: Path) -> None:  # noqa: F811
    server.reply = lambda body: "I cannot help with that."
    out = root / "out"
    found = run(subject_of(server), out)
    page = found["results"]["vlm"]["figstep"]
    [judge] = page["judges"].values()
    assert judge["rates"]["refused"]["all"]["k"] == 3
    assert page["protocol"]["subject"] == {
        "kind": "endpoint", "model": "owner/vlm", "url": server.url,
    }  # fmt: skip
    assert "up to 77 new tokens" in page["protocol"]["decoding"]["settings"]
    assert len(server.asked) == 3
    image = root / "benchmarks/figstep/data/images/SafeBench/query_ForbidQI_1_2_6.png"
    sent = set()
    for body in server.asked:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("owner/vlm", 77, 0)
        [turn] = body["messages"]  # no system turn
        text, picture = turn["content"]
        assert turn["role"] == "user" and text["text"].strip()
        sent.add(base64.b64decode(picture["image_url"]["url"].partition("base64,")[2]))
    assert image.read_bytes() in sent and len(sent) == 3
    run(subject_of(server), out)
    assert len(server.asked) == 3
    assert "made by an endpoint" in render(out, found)
    with pytest.raises(InputError, match="made in another way"):
        run(subject_of(server), out, generation=GenerationConfig(batch_size=8, max_new_tokens=78))


def test_rejected_rows_are_listed_and_others_asked_again(
    server: Server,  # noqa: F811
    root: Path,
) -> None:
    def reply(body: dict) -> object:
        text = json.dumps(body["messages"])
        number = len(server.asked)
        if number == 1:
            return 400, {}, b"filtered: " + text[:1].encode()
        return (503, {}, b"busy") if number == 2 else "Here you are."

    server.reply = reply
    out = root / "out"
    path = out / "vlm/figstep/answers.jsonl"
    monkey = {"judges": EvaluationConfig(judge_budget=2)}
    with pytest.raises(InputError, match=r"2 of 3 rows have no reply .*run the same command"):
        run(subject_of(server), out, **monkey)
    [line] = [json.loads(text) for text in path.read_text().splitlines()]
    assert "filtered" in line["error"] and line["response"] == ""
    page = run(subject_of(server), out)["results"]["vlm"]["figstep"]
    assert page["answers"]["none"] == 1
    [judge] = page["judges"].values()
    assert judge["rates"]["refused"]["all"]["unjudged"] == 1


def test_a_stop_keeps_the_answers(server: Server, root: Path) -> None:  # noqa: F811
    server.reply = lambda body: "Yes."
    with pytest.raises(Preempted, match="stopped with 0 of 3 answers written"):
        evaluate(
            [subject_of(server)], ["figstep"], ["phrases"], root / "out",
            Options(allow_changed=True), should_stop=True, report=lambda text: None,
        )  # fmt: skip


def test_what_cannot_be_asked_is_refused(root: Path) -> None:
    there = find_subject("gpt=endpoint:gpt-x@https://api.example.com/v1")
    assert (there.name, there.served, there.url) == (
        "gpt", "gpt-x", "https://api.example.com/v1",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"api.example.com would receive the prompts and images"):
        EndpointAsker(there, GenerationConfig(batch_size=8), EvaluationConfig())
    EndpointAsker(there, GenerationConfig(batch_size=8), EvaluationConfig(judge_yes=True))
    with pytest.raises(InputError, match="asked at temperature 0"):
        EndpointAsker(
            there, GenerationConfig(batch_size=8, do_sample=True), EvaluationConfig(judge_yes=True)
        )
    for text in ("endpoint:gpt-x", "endpoint:@http://localhost/v1", "endpoint:m@localhost"):
        with pytest.raises(InputError, match="expected endpoint:MODEL@URL"):
            find_subject(text)
    bad = find_subject("endpoint:m@http://user:pw@localhost/v1")
    with pytest.raises(InputError, match="the endpoint's address holds a password"):
        EndpointAsker(bad, GenerationConfig(batch_size=8), EvaluationConfig())
