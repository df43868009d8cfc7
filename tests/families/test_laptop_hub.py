"""The profile `laptop-hub` on tiny models of the families that it names."""

from pathlib import Path

import pytest

from spavl_lib import pipeline
from spavl_lib.config import load_config
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.load import load_preferences
from spavl_lib.generation.generate import generate_batch
from spavl_lib.modelling.load import load_policy, load_processor
from spavl_lib.runs.files import read_jsonl
from tests.families.models import build
from tests.laptop_files import write_pairs

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = {
    "data.train_rows": 8, "data.validation_rows": 2, "data.test_rows": 2, "reward.max_steps": 2,
    "reward.per_device_batch_size": 4, "dpo.max_steps": 2, "dpo.per_device_batch_size": 4,
    "ppo.max_steps": 2, "ppo.rollout_batch_size": 8, "ppo.max_new_tokens": 6,
    "generation.max_new_tokens": 6, "launch.num_threads": 1,
}  # fmt: skip


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_the_profile_trains_on_mixed_rows(
    family: str, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = mini_folder()
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))
    write_pairs({})
    (tmp_path / "cache" / mini.name).symlink_to(mini)
    folder = build(family, tmp_path / family)
    config = load_config("laptop-hub", FEW | {"model.name": str(folder)})
    assert config.dpo.loss_type == ("sigmoid", "sft") and config.data.extra_path == "laptop"
    processor = load_processor(config.model)
    rows = load_preferences(config.data, "train")
    assert [row["image"] is None for row in (rows[0], rows[-1])] == [False, True]
    prompts = PromptCollator(processor)([rows[0], rows[-1]])
    for name in ("reward", "dpo", "ppo"):
        stage = pipeline.make(name, config)
        log = read_jsonl(stage.metrics_path)
        ids = {i for row in log for i in row.get("row_ids", ())}
        if name == "ppo":
            ids = {row["id"] for row in read_jsonl(stage.path / "rollouts.jsonl")}
        assert stage.summary["steps"] == 2
        assert {i.partition("/")[0] for i in ids} == {"laptop", "train"}
        if name != "reward":
            model = load_policy(config.model, stage.path / "model")
            answers = generate_batch(model, processor, prompts, config.generation)
            assert len(answers) == 2
