"""Answers: the same however batched, interrupted or resumed; every field kept, every line whole."""

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from spavl_lib.config import GenerationConfig
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.load import load_prompts
from spavl_lib.errors import InputError, Preempted
from spavl_lib.generation import generate as generation
from spavl_lib.generation import stage
from spavl_lib.generation.generate import ahead, generate, generate_batch
from spavl_lib.generation.stage import make_inference_stage
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import AWAITED, Run
from tests.helpers import MINI, embedded_model, embedded_processor, files_of, smoke, spread

GREEDY = GenerationConfig(batch_size=8, max_new_tokens=24)
SMALL = GenerationConfig(batch_size=4, max_new_tokens=6)
SAMPLED = replace(SMALL, do_sample=True, temperature=0.9, top_p=0.95)
LABELS = {"model": "base", "set": "harm"}


class StopAfter:
    """Truthy from the given poll on."""

    def __init__(self, polls: int):
        self.left = polls

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Prompts of all sets and lengths, in no order of length."""
    names = ("harm", "help", "look_alikes")
    return [r for name in names for r in spread(load_prompts(MINI, name), 6)]


def run(rows: list[dict], target: Path, config: GenerationConfig = GREEDY, **options) -> list[dict]:
    options = {"labels": LABELS} | options
    return generate(embedded_model(), embedded_processor(), rows, config, target, **options)


@pytest.fixture(scope="module")
def whole(rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted file."""
    target = tmp_path_factory.mktemp("whole") / "harm.jsonl"
    run(rows, target)
    return target


def test_every_row_is_answered_in_order_with_every_field(rows: list[dict], whole: Path) -> None:
    records = read_jsonl(whole)
    assert [r["id"] for r in records] == [r["id"] for r in rows]
    for row, record in zip(rows, records, strict=True):
        assert list(record) == [
            *generation.COPIED, "model", "set", "response", "num_tokens", "finished", "generation",
        ]  # fmt: skip
        for name in generation.COPIED:
            assert record[name] == row[name], name
        assert (record["model"], record["set"]) == ("base", "harm")
        assert record["generation"] == {"max_new_tokens": 24, "do_sample": False}
        assert 0 < record["num_tokens"] <= 24
        assert record["finished"] or record["num_tokens"] == 24
        assert "<" not in record["response"] and "ASSISTANT" not in record["response"]
    assert len({r["response"] for r in records}) > len(rows) / 2
    assert any(r["finished"] for r in records)
    assert not list(whole.parent.glob("*.partial"))


def test_a_batch_of_eight_says_what_one_by_one_says(rows: list[dict], whole: Path,
                                                    tmp_path: Path) -> None:  # fmt: skip
    run(rows, tmp_path / "one.jsonl", replace(GREEDY, batch_size=1))
    assert (tmp_path / "one.jsonl").read_bytes() == whole.read_bytes()


def test_a_prefilled_answer_goes_on_as_it_would_have_gone_on(
    rows: list[dict], whole: Path, tmp_path: Path
) -> None:
    plain = read_jsonl(whole)
    assert all(record["finished"] and "prefill" not in record for record in plain)
    given = [
        row | {"prefill": " ".join(record["response"].split()[: n % 4])}
        for n, (row, record) in enumerate(zip(rows, plain, strict=True))
    ]
    records = run(given, tmp_path / "given.jsonl")
    assert [r["response"] for r in records] == [r["response"] for r in plain]
    for n, (row, old, new) in enumerate(zip(given, plain, records, strict=True)):
        assert new.get("prefill", "") == row["prefill"] and ("prefill" in new) == bool(n % 4)
        assert new["num_tokens"] <= old["num_tokens"] - n % 4


def test_other_prefilled_words_are_other_rows(rows: list[dict]) -> None:
    given = [[row | {"prefill": words} for row in rows[:2]] for words in ("", "To", "You")]
    headers = [generation._header(part, GREEDY, 0, LABELS) for part in [rows[:2], *given]]
    assert headers[0] == headers[1] and len(set(headers)) == 3


