"""The playground: its page builds, is safe, and answers as the models do in torch.

The page's code runs in node, which the tests skip if it is missing, and once in Chromium.
"""

import base64
import copy
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.data.images import decode, open_image
from spavl_lib.data.load import load_prompts
from spavl_lib.data.templates import completion_ids, encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.generation import ask as ask_module
from spavl_lib.generation.ask import RunModels
from spavl_lib.generation.generate import generate_batch
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.report.playground import describe, write_playground
from spavl_lib.report.playground.weights import Packed
from tests.helpers import MINI, embedded_model, embedded_processor, png, shake, smoke, spread
from tests.reliability.test_browser import BROWSER, Browser
from tests.report.conftest import Page
from tests.report.payloads import PAYLOADS

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
MODELS = ("base", "dpo", "ppo")


# --- a run and its page ---------------------------------------------------------------------------


def _run(root: Path, reward: Path | None = None, overrides: dict | None = None) -> Path:
    """A run whose DPO model is an adapter, and whose PPO model has weights of its own."""
    for name, adapter in (("dpo", "lora"), ("ppo", "full"), ("reward", "lora")):
        config = smoke({"model.adapter": adapter} | (overrides or {}))
        (root / name).mkdir(parents=True)
        manifest = {"config": config.to_dict(), "git_commit": "0123456789abcdef"}
        (root / name / "manifest.json").write_text(json.dumps(manifest))
        (root / name / "summary.json").write_text("{}")
    adapted = get_peft_model(embedded_model(own=True), lora_config(embedded_model(), smoke().model))
    for seed in range(6):
        shake(adapted, seed)
    adapted.save_pretrained(root / "dpo/model")
    trained, generator = embedded_model(own=True), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in trained.named_parameters():
            if "vision_tower" not in name:
                values.add_(3e-3 * torch.randn(values.shape, generator=generator))
    trained.save_pretrained(root / "ppo/model")
    if reward:
        shutil.copytree(reward, root / "reward/model")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, reward_folders: dict[str, Path]) -> Path:
    return _run(tmp_path_factory.mktemp("runs") / "played", reward_folders["lora"])


@pytest.fixture(scope="module")
def models(run: Path) -> RunModels:
    return RunModels(run)


@pytest.fixture(scope="module")
def path(run: Path) -> Path:
    return write_playground(run)


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def block(page: Page, name: str) -> str:
    """The text of a script element that holds data."""
    source = page.source.partition(f' id="{name}">')[2]
    return source.partition("</script>")[0]


# --- the page -------------------------------------------------------------------------------------


def test_the_page_holds_what_a_reader_needs(page: Page, path: Path) -> None:
    assert path.name == "playground.html"
    for words in (
        "Content warning.", "Run played", "0123456789ab", "Base, DPO, PPO", "means nothing",
        "2.0 million parameters", "begins as a refusal", 'with "I" or "Sorry"', "reward model",
    ):  # fmt: skip
        assert words in page.text, words
    labelled = {a["for"] for a in page.all("label") if "for" in a}
    controls = [a for tag in ("select", "input", "textarea") for a in page.all(tag)]
    assert labelled == {a["id"] for a in controls} and len(controls) == 3
    assert page.all("p", role="status") and page.all("p", **{"aria-live": "polite"})


def test_examples_are_twin_pairs_and_rows_of_every_set(page: Page) -> None:
    examples = json.loads(block(page, "info"))["examples"]
    sets = Counter(example["set"].split(":")[0] for example in examples)
    assert set(sets) == {
        "Twin pairs", "Harmful requests", "Harmless requests", "Harmless look-alikes"
    }  # fmt: skip
    assert sets["Twin pairs"] == 12 and sum(sets.values()) == 32
    for example in examples:
        twins = example["set"].startswith("Twin")
        captions = [picture["caption"] for picture in example["pictures"]]
        assert len(captions) == 1 + twins
        if twins:
            assert "(harmful" in captions[0] and "(harmless" in captions[1]
    assert len(page.all("option")) == len(examples)


