"""Trainers on rows with two images, one, none, and with several turns."""

import json
from pathlib import Path

import pytest
import torch

from spavl_lib.data.load import load_preferences
from spavl_lib.errors import InputError
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers.ppo import PPOTrainer
from tests.helpers import hub_rows, smoke

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pairs: in turn with two images, with none, with one, and with one and three turns."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = []
    for number, row in enumerate(hub_rows("train", 12)):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
        own, other = f"{number}.png", f"{max(0, number - 4)}.png"
        images = ([own, other], [], [own], [own])[number % 4]
        prompt = row["question"]
        if number % 4 == 3:
            said = [("user", "Hello."), ("assistant", "Hello!"), ("user", prompt)]
            prompt = [{"role": role, "content": text} for role, text in said]
        record = {"id": f"{number}", "prompt": prompt, "images": images}
        lines.append(json.dumps(record | {k: row[k] for k in ("chosen", "rejected")}))
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "validation.jsonl").write_text("\n".join(lines[:4]), encoding="utf-8")
    return folder


def stage_of(name: str, data: Path, root: Path, reward: Path, **changes: object) -> Stage:
    overrides = {
        "data.source": "datasets", "data.path": str(data), "data.train_rows": 0,
        "data.validation_rows": 0, "model.adapter": "lora", f"{name}.max_steps": 2,
        f"{name}.per_device_batch_size": 4,
    }  # fmt: skip
    if name == "online_dpo":
        del overrides["online_dpo.max_steps"], overrides["online_dpo.per_device_batch_size"]
        overrides |= {"online_dpo.rounds": 1, "dpo.per_device_batch_size": 4}
    if name in ("ppo", "rloo", "grpo", "online_dpo"):
        overrides |= {f"{name}.reward_model": str(reward), f"{name}.max_new_tokens": 6}
    if name == "ppo":
        overrides |= {"ppo.rollout_batch_size": 8}
    return Run(smoke(overrides | changes, run_name="r"), root=root).stage(name)


@pytest.mark.parametrize("name", ["reward", "dpo", "kto", "ppo", "online_dpo"])
def test_a_trainer_takes_mixed_rows(
    name: str, data: Path, tmp_path: Path, reward_folders: dict[str, Path]
) -> None:
    stage = stage_of(name, data, tmp_path, reward_folders["lora"])
    summary = maker_of(name)(stage.run.config, stage)
    rows = read_jsonl(stage.metrics_path)
    assert summary["steps"] >= 2
    losses = [row[k] for row in rows for k in ("loss", "loss/policy_avg") if k in row]
    assert len(losses) >= 2 and all(isinstance(loss, float) for loss in losses)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_trl_methods_of_one_image_name_the_rows(
    name: str, data: Path, tmp_path: Path, reward_folders: dict[str, Path]
) -> None:
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    kept = "\n".join(json.dumps(line) for line in lines if line["images"])
    (data / "train.jsonl").write_text(kept)
    stage = stage_of(name, data, tmp_path, reward_folders["lora"])
    with pytest.raises(InputError, match="3 rows have several: 0, 4, 8; leave these rows out"):
        maker_of(name)(stage.run.config, stage)


def test_the_tower_cache_changes_no_rollout_of_mixed_rows(
    data: Path, tmp_path: Path, reward_folders: dict[str, Path]
) -> None:
    found = []
    for cached in (True, False):
        stage = stage_of("ppo", data, tmp_path / str(cached), reward_folders["lora"])
        rows = load_preferences(stage.run.config.data, "train")
        trainer = PPOTrainer(stage.run.config, stage, rows, reward_folders["lora"], False)
        cache = trainer.tower_cache()
        cache.works = cache.works and cached
        with cache.rollout():
            found.append(trainer.roll_out(0, cache))
        assert (cache.hits > 0) == cached
    with_cache, without = found
    assert with_cache.responses == without.responses
    assert any(len(prompt.image_keys) == 2 for prompt in with_cache.prompts)
    for name, values in with_cache.columns.items():
        torch.testing.assert_close(values, without.columns[name], atol=1e-5, rtol=0)