def test_the_ids_are_exactly_the_new_ones(rows: list[dict]) -> None:
    """Against decoding by hand, one token at a time and without a cache."""
    model, processor = embedded_model(), embedded_processor()
    batch = PromptCollator(processor)(rows[:1])
    ids = batch["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    expected = ids[0, batch["input_ids"].shape[1] :]
    config = replace(GREEDY, max_new_tokens=6)
    (answer,) = generate_batch(model, processor, batch, config)
    assert (
        answer["response"] == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    )


class Scripted:
    """A model that says given ids after whatever it is asked."""

    device = torch.device("cpu")

    def __init__(self, *answers: list[int]):
        self.answers = answers

    def generate(self, *, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor(self.answers)], 1)


def test_an_answer_ends_at_its_first_eos() -> None:
    processor = embedded_processor()
    ids = processor.tokenizer.encode(" A cat.", add_special_tokens=False)
    pad, eos = 3, 1
    width = len(ids) + 3
    answers = [
        [*ids, eos, pad, pad],
        [*ids, eos, *ids][:width],  # whatever follows EOS is no answer
        [*ids, *ids, *ids][:width],
        [eos, *[pad] * (width - 1)],
    ]
    batch = {"input_ids": torch.zeros(4, 5, dtype=torch.long)}
    plain = replace(GREEDY, cache="dynamic")
    found = generate_batch(Scripted(*answers), processor, batch, plain)
    assert [f["response"] for f in found[:2]] == ["A cat.", "A cat."]
    assert [f["num_tokens"] for f in found] == [len(ids), len(ids), width, 0]
    assert [f["finished"] for f in found] == [True, True, False, True]
    assert found[3]["response"] == ""


# --- interruption -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten(rows: list[dict]) -> list[dict]:
    """Three batches of `SMALL`."""
    return rows[::2] + rows[1:2]


