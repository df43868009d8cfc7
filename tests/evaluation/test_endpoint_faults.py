"""An endpoint that fails: every row is judged or listed, and no request goes above the budget."""

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.config import EvaluationConfig
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import endpoint, judge_records
from spavl_lib.evaluation.judges.endpoint import Client, EndpointJudge, is_here, text_of
from spavl_lib.evaluation.verdicts import EMPTY
from tests.evaluation.test_model_judges import Server, record, server, wordy

__all__ = ["server"]  # the fixture

PAGE = json.dumps({"choices": [{"message": {"content": '{"verdict": "safe"}'}}]}).encode()


def faulty(share: float, seed: int = 0) -> Callable[[dict], object]:
    """Replies that fail for a share of requests: 429, 500, a time-out, a half reply, junk."""
    rng, lock = random.Random(seed), threading.Lock()

    def reply(body: dict) -> object:
        with lock:
            fault = rng.choice(range(5)) if rng.random() < share else None
        if fault == 0:
            return 429, {"Retry-After": "0"}, b"slow down"
        if fault == 1:
            return 500, {}, b"oops"
        if fault == 2:
            time.sleep(3.3)
        if fault == 3:
            return 200, {}, PAGE[: len(PAGE) // 2]
        if fault == 4:
            return 200, {}, b"<html>junk</html>"
        return wordy(body)

    return reply


def judge(server: Server, folder: Path, **options: object) -> EndpointJudge:
    client = Client(
        server.url, "m", cache=folder / "cache.jsonl", first_wait_s=0.001, timeout_s=3, **options
    )
    return EndpointJudge(EvaluationConfig(judge_canaries=False), client)


def rows(count: int) -> list[dict]:
    return [
        record(f"{'They deserve to be beaten' if n % 3 else 'Bread'} {n}") for n in range(count)
    ]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LONGEST_WAIT_S", 0.01)


def test_every_row_is_judged_though_a_fifth_of_the_requests_fail(
    server: Server, tmp_path: Path
) -> None:
    server.reply = faulty(0.2)
    made = judge(server, tmp_path)
    asked = [*rows(100), record(" ")]
    verdicts = judge_records(made, asked)
    assert [v.harmful for v in verdicts] == [bool(n % 3) for n in range(100)] + [None]
    assert verdicts[-1].why_unjudged == EMPTY
    assert made.client.sent == len(server.asked) > 100
    server.reply = lambda body: pytest.fail("asked again")
    assert judge_records(judge(server, tmp_path), asked) == verdicts


def test_no_request_is_sent_above_the_budget_and_the_rest_is_listed(
    server: Server, tmp_path: Path
) -> None:
    server.reply = faulty(0.2)
    made = judge(server, tmp_path, budget=40)
    verdicts = made.many(rows(100))
    assert len(server.asked) == made.client.sent == 40
    left = [v for v in verdicts if v.harmful is None]
    assert {v.why_unjudged for v in left} == {"not asked: the budget of 40 requests is spent"}
    assert 20 <= len(verdicts) - len(left) <= 40
    # The same command goes on with what is left.
    again = judge(server, tmp_path, budget=200).many(rows(100))
    assert all(v.harmful is not None for v in again)
    assert [v.harmful for v in again] == [bool(n % 3) for n in range(100)]


def test_a_dead_endpoint_ends_the_judging(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: (500, {}, b"down")
    with pytest.raises(InputError, match="8 requests in a row.*run the same command or cell again"):
        judge(server, tmp_path).many(rows(300))
    # Eight requests that fail, and at most seven more that are on their way; not 300.
    assert len(server.asked) <= endpoint.TRIES * (endpoint.MOST_FAILED + endpoint.WORKERS - 1)


# --- replies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "text"),
    [({"content": "x"}, "x"), ({"content": None, "reasoning_content": "y"}, ""),
     ({"content": [{"type": "reasoning", "text": "y"}, {"type": "text", "text": "x"}]}, "x")],
)  # fmt: skip
def test_reasoning_is_no_part_of_the_reply(message: dict, text: str) -> None:
    assert text_of(message) == text


def test_a_model_that_reasons_at_length_gets_more_tokens_once(
    server: Server, tmp_path: Path
) -> None:
    def reply(body: dict) -> object:
        is_long = body["max_tokens"] > 1024
        text = '{"verdict": "unsafe"}' if is_long else "<think>Well,"
        reason = "stop" if is_long else "length"
        page = {"choices": [{"message": {"content": text}, "finish_reason": reason}]}
        return 200, {}, json.dumps(page).encode()

    server.reply = reply
    assert judge(server, tmp_path)(record("x")).harmful is True
    assert [body["max_tokens"] for body in server.asked] == [1024, 8192]


def test_a_model_without_a_temperature_is_asked_without_one(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: (
        (400, {}, b"temperature is not supported") if "temperature" in body else wordy(body)
    )
    made = judge(server, tmp_path)
    assert [v.harmful for v in made.many(rows(3))] == [False, True, True]
    assert "temperature" not in server.asked[-1]


# --- agreement ----------------------------------------------------------------------------------


def test_another_host_is_named_once_and_needs_a_yes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(endpoint, "_NAMED", set())
    monkeypatch.setenv("SPAVL_JUDGE_KEY", "s3cret")
    settings = {"judge_model": "m", "judge_url": "https://judge.example/v1", "judge_images": True}
    with pytest.raises(InputError, match="judge.example would receive the prompts, images and ans"):
        EndpointJudge(EvaluationConfig(**settings))
    for _ in range(2):
        EndpointJudge(EvaluationConfig(**settings, judge_yes=True))
    said = capsys.readouterr().err
    assert said == "judge.example receives the prompts, images and answers that are judged\n"


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("[::1]", True), ("10.0.0.1", False),
     ("localhost.example", False), ("0.0.0.0", False), ("judge.example", False)],
)  # fmt: skip
def test_only_this_machine_needs_no_yes(host: str, here: bool) -> None:
    assert is_here(host) is here
