"""Which model families do what: every cell of the table in docs/families.md is tried here.

`SPAVL_WRITE_DOCS=1 pytest tests/families` writes the table.
"""

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from spavl_lib.config import Config, GenerationConfig, ModelConfig
from spavl_lib.data.collate import PreferenceCollator, PromptCollator
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import completion_ids, end_ids, render
from spavl_lib.errors import InputError
from spavl_lib.generation.generate import generate_batch
from spavl_lib.modelling import canary, load
from spavl_lib.modelling.export import export
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import load_model, load_policy, load_processor
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.runs.files import read_json
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers.dpo import train_dpo
from spavl_lib.trainers.guards import check_batch
from spavl_lib.trainers.ppo import train_ppo
from spavl_lib.trainers.reward import score_pairs, train_reward
from spavl_lib.trainers.rloo import train_rloo
from tests.conftest import REPO
from tests.families.models import BUILDERS, build
from tests.helpers import (
    canary_in_this_process,
    hub_rows,
    mini_rows,
    smoke,
    spread,
    write_hub_folder,
)

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = {
    "llava": "LLaVA-1.5", "llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision",
    "pixtral": "Pixtral", "mistral3": "Mistral 3", "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "internvl": "InternVL",
    "idefics3": "Idefics3", "gemma3": "Gemma 3", "paligemma": "PaliGemma", "mllama": "Mllama",
}  # fmt: skip
# Cells that are refused, and what the refusal says.
REFUSED = {"paligemma": "no chat template", "mllama": "cross attention"}
COLUMNS = ("load", "generate", "reward model", "DPO", "PPO", "RLOO", "export and load again")
TOLERANCE = 1e-4  # nats a token, in fp32
DOCS = REPO / "docs/families.md"
RESULTS: dict[tuple[str, str], bool] = {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the checkpoints and runs of this file."""
    return tmp_path_factory.mktemp("families")


class Tried:
    """A family's checkpoint and what was trained from it, made when first asked for."""

    def __init__(self, family: str, root: Path):
        self.folder = build(family, root / family)
        self.root, self.data = root, root / "data"
        if not self.data.exists():
            write_hub_folder(self.data, hub_rows("train", 6), hub_rows("validation", 2))

    @functools.cached_property
    def config(self) -> Config:
        return smoke(
            {
                "model.name": str(self.folder), "model.adapter": "lora", "model.lora_rank": 2,
                "model.lora_alpha": 4, "data.source": "hub_layout", "data.path": str(self.data),
                "data.train_rows": 0, "data.validation_rows": 0,
                "reward.max_steps": 2, "reward.per_device_batch_size": 3, "reward.save_steps": 9,
                "dpo.max_steps": 2, "dpo.per_device_batch_size": 3, "dpo.save_steps": 9,
                "ppo.max_steps": 1, "ppo.rollout_batch_size": 4, "ppo.per_device_batch_size": 4,
                "ppo.max_new_tokens": 6, "ppo.save_steps": 9, "rloo.max_steps": 1,
                "rloo.per_device_batch_size": 4, "rloo.num_generations": 2,
                "rloo.max_new_tokens": 6, "rloo.save_steps": 9, "rloo.temperature": 2.0,
            },
            run_name=self.folder.name,
        )  # fmt: skip

    @functools.cached_property
    def processor(self) -> ProcessorMixin:
        return load_processor(self.config.model)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return load_model(ModelConfig(name=str(self.folder), adapter="full"))

    def stage(self, name: str, train: Callable) -> tuple[Stage, dict]:
        stage = Run(self.config, root=self.root / "runs").stage(name)
        return stage, train(self.config, stage)


@functools.cache
def _tried(family: str, root: Path) -> Tried:
    return Tried(family, root)


# --- the cells ----------------------------------------------------------------------------------


def same_as_the_processor(tried: Tried, rows: list[dict]) -> None:
    """The trainer's batch gives what `model(**processor(...))` gives for the same rows."""
    processor, model = tried.processor, tried.model
    batch = PreferenceCollator(processor)(rows)
    check_batch(batch, rows, processor, model.config.image_token_id)
    completion = batch.pop("completion_mask").bool()
    sharing = copy.deepcopy(model)
    apply_sharing(sharing, "auto")  # as the trainers do, where the family allows it
    with torch.no_grad():
        ours = model(**batch).logits.log_softmax(-1)
        shared = sharing(**batch).logits.log_softmax(-1)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(shared[real], ours[real], atol=TOLERANCE, rtol=0)
    tokenizer, images = processor.tokenizer, decode_images(rows)
    for number, ids in enumerate(batch["input_ids"]):
        row, side = rows[number % len(rows)], ("chosen", "rejected")[number // len(rows)]
        image = images[number % len(rows)]
        text = render(processor, row["prompt"], image=len(image)).rstrip(" ")
        answer = completion_ids(processor, row["prompt"], row[side], image=len(image))
        text += tokenizer.decode(answer)
        if tokenizer.bos_token and not text.startswith(tokenizer.bos_token):
            text = tokenizer.bos_token + text
        inputs = processor(
            images=image or None, text=[text], return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        if "token_type_ids" not in batch:
            inputs.pop("token_type_ids", None)
        real = batch["attention_mask"][number].bool()
        assert ids[real].tolist() == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            alone = model(**inputs).logits[0].log_softmax(-1)
        torch.testing.assert_close(ours[number][real], alone, atol=TOLERANCE, rtol=0)
        # The tolerance excludes a model that is indifferent.
        assert alone.exp().max() > 2 / len(tokenizer) and completion[number].any()


def cell_load(tried: Tried, tmp_path: Path) -> None:
    assert type(tried.processor.image_processor).__name__.endswith("Pil")
    rows = spread(mini_rows(), 3)
    same_as_the_processor(tried, rows)
    text_only = dict(rows[0], image=None)
    same_as_the_processor(tried, [rows[1], text_only])  # a row without an image among others


def cell_generate(tried: Tried, tmp_path: Path) -> None:
    """Answers of a batch are those of each prompt alone, and their tokens the model's best."""
    rows, settings = spread(mini_rows(), 3), GenerationConfig(batch_size=3, max_new_tokens=6)
    processor, model = tried.processor, tried.model
    answers = generate_batch(model, processor, PromptCollator(processor)(rows), settings)
    for row, answer in zip(rows, answers, strict=True):
        alone = PromptCollator(processor)([row])
        assert generate_batch(model, processor, alone, settings) == [answer]
        with torch.no_grad():
            out = model.generate(
                **alone, max_new_tokens=1, do_sample=False, pad_token_id=0,
                eos_token_id=list(end_ids(processor, model)),
            )  # fmt: skip
            logits = model(**alone).logits[0, -1]
        assert out[0, -1] == logits.argmax()


def cell_reward_model(tried: Tried, tmp_path: Path) -> None:
    stage, summary = tried.stage("reward", train_reward)
    assert summary["steps"] == 2 and "tower" not in summary["trainable_parameters"]
    manifest = read_json(stage.path / "manifest.json")
    assert manifest["processor"]["image_processor"].endswith("Pil")
    assert "Reward model over" in (stage.path / "model/README.md").read_text()
    model = load_reward_model(tried.config.model, stage.path / "model")
    rows = mini_rows("validation").select(range(2))
    again = score_pairs(model, tried.processor, rows, 2)
    assert all(abs(pair["chosen_score"]) < float("inf") for pair in again)


def cell_dpo(tried: Tried, tmp_path: Path) -> None:
    stage, summary = tried.stage("dpo", train_dpo)
    assert summary["steps"] == 2 and summary["trainable_parameters"]["projector"]
    trained = load_policy(tried.config.model, stage.path / "model")
    batch = PromptCollator(tried.processor)(spread(mini_rows(), 2))
    with torch.no_grad():
        assert not torch.equal(trained(**batch).logits, tried.model(**batch).logits)


def cell_ppo(tried: Tried, tmp_path: Path) -> None:
    tried.stage("reward", train_reward)
    _, summary = tried.stage("ppo", train_ppo)
    assert summary["steps"] == 1


def cell_rloo(tried: Tried, tmp_path: Path) -> None:
    tried.stage("reward", train_reward)
    _, summary = tried.stage("rloo", train_rloo)
    assert summary["steps"] == 1


def cell_export(tried: Tried, tmp_path: Path) -> None:
    """Merged, it loads with transformers and with us, and answers as the adapter does."""
    stage, _ = tried.stage("dpo", train_dpo)
    with pytest.MonkeyPatch.context() as patch:  # a new process for each family takes too long
        patch.setattr(canary, "_in_new_process", canary_in_this_process)
        assert export(stage.path, tmp_path / "merged")["canary"]["prompts"] > 3
    batch = PromptCollator(tried.processor)(spread(mini_rows(), 2))
    config = ModelConfig(name=str(tmp_path / "merged"), adapter="full")
    processor = load_processor(config)
    assert processor.chat_template == tried.processor.chat_template
    again = PromptCollator(processor)(spread(mini_rows(), 2))
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        expected = load_policy(tried.config.model, stage.path / "model")(**batch).logits
        ours = load_model(config)(**batch).logits
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")(**batch).logits
    real = batch["attention_mask"].bool()
    for found in (ours, theirs):
        torch.testing.assert_close(found[real], expected[real], atol=1e-3, rtol=1e-3)
    kept = load_model(config).generation_config.eos_token_id
    assert kept == tried.model.generation_config.eos_token_id


CELLS = dict(
    zip(
        COLUMNS,
        (cell_load, cell_generate, cell_reward_model, cell_dpo, cell_ppo, cell_rloo, cell_export),
        strict=True,
    )
)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("family", BUILDERS)
def test_cell(
    family: str, column: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = _tried(family, root)
    RESULTS[family, column] = False
    if family in REFUSED:
        refused(tried, column, REFUSED[family], monkeypatch)
        return
    CELLS[column](tried, tmp_path)
    RESULTS[family, column] = True


def refused(tried: Tried, column: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, before a processor or a weight is read."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(load, "read_processor", never)
    monkeypatch.setattr(load.AutoModelForImageTextToText, "from_pretrained", never)
    doors = {
        "load": lambda: load_processor(tried.config.model),
        "generate": lambda: load_model(tried.config.model),
        "reward model": lambda: tried.stage("reward", train_reward),
        "DPO": lambda: tried.stage("dpo", train_dpo),
    }
    with pytest.raises(InputError, match=reason) as caught:
        doors.get(column, doors["generate"])()
    assert str(caught.value).count("\n") == 0


# --- the table ----------------------------------------------------------------------------------


def table(results: dict[tuple[str, str], bool]) -> str:
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for family, name in NAMES.items():
        cells = ["yes" if results[family, column] else "refused" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_docs_show_what_was_tried() -> None:
    """The last test of this file, so that every cell has a result."""
    if len(RESULTS) < len(BUILDERS) * len(COLUMNS):
        pytest.skip("only some of the cells were tried")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    page = f"{before}<!-- table -->\n{table(RESULTS)}\n<!-- end -->{after}"
    if os.environ.get("SPAVL_WRITE_DOCS"):
        DOCS.write_text(page, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == page
    # The two rows of Pixtral's tower count as one family.
    twelve = [family for family in BUILDERS if family != "mistral3"]
    assert sum(RESULTS[family, column] for family in twelve for column in COLUMNS) >= 66