@pytest.fixture(scope="module")
def straight(ten: list[dict], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted files, greedy and sampled."""
    root = tmp_path_factory.mktemp("straight")
    for name, config in {"greedy": SMALL, "sampled": SAMPLED}.items():
        run(ten, root / name, config, seed=3)
    return {name: root / name for name in ("greedy", "sampled")}


@pytest.mark.parametrize("polls", [0, 1, 2])
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_interrupted_and_resumed_is_uninterrupted_byte_for_byte(
    ten: list[dict], straight: dict[str, Path], tmp_path: Path, polls: int, name: str
) -> None:
    target, config = tmp_path / "harm.jsonl", {"greedy": SMALL, "sampled": SAMPLED}[name]
    with pytest.raises(Preempted, match=f"{4 * polls} of 10 answers") as caught:
        run(ten, target, config, seed=3, should_stop=StopAfter(polls))
    assert caught.value.exit_code == 75
    assert not target.exists() and target.with_name("harm.jsonl.partial").is_file()
    torch.manual_seed(polls)  # wherever the generator stands
    with Counting() as asked:
        run(ten, target, config, seed=3)
    assert target.read_bytes() == straight[name].read_bytes()
    assert asked.batches == 3 - polls  # what was done is not done again
    assert not target.with_name("harm.jsonl.partial").exists()


class Counting:
    """Counts the batches that were really generated."""

    def __enter__(self) -> "Counting":
        self.batches, self.inner = 0, generation.generate_batch

        def counted(*args: object, **options: object) -> list[dict]:
            self.batches += 1
            return self.inner(*args, **options)

        generation.generate_batch = counted
        return self

    def __exit__(self, *_: object) -> None:
        generation.generate_batch = self.inner


@pytest.mark.parametrize("damage", ["half line", "no newline", "garbage", "empty", "no header"])
def test_a_torn_partial_file_is_mended(
    ten: list[dict], straight: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "harm.jsonl"
    with pytest.raises(Preempted):
        run(ten, target, SMALL, seed=3, should_stop=StopAfter(2))
    partial = target.with_name("harm.jsonl.partial")
    content = partial.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 3  # a header and two batches
    changed, again = {
        "half line": (content[: -len(lines[2]) // 2], 2),
        "no newline": (content[:-1], 1),
        "garbage": (content + b"\xc3\xa9 {torn", 1),
        "empty": (b"", 3),
        "no header": (b"".join(lines[1:]), 3),
    }[damage]
    partial.write_bytes(changed)
    with Counting() as asked:
        run(ten, target, SMALL, seed=3)
    assert asked.batches == again
    assert target.read_bytes() == straight["greedy"].read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"config": replace(GREEDY, max_new_tokens=25)},
        {"config": replace(GREEDY, batch_size=6)},
        {"config": replace(GREEDY, do_sample=True)},
        {"labels": LABELS | {"model": "dpo"}},
        {"rows": "reworded"},
        {"rows": "other order"},
    ],
    ids=str,
)
def test_other_settings_start_anew(rows: list[dict], tmp_path: Path, change: dict) -> None:
    rows = rows[:12]
    target = tmp_path / "harm.jsonl"
    small = replace(GREEDY, batch_size=8, max_new_tokens=4)
    with pytest.raises(Preempted):
        run(rows, target, small, should_stop=StopAfter(1))
    config = change.get("config", small)
    config = replace(config, max_new_tokens=5 if config.max_new_tokens == 25 else 4)
    if change.get("rows") == "reworded":
        rows = [rows[0] | {"prompt": "Another question?"}, *rows[1:]]
    elif change.get("rows") == "other order":
        rows = rows[::-1]
    with Counting() as asked:
        run(rows, target, config, labels=change.get("labels", LABELS))
    assert asked.batches == 2


def test_sampling_follows_its_seed(rows: list[dict], tmp_path: Path) -> None:
    said = []
    for n, seed in enumerate((0, 0, 1)):
        run(rows[:4], tmp_path / f"{n}.jsonl", SAMPLED, seed=seed)
        said.append([r["response"] for r in read_jsonl(tmp_path / f"{n}.jsonl")])
    assert said[0] == said[1] != said[2]
    settings = read_jsonl(tmp_path / "2.jsonl")[0]["generation"]
    assert settings == {
        "max_new_tokens": 6, "do_sample": True, "temperature": 0.9, "top_p": 0.95, "seed": 1,
    }  # fmt: skip


def test_generation_leaves_the_model_as_it_was(rows: list[dict], tmp_path: Path) -> None:
    from spavl_lib.trainers.checkpoint import tensors_sha256

    model = embedded_model()
    before = tensors_sha256(dict(model.named_parameters()))
    run(rows[:4], tmp_path / "a.jsonl")
    assert not model.training
    assert tensors_sha256(dict(model.named_parameters())) == before


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\u00a0"])
def test_no_character_of_a_text_tears_its_line(tmp_path: Path, mark: str) -> None:
    """Python's `splitlines` breaks at more than a newline; a row lost so is lost in silence."""
    processor = embedded_processor()
    rows = [{"id": f"harm/{n}", "prompt": f"One{mark}two {n}?", "image": None} for n in range(3)]
    config = replace(GREEDY, batch_size=2, max_new_tokens=3)
    target = tmp_path / "a.jsonl"
    with pytest.raises(Preempted):
        generate(embedded_model(), processor, rows, config, target, should_stop=StopAfter(1))
    with Counting() as asked:
        records = generate(embedded_model(), processor, rows, config, target)
    assert asked.batches == 1
    assert read_jsonl(target) == records and len(records) == 3
    assert records[1]["prompt"] == f"One{mark}two 1?"


def test_a_torn_line_within_a_finished_file_is_not_passed_over(tmp_path: Path) -> None:
    """Only the last line of a file can be half written; any other loss is damage, and is said."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": n}) for n in range(4)]
    path.write_text("\n".join(lines[:3]) + '\n{"id": ', encoding="utf-8")
    assert read_jsonl(path) == [{"id": 0}, {"id": 1}, {"id": 2}]
    path.write_text("\n".join([lines[0], '{"id": ', *lines[2:]]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="a.jsonl:1"):
        read_jsonl(path)


def after(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """A running thread that acts once a condition holds."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
        if condition():
            act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


# --- the stage ----------------------------------------------------------------------------------


def test_the_inference_stage_asks_every_model_once(tmp_path: Path) -> None:
    """Base first; a model trained later is asked alone; one trained anew is asked again."""
    changes = {
        "data.test_rows": 2, "generation.max_new_tokens": 3, "evaluation.held_out_drawings": False,
        "model.adapter": "full",
    }  # fmt: skip
    config = smoke(changes, run_name="r")
    run = Run(config, root=tmp_path)
    stage = run.stage("inference")

    def asked() -> int:
        with Counting() as counted:
            make_inference_stage(config, stage)
        return counted.batches

    sets = ("harm", "help", "look_alikes", "twins", "twins_exchanged")
    assert asked() == 5 and asked() == 0
    assert stage.summary["models"] == ["base"] and set(stage.summary["sets"]) == set(sets)
    for name in sets:
        records = read_jsonl(stage.path / "base" / f"{name}.jsonl")
        assert [r["id"] for r in records] == list(load_prompts(config.data, name)["id"])
        assert {(r["model"], r["set"]) for r in records} == {("base", name)}
        assert stage.summary["sets"][name]["base"]["rows"] == len(records) == 2
    before = files_of(stage.path / "base")
    embedded_model().save_pretrained(run.path / "dpo/model")
    run.stage("dpo").finish({"weights_sha256": "a" * 64})
    assert asked() == 5 and asked() == 0
    assert stage.summary["models"] == ["base", "dpo"]
    first = read_jsonl(stage.path / "dpo/harm.jsonl")
    base = read_jsonl(stage.path / "base/harm.jsonl")
    assert [r["response"] for r in first] == [r["response"] for r in base]  # the same weights
    run.stage("dpo").finish({"weights_sha256": "b" * 64})
    assert asked() == 5
    assert files_of(stage.path / "base") == before
    other = smoke(changes | {"generation.max_new_tokens": 4}, run_name="r")
    with pytest.raises(InputError, match="generation.max_new_tokens: 3 -> 4"):
        make_inference_stage(other, Run(other, root=tmp_path).stage("inference"))


def test_models_that_are_still_training_are_asked_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another notebook trains DPO, base and PPO answer; the result is that of one by one."""
    changes = {
        "data.test_rows": 2, "generation.max_new_tokens": 3, "evaluation.held_out_drawings": False,
        "model.adapter": "full",
    }  # fmt: skip
    config, found = smoke(changes, run_name="r"), {}
    for name in ("straight", "awaiting"):
        run = Run(config, root=tmp_path / name)
        stage = run.stage("inference")
        for policy in ("dpo", "ppo"):
            embedded_model().save_pretrained(run.path / policy / "model")
        run.stage("ppo").finish({"weights_sha256": "b" * 64})
        finish = functools.partial(run.stage("dpo").finish, {"weights_sha256": "a" * 64})
        if name == "straight":
            finish()
        else:
            monkeypatch.setenv(AWAITED, "dpo")
            answered = stage.path / "ppo/twins_exchanged.jsonl"
            trained = after(answered.is_file, finish)
        make_inference_stage(config, stage)
        answers = {f: digest for f, digest in files_of(stage.path).items() if f.endswith("jsonl")}
        manifest = stage.manifest
        found[name] = answers, stage.summary, manifest["inputs"], set(manifest["upstream"])
    trained.join()
    assert found["awaiting"][1]["models"] == ["base", "dpo", "ppo"]
    assert found["awaiting"] == found["straight"]


def test_a_model_trained_meanwhile_is_asked_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary names the weights that answered, not those that were there at its end."""
    changes = {"data.test_rows": 2, "generation.max_new_tokens": 3, "model.adapter": "full"}
    config = smoke(changes | {"evaluation.held_out_drawings": False}, run_name="r")
    run = Run(config, root=tmp_path)
    old = stage.generate

    def train_meanwhile(*args: object, **kwargs: object) -> list[dict]:
        embedded_model().save_pretrained(run.path / "rloo/model")
        run.stage("rloo").finish({"weights_sha256": "c" * 64})
        return old(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "generate", train_meanwhile)
        first = make_inference_stage(config, run.stage("inference"))
    assert first["models"] == ["base"] and "rloo/weights" not in first["inputs"]
    again = make_inference_stage(config, run.stage("inference"))
    assert again["models"] == ["base", "rloo"] and again["inputs"]["rloo/weights"] == "c" * 64


def test_a_stop_while_waiting_keeps_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"data.test_rows": 2, "generation.max_new_tokens": 3}
    config = smoke(changes | {"evaluation.held_out_drawings": False}, run_name="r")
    stage = Run(config, root=tmp_path).stage("inference")
    monkeypatch.setenv(AWAITED, "dpo")
    stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    asked = stage.path / "base/twins_exchanged.jsonl"
    after(asked.is_file, stop)
    with pytest.raises(Preempted, match="SIGTERM: stopped before the answers of dpo"):
        make_inference_stage(config, stage)
    assert asked.is_file() and not stage.done


