"""`spavl ask`: every model of a run answers about one picture, and bad input is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import get_peft_model

from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.images import decode
from spavl_lib.data.load import load_prompts
from spavl_lib.data.templates import completion_ids
from spavl_lib.errors import InputError
from spavl_lib.generation import ask as ask_module
from spavl_lib.generation.ask import Reply, RunModels
from spavl_lib.generation.generate import generate_batch
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.notebook.ask_panel import AskPanel, table
from spavl_lib.trainers.reward_function import RewardFunction, Scorer
from tests.helpers import MINI, embedded_model, embedded_processor, png, shake, smoke


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, reward_folders: dict[str, Path]) -> Path:
    """A run with a DPO model whose adapter is random, and with a reward model."""
    root = tmp_path_factory.mktemp("runs") / "asked"
    config = smoke()
    for name in ("dpo", "reward"):
        (root / name).mkdir(parents=True)
        (root / name / "summary.json").write_text("{}")
        (root / name / "manifest.json").write_text(json.dumps({"config": config.to_dict()}))
    model = get_peft_model(embedded_model(own=True), lora_config(embedded_model(), config.model))
    for seed in range(100):  # enough that it says something else than the base model
        shake(model, seed)
    model.save_pretrained(root / "dpo/model")
    shutil.copytree(reward_folders["lora"], root / "reward/model")
    return root


@pytest.fixture(scope="module")
def models(run: Path) -> RunModels:
    return RunModels(run)


def test_each_model_answers_and_the_reward_model_scores(models: RunModels, run: Path) -> None:
    row = load_prompts(MINI, "help")[0]
    replies = models.ask(decode(row["image"]), row["prompt"])
    assert [reply.model for reply in replies] == ["base", "dpo"]
    processor = embedded_processor()
    batch = PromptCollator(processor)([row])
    [expected] = generate_batch(embedded_model(), processor, batch, models.config.generation)
    assert replies[0].response == expected["response"] != replies[1].response
    # The trainers' own scoring of the same words.
    score = RewardFunction(
        Scorer(load_reward_model(models.config.model, run / "reward/model")), processor,
        batch_size=2, missing_eos_penalty=0.0,
    )  # fmt: skip
    ids = [completion_ids(processor, row["prompt"], reply.response) for reply in replies]
    wanted = score.scores(["a", "a"], [row["prompt"]] * 2, [row["image"]] * 2, ids)
    assert [reply.score for reply in replies] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_an_image_comes_in_any_form(models: RunModels, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(png())
    answers = [models.ask(image, "What is this?") for image in (path, str(path), png())]
    assert answers[0] == answers[1] == answers[2]
    cell = {"bytes": None, "path": str(path)}  # as a data set has it, whatever folder it lies in
    assert models.ask(cell, "What is this?") == answers[0]
    assert models.ask(None, "What is this?")[0].response


def test_large_models_are_loaded_one_after_the_other(
    run: Path, models: RunModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = models.ask(png(), "What is this?")
    monkeypatch.setattr(ask_module, "KEPT", 1)
    large = RunModels(run)
    assert large.ask(png(), "What is this?") == expected
    assert large._kept == {} and set(models._kept) == {"base", "dpo", "reward"}


def test_bad_input_is_one_sentence(models: RunModels, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for image, question, says in (
        (png(), " \n", "the question is empty"),
        (tmp_path / "none.png", "What?", "does not exist"),
        (tmp_path, "What?", "does not exist"),
        (text, "What?", "text.png: unreadable image"),
        (png(size=(9000, 9000)), "What?", "over 50,000,000"),
        (png(), "what " * 500, "the question is too long"),
    ):
        with pytest.raises(InputError, match=says):
            models.ask(image, question)


def test_a_run_without_models_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained model yet.*`spavl train dpo`"):
        RunModels(tmp_path)


def test_the_command_shows_answers_side_by_side(
    run: Path, tmp_path: Path, spavl: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAVL_RUNS", str(run.parent))
    path = tmp_path / "picture.png"
    path.write_bytes(png())
    code, out, _ = spavl("ask", "asked", str(path), "What is the thing in this picture?")
    assert code == 0
    assert out.startswith("Base ") and "\nDPO " in out
    code, _, err = spavl("ask", "asked", str(path), "")
    assert code == 2 and "the question is empty" in err


def test_the_panel_asks_about_an_example_or_an_upload(run: Path) -> None:
    panel = AskPanel(run)
    panel._try(panel.ask)
    assert "choose a picture first" in panel.replies.value
    panel.examples.value = 0
    assert panel.question.value == panel.rows[0]["prompt"] and panel.image.value
    panel._try(panel.ask)
    assert "<b>Base</b>" in panel.replies.value and "<b>DPO</b>" in panel.replies.value
    file = {"name": "a.png", "type": "image/png", "size": 1, "content": png()}
    for form in ((file,), {"a.png": file}):  # ipywidgets 8 and 7
        panel.chosen = None
        panel.upload = SimpleNamespace(value=form)
        panel._try(panel._on_upload)
        assert panel.chosen and panel.replies.value == ""
    panel.upload = SimpleNamespace(value=(file | {"content": b"no picture"},))
    panel._try(panel._on_upload)
    assert "unreadable image" in panel.replies.value


def test_a_models_text_is_shown_and_not_run() -> None:
    page = table([Reply("base", "<script>alert(1)</script>\u202e", False, None)])
    assert "<script>" not in page and "&lt;script&gt;" in page and "\u202e" not in page


def test_a_model_that_was_not_trained_is_named(run: Path) -> None:
    with pytest.raises(InputError, match=r"no trained model dpoo \(it has: dpo\)"):
        RunModels(run, only=("dpoo",))