def test_nothing_is_fetched_and_only_the_pages_own_script_runs(page: Page) -> None:
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    running = [a for a in page.all("script") if "type" not in a]
    script = page.source.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert len(running) == 1
    assert policy == (
        "default-src 'none'; img-src data: blob:; worker-src blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "base", "form", "link"}
        assert not {"src", "href", "action", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    without_weights = page.source.replace(block(page, "weights"), "")
    assert "http:" not in without_weights and "https:" not in without_weights
    reaching_out = r"\b(fetch|XMLHttpRequest|WebSocket|importScripts|eval|url)\(|innerHTML|@import"
    assert not re.search(reaching_out, without_weights)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with own prompts and large pictures, in which every name and question is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    picture = root / "picture.png"
    picture.write_bytes(png(size=(300, 200)))
    rows = [
        {"prompt": text[:900], "image": str(picture), "set": ("harm", "help")[n % 2]}
        for n, text in enumerate(PAYLOADS.values())
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows if "surrogate" not in row["prompt"])
    (root / "prompts.jsonl").write_text(lines)
    return _run(root / "<img src=x onerror=alert(1)>", overrides={
        "data.test_path": str(root / "prompts.jsonl"), "data.test_rows": 0,
        "data.image_root": str(root),
    })  # fmt: skip


def test_hostile_text_changes_nothing_but_text(
    hostile: Path, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<script>alert(1)<"  # a plugin's stage, so a model's name
    shutil.copytree(hostile / "ppo", hostile / evil)
    monkeypatch.setattr(ask_module, "policies", lambda: ("dpo", "ppo", evil))
    written = Page(write_playground(hostile).read_text(encoding="utf-8"))
    assert {tag for tag, _ in written.elements} <= {tag for tag, _ in page.elements}
    assert len(written.all("script")) == len(page.all("script"))
    assert "Ask the models of run <img src=x onerror=alert(1)>" in written.text
    assert evil in written.text
    info = json.loads(block(written, "info"))
    assert "<" not in block(written, "info")
    questions = {example["question"] for example in info["examples"]}
    assert len(questions) == 20 and questions <= {text[:900] for text in PAYLOADS.values()}
    assert info["models"][-1]["name"] == evil
    # A picture over 128 pixels is embedded as the model sees it, and blurred at first.
    [picture] = info["examples"][0]["pictures"]
    small = Image.open(io.BytesIO(base64.b64decode(picture["uri"].partition(",")[2])))
    assert small.size == (64, 64) and picture["caption"] == "Picture 1"
    assert written.all("main", class_="veiled") and not page.all("main", class_="veiled")


def test_the_command_writes_the_page_and_refuses_bad_input(
    run: Path, tmp_path: Path, spavl: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAVL_RUNS", str(run.parent))
    monkeypatch.setattr("spavl_lib.report.playground.build.render", lambda _: "<p>page</p>")
    code, out, _ = spavl("playground", "played", "--output", str(tmp_path / "page.html"))
    assert code == 0 and "page.html" in out
    assert (tmp_path / "page.html").read_text() == "<p>page</p>"
    for words, says in (
        (["none"], "no run 'none'"),
        (["played", "--output", str(tmp_path / "no/page.html")], "there is no such folder"),
        (["played", "--output", str(tmp_path)], "is a folder"),
    ):
        code, _, err = spavl("playground", *words)
        assert code == 2 and says in err and err.count("\n") == 1


def test_a_run_without_models_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no trained model yet.*`spavl train dpo`"):
        write_playground(tmp_path)
    with pytest.raises(InputError, match="no such run folder"):
        write_playground(tmp_path / "none")


def _llava(**changes: Any) -> LlavaConfig:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1} | changes
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=1, image_size=64
        ),
        text_config=LlamaConfig(num_attention_heads=4, vocab_size=99, **text),
    )


def test_models_that_a_browser_cannot_run_are_refused_with_the_reason() -> None:
    describe.check_model(AutoConfig.from_pretrained(ASSETS / "model"))
    describe.check_model(_llava())
    mistral = _llava()
    mistral.text_config.model_type = "mistral"
    deeper = _llava()
    deeper.vision_feature_layer = [-1, -2]
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for config, reason in (
        (
            _llava(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2),
            "this model has 4",
        ),
        (mistral, "built of llava, clip_vision_model, mistral"),
        (_llava(hidden_act="gelu"), "differs in text_config.hidden_act"),
        (_llava(rope_parameters=rope), "differs in text_config.rope_parameters"),
        (deeper, "differs in vision_feature_layer"),
    ):
        with pytest.raises(InputError, match="only models that are built as the embedded") as error:
            describe.check_model(config)
        assert reason in str(error.value)


def test_other_ways_to_prepare_or_store_are_refused(tmp_path: Path) -> None:
    squared = _run(tmp_path / "squared", overrides={"model.image_aspect": "square"})
    with pytest.raises(InputError, match="prepares images only as LLaVA-1.5 does"):
        write_playground(squared)
    quantised = _run(tmp_path / "quantised", overrides={"model.adapter": "qlora"})
    with pytest.raises(InputError, match="4-bit weights"):
        write_playground(quantised)


# --- weights --------------------------------------------------------------------------------------


def test_a_trained_tensor_is_the_base_and_a_difference() -> None:
    rng, packed = np.random.default_rng(0), Packed()
    base = rng.normal(0, 0.1, 10_000).astype(np.float16).astype(np.float32)
    trained = base + rng.normal(0, 1e-3, 10_000).astype(np.float32)
    of_base = packed.add(base)
    assert len(of_base) == 1 and packed.add(base, of_base) == of_base
    of_trained = packed.add(trained, of_base)
    assert len(of_trained) == 2 and len(packed.parts) == 2
    assert np.array_equal(packed.total(of_base), base)
    assert np.abs(packed.total(of_trained) - trained).max() < 3e-6
    assert np.abs(trained.astype(np.float16) - trained).max() > 1e-5  # what fp16 alone would lose
    alone = packed.add(trained)  # fp32 without a base
    assert len(alone) == 2 and np.abs(packed.total(alone) - trained).max() < 1e-7
    moved_far = base + rng.normal(0, 0.3, 10_000).astype(np.float32)
    of_moved = packed.add(moved_far, of_base)
    assert len(of_moved) == 3 and np.abs(packed.total(of_moved) - moved_far).max() < 1e-6
    for bad in (np.nan, np.inf, 1e5):
        with pytest.raises(InputError, match="not finite, or that exceed"):
            packed.add(np.array([bad], np.float32))


def test_every_tensor_is_stored_once(page: Page) -> None:
    info = json.loads(block(page, "info"))
    by_name = {model["name"]: model["parts"] for model in info["models"]}
    assert list(by_name) == [*MODELS, "reward"]
    for tensor, parts in by_name["base"].items():
        same = [by_name[name].get(tensor) == parts for name in by_name]
        assert all(same) == tensor.startswith("vision_tower."), tensor
    assert "lm_head.weight" not in by_name["reward"] and "score.weight" in by_name["reward"]
    size = len(base64.b64decode(block(page, "weights")))
    assert size == 2 * info["starts"][-1] < 4 * 2 * embedded_model().num_parameters()


# --- the page's code, in node ---------------------------------------------------------------------


def in_node(path: Path, folder: Path, **cases: Any) -> dict[str, list]:
    """What the page's code comes to for some cases; see playground_node.js."""
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("playground_node.js")
    words = [str(NODE), str(script), str(path), str(folder / "cases.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def canvas(image: Image.Image) -> dict[str, Any]:
    """A picture as a browser's canvas gives it."""
    pixels = base64.b64encode(image.convert("RGBA").tobytes()).decode()
    return {"rgba": pixels, "width": image.width, "height": image.height}


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(width * height)
    smooth = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, channels), np.uint8)
    return Image.fromarray(smooth).resize((width, height))


@needs_node
def test_token_ids_are_the_tokenizers(path: Path, tmp_path: Path) -> None:
    processor = embedded_processor()
    texts = [
        "What is this?", "I'm  here,\n\tisn't it  ", "Größe: 12,5 µm — naïve 日本語 😀👍🏽", "",
        "a <image> b </s><s> <unk>", "\u00a0\u2003x\x85y\u200b\ufeff", "e\u0301 \x00 §$%&/()=?",
        *(row["prompt"] for row in spread(load_prompts(MINI, "harm"), 20)),
        *(text[:300] for name, text in PAYLOADS.items() if name != "surrogate"),
    ]  # fmt: skip
    answers = [text for text in texts if text.strip() and "\x00" not in text]
    found = in_node(path, tmp_path, texts=texts, answers=answers)
    picture = Image.new("RGB", (64, 64))
    wanted = [encode_prompts(processor, [text], [picture]).ids[0] for text in texts]
    assert found["texts"] == wanted
    assert found["answers"] == [completion_ids(processor, "What?", text) for text in answers]


@needs_node
def test_pixel_values_are_the_processors(path: Path, tmp_path: Path) -> None:
    images = [noise(64, 64), noise(76, 64), noise(64, 76), noise(300, 200), noise(31, 50),
              noise(64, 64, 4), noise(640, 481, 4)]  # fmt: skip
    cases = [canvas(image) for image in images]
    found = in_node(path, tmp_path, pictures=cases, pixels=True)["pixels"]
    for image, values in zip(images, found, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        upright = open_image(buffer.getvalue())  # over white, if it has an alpha channel
        vision = encode_prompts(embedded_processor(), ["What?"], [upright]).vision
        wanted = vision["pixel_values"].numpy().ravel()
        assert np.abs(wanted - values).max() < 1e-4, image


@torch.no_grad()
def _logits(models: RunModels, name: str, row: dict) -> torch.Tensor:
    model, batch = models.load(name), PromptCollator(models.processor)([row])
    return model(**batch).logits[0, -1]


@needs_node
def test_logits_are_those_of_torch(path: Path, models: RunModels, tmp_path: Path) -> None:
    rows = spread(load_prompts(MINI, "twins"), 3)
    pictures = [canvas(decode(row["image"])) for row in rows]
    cases = [
        {"model": name, "picture": n, "question": row["prompt"]}
        for name in MODELS
        for n, row in enumerate(rows)
    ]
    found = in_node(path, tmp_path, pictures=pictures, logits=cases)["logits"]
    wanted = [_logits(models, name, row) for name in MODELS for row in rows]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (torch.tensor(ours) - theirs).abs().max() < 1e-3
        assert theirs.std() > 1


@needs_node
def test_other_models_of_this_architecture_run_too(tmp_path: Path) -> None:
    """Groups of heads share keys, embeddings are tied, and the tower ends a layer earlier."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            image_size=64, patch_size=16, hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=1800, max_position_embeddings=256, bos_token_id=0,
            eos_token_id=1, pad_token_id=3, rope_parameters={"rope_type": "default",
                                                              "rope_theta": 5000.0},
        ),
        image_token_index=4, vision_feature_layer=-2, vision_feature_select_strategy="full",
        image_seq_length=17, tie_word_embeddings=True, multimodal_projector_bias=False,
    )  # fmt: skip
    config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    processor = copy.deepcopy(embedded_processor())
    processor.patch_size, processor.vision_feature_select_strategy = 16, "full"
    other = tmp_path / "other"
    processor.save_pretrained(other)
    for folder in (other, tmp_path / "run/dpo/model"):
        model = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for values in model.parameters():
                values.mul_(5 if values.ndim > 1 else 1)
        model.save_pretrained(folder)
    settings = smoke({"model.name": str(other), "model.adapter": "full"}).to_dict()
    (tmp_path / "run/dpo/manifest.json").write_text(json.dumps({"config": settings}))
    (tmp_path / "run/dpo/summary.json").write_text("{}")
    page = write_playground(tmp_path / "run", tmp_path / "page.html")
    row = load_prompts(MINI, "help")[0]
    cases = [{"model": name, "picture": 0, "question": row["prompt"]} for name in ("base", "dpo")]
    pictures = [canvas(decode(row["image"]))]
    found = in_node(page, tmp_path, pictures=pictures, logits=cases)["logits"]
    models = RunModels(tmp_path / "run")
    for name, ours in zip(("base", "dpo"), found, strict=True):
        theirs = _logits(models, name, row)
        assert (torch.tensor(ours) - theirs).abs().max() < 1e-3 < theirs.std()


def _compare(path: Path, models: RunModels, rows: list[dict], folder: Path) -> dict[str, list]:
    """For each model, whether each answer is torch's; and the page's replies."""
    pictures = [canvas(decode(row["image"])) for row in rows]
    prompts = [{"picture": n, "question": row["prompt"]} for n, row in enumerate(rows)]
    found = in_node(path, folder, pictures=pictures, prompts=prompts)["prompts"]
    batch, same = PromptCollator(models.processor)(rows), {}
    for name in MODELS:
        answers = generate_batch(
            models.load(name), models.processor, batch, models.config.generation
        )
        keys = ("response", "finished")
        same[name] = [
            [reply["replies"][name][key] for key in keys] == [answer[key] for key in keys]
            for reply, answer in zip(found, answers, strict=True)
        ]
    return same | {"replies": [reply["replies"] for reply in found]}


@needs_node
def test_answers_scores_and_chances_are_those_of_torch(
    path: Path, models: RunModels, tmp_path: Path
) -> None:
    # The same picture again after another one, and a beginning that both questions share.
    rows = spread(load_prompts(MINI, "twins"), 14)
    rows = [*rows, rows[0], rows[0] | {"prompt": "How do people see this?"}]
    compared = _compare(path, models, rows, tmp_path)
    replies = compared.pop("replies")
    assert all(len(same) == 16 and all(same) for same in compared.values())
    assert len({reply["dpo"]["response"] for reply in replies}) > 1
    for row, reply in list(zip(rows, replies, strict=True))[:3]:
        for expected in models.ask(decode(row["image"]), row["prompt"]):
            shown = reply[expected.model]
            assert shown["response"] == expected.response
            assert shown["score"] == pytest.approx(expected.score, abs=1e-3)
            chances = _logits(models, expected.model, row).softmax(-1)
            assert shown["chances"][0] == pytest.approx(chances.max().item(), abs=1e-4)
            begins = sum(
                _chance_of(models, expected.model, row, completion_ids(
                    models.processor, "What?", word)[:-1])
                for word in ("I", "Sorry")
            )  # fmt: skip
            assert shown["refusal"] == pytest.approx(begins, abs=1e-4)


@torch.no_grad()
def _chance_of(models: RunModels, name: str, row: dict, opening: list[int]) -> float:
    """The chance that an answer begins with these tokens, in one pass over all of them."""
    batch = PromptCollator(models.processor)([row])
    ids = torch.cat([batch["input_ids"], torch.tensor([opening])], dim=1)
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logps = models.load(name)(**batch).logits[0, -len(opening) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor([opening]).T).sum().exp().item()


@needs_node
@pytest.mark.slow
def test_all_answers_of_a_test_set_are_those_of_torch(
    path: Path, models: RunModels, tmp_path: Path
) -> None:
    rows = list(load_prompts(MINI, "harm"))
    compared = _compare(path, models, rows, tmp_path)
    del compared["replies"]
    for name, same in compared.items():
        assert len(same) == 265 and sum(same) >= 263, f"{name}: {sum(same)} of {len(same)} equal"


def test_refusals_begin_as_no_other_answer() -> None:
    found = describe.refusal_openings(embedded_processor())
    assert found["words"] == ["I", "Sorry"]
    text = embedded_processor().tokenizer.decode
    assert [text(ids) for ids in found["ids"]] == [" I", " Sorry"]


# --- a browser ------------------------------------------------------------------------------------


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_answers_in_a_browser(path: Path, models: RunModels, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        status = "document.getElementById('status').textContent"

        def answered() -> str:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                if browser.evaluate(status).startswith("Answered"):
                    return browser.evaluate("document.getElementById('said-aloud').textContent")
                time.sleep(0.1)
            raise AssertionError(browser.evaluate("document.body.innerText"))

        dialogs, beyond, gone = browser.open(path, 1)
        answered()
        hostile = "<img src=x onerror=alert(1)> What is this?"
        browser.evaluate(
            f"document.getElementById('question').value = {json.dumps(hostile)};"
            "document.getElementById('send').click(); 1"
        )
        aloud = answered()
        [example, *_] = json.loads(block(Page(path.read_text(encoding="utf-8")), "info"))[
            "examples"
        ]
        uri = example["pictures"][0]["uri"]
        picture = open_image(base64.b64decode(uri.partition(",")[2]))
        for reply in models.ask(picture, hostile):
            assert html.unescape(reply.response) in aloud
        assert browser.evaluate("document.querySelectorAll('.card img').length") == 0
        browser.evaluate(
            "document.getElementById('question').value = ' ';"
            "document.getElementById('send').click(); 1"
        )
        problem = browser.evaluate("document.getElementById('problem').textContent")
        assert problem.startswith("The question is empty.")
        more = browser.seen(path.as_uri(), 0.5)
        requests = [url for url in (*beyond, *more[1]) if not url.startswith("blob:")]
        assert (dialogs, requests, gone) == ([], [], []) and not more[0]
    finally:
        browser.close()