# --- batches made ahead -------------------------------------------------------------------------


def test_rows_with_one_id_are_all_answered(rows: list[dict], tmp_path: Path) -> None:
    same = [row | {"id": "7"} for row in rows[:3]]
    model, processor = embedded_model(), embedded_processor()
    config = replace(SMALL, max_new_tokens=2)
    records = generate(model, processor, same, config, tmp_path / "a.jsonl", seed=0)
    assert [r["prompt"] for r in records] == [r["prompt"] for r in same] and len(records) == 3
    assert read_jsonl(tmp_path / "a.jsonl") == records


class Asked(nn.Module):
    """A model that notes how it is asked to generate, and says nothing."""

    device = torch.device("cpu")

    def generate(self, **options: object) -> torch.Tensor:
        self.options = options
        return options["input_ids"]


def test_every_setting_of_generation_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed, each reaches `generate`, the batches, or the choice of an engine."""
    changes = {
        "batch_size": 3, "max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_p": 0.8,
        "cache": "static", "backend": "vllm", "vllm_memory": 0.4,
    }  # fmt: skip
    assert changes.keys() == {field.name for field in fields(GenerationConfig)}
    config = GenerationConfig(**changes)
    assert all(v != getattr(GenerationConfig(batch_size=2), k) for k, v in changes.items())
    model, processor = Asked(), embedded_processor()
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    generate_batch(model, processor, batch, config, seed=3)
    for name in ("max_new_tokens", "do_sample", "temperature", "top_p"):
        assert model.options[name] == changes[name], name
    assert model.options["cache_implementation"] == "static" and model.options["top_k"] == 0
    generate_batch(model, processor, batch, replace(config, do_sample=False, cache="dynamic"))
    assert not {"temperature", "top_p", "cache_implementation"} & model.options.keys()
    batches = generation._batches([{"prompt": str(n)} for n in range(7)], config.batch_size)
    assert [len(indices) for indices in batches] == [3, 3, 1]
    made = []
    monkeypatch.setattr(stage, "VLLMModel", lambda *args: made.append(args))
    whole = smoke({f"generation.{k}": v for k, v in changes.items()})
    stage.load_answerer(whole, Path("trained"))
    assert made == [(whole.model, Path("trained"), 0.4)]


def test_one_thread_alone_encodes(
    rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer keeps the padding that was asked for last, so two threads would disturb it."""
    kind = type(embedded_processor().tokenizer)
    pads, threads = kind.set_truncation_and_padding, []

    def noted(tokenizer: object, *args: object, **options: object) -> None:
        threads.append(threading.get_ident())
        pads(tokenizer, *args, **options)

    monkeypatch.setattr(kind, "set_truncation_and_padding", noted)
    config = GenerationConfig(batch_size=2, max_new_tokens=2)
    generate(embedded_model(), embedded_processor(), rows[:6], config, tmp_path / "a.jsonl", seed=0)
    here = threading.get_ident()
    began = next(n for n, thread in enumerate(threads) if thread != here)
    assert len(threads) - began >= 3 and here not in threads[began:]


def test_the_next_batch_is_made_while_this_one_is_used() -> None:
    made: list[int] = []
    begun = threading.Event()

    def work(item: int) -> int:
        made.append(item)
        if item == 1:
            begun.set()
        if item == 3:
            raise ValueError("row 3")
        return 10 * item

    results = ahead(work, [0, 1, 2, 3], False)
    assert next(results) == 0
    assert begun.wait(10), "nothing was begun ahead"
    assert [next(results), next(results)] == [10, 20]
    with pytest.raises(ValueError, match="row 3"):
        next(results)
    assert made == [0, 1, 2, 3]


def test_once_asked_to_stop_no_batch_is_begun() -> None:
    made: list[int] = []
    flag: list[int] = []
    results = ahead(lambda item: made.append(item) or item, [0, 1, 2, 3], flag)
    assert next(results) == 0
    flag.append(1)
    assert list(results) == []
    assert set(made) <= {0, 1}
    assert list(ahead(made.append, [7], flag)) == [] and 7 not in made
