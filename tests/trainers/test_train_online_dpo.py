"""Online DPO: the policy's own responses, ranked by the reward model, round after round."""

from pathlib import Path

import pytest
import torch

from spavl_lib.config import Config
from spavl_lib.errors import InputError, Preempted
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import load_policy
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import online_dpo
from spavl_lib.trainers.exact_trainer import RowCollator
from spavl_lib.trainers.online_dpo import train_online_dpo
from spavl_lib.trainers.progress import StageCallback
from tests.helpers import embedded_processor, metric_rows, mini_rows, smoke

pytestmark = pytest.mark.filterwarnings("ignore")


def settings(adapter: str, folder: Path | str, **changes: object) -> Config:
    """Three rounds of two steps each."""
    return smoke(
        {
            "model.adapter": adapter, "data.train_rows": 6, "data.validation_rows": 4,
            "dpo.per_device_batch_size": 2, "dpo.warmup_steps": 0, "dpo.save_steps": 1,
            "dpo.learning_rate": 1e-3, "online_dpo.rounds": 3, "online_dpo.prompts": 4,
            "online_dpo.num_generations": 3, "online_dpo.max_new_tokens": 12,
            "online_dpo.temperature": 2.0, "online_dpo.reward_model": str(folder),
        }
        | {f"online_dpo.{key}": value for key, value in changes.items()},
        run_name="r",
    )  # fmt: skip


def train(config: Config, root: Path) -> tuple[Stage, dict]:
    stage = Run(config, root=root).stage("online_dpo")
    return stage, train_online_dpo(config, stage)


@pytest.fixture(scope="module")
def finished(
    reward_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Stage, dict]:
    config = settings("lora", reward_folders["lora"])
    return config, *train(config, tmp_path_factory.mktemp("straight"))


def test_every_round_ranks_its_own_samples(finished: tuple, reward_folders: dict) -> None:
    config, stage, summary = finished
    assert summary["steps"] == 6 and len(summary["rounds"]) == 3
    model = load_reward_model(config.model, reward_folders["lora"])
    rows = {row["id"]: row for row in mini_rows()}
    collate = RowCollator(embedded_processor())
    asked = []
    for number in (1, 2, 3):
        pairs = read_jsonl(stage.path / f"rounds/{number}.jsonl")
        answers = read_jsonl(stage.path / f"rounds/{number}.answers.jsonl")
        assert len(pairs) == 4 and len(answers) == 12
        asked.append([pair["id"] for pair in pairs])
        for i, pair in enumerate(pairs):
            own = answers[3 * i : 3 * i + 3]
            assert {a["id"] for a in own} == {pair["id"]}
            assert pair["scores"][0] >= pair["scores"][1]
            scores = {}
            for answer in own:
                text = answer["response"]
                row = rows[pair["id"]] | {"chosen": text, "rejected": text}
                batch = collate([row])
                inputs = {k: v[:1] for k, v in batch.items() if torch.is_tensor(v)}
                inputs.pop("completion_mask")
                with torch.no_grad():
                    scores[text] = model(**inputs).item() - (not answer["finished"])
            assert pair["scores"] == pytest.approx(
                [max(scores.values()), min(scores.values())], abs=1e-4
            )
            assert scores[pair["chosen"]] == pytest.approx(max(scores.values()), abs=1e-4)
            assert scores[pair["rejected"]] == pytest.approx(min(scores.values()), abs=1e-4)
    assert asked[0] != asked[1] and len({i for round_ in asked for i in round_}) == 6
    assert {i for row in metric_rows(stage)[:2] for i in row["row_ids"]} == set(asked[0])
    texts = [[a["response"] for a in read_jsonl(p)] for p in stage.path.glob("rounds/*.answers*")]
    assert len({t for part in texts for t in part}) > 18, "samples differ"


def test_the_policy_changes_and_is_saved(finished: tuple) -> None:
    config, stage, summary = finished
    first = metric_rows(stage)[0]
    assert abs(first["rewards/chosen"]) < 1e-4
    assert summary["rounds"][0]["pairs"] > 0 and "eval_loss" in summary["validation"]
    names = [n for n, _ in load_policy(config.model, stage.path / "model").named_parameters()]
    assert not any(".reward." in name for name in names), "the reward model is not part of it"
    assert "3 rounds" in (stage.path / "model/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])  # within a round, at its end, and within the next one
def test_a_stopped_run_goes_on_to_the_same_end(
    at: int, finished: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, straight, expected = finished
    old = StageCallback.on_step_end

    def stop(self: object, args: object, state: object, *rest: object, **more: object):  # noqa: ANN202
        if state.global_step == at:
            self.flag.reason = "SIGTERM"
        return old(self, args, state, *rest, **more)

    monkeypatch.setattr(StageCallback, "on_step_end", stop)
    with pytest.raises(Preempted):
        train(config, tmp_path)
    monkeypatch.setattr(StageCallback, "on_step_end", old)
    stage, summary = train(config, tmp_path)
    assert summary == expected and metric_rows(stage) == metric_rows(straight)


@pytest.mark.slow
def test_full_training_has_a_second_base_for_the_reward(
    reward_folders: dict[str, Path], tmp_path: Path
) -> None:
    _, summary = train(settings("full", reward_folders["full"], rounds=1), tmp_path)
    assert summary["steps"] == 2


def test_bad_input(
    reward_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="spavl train reward --profile smoke"):
        train(settings("lora", ""), tmp_path)
    with pytest.raises(InputError, match="leave no room for 2000 new tokens"):
        train(settings("lora", reward_folders["lora"], max_new_tokens=2000), tmp_path)
    grouped = smoke(
        {
            "data.group_by_image": True, "online_dpo.reward_model": str(reward_folders["lora"]),
        },
        run_name="r",
    )  # fmt: skip
    with pytest.raises(InputError, match="group_by_image has no effect"):
        train(grouped, tmp_path)
    same = [{"response": "I see.", "finished": True}] * 12
    monkeypatch.setattr(online_dpo, "generate", lambda *_, **__: same)
    with pytest.raises(InputError, match="round 1: for every prompt, all responses have the same"):
        train(settings("lora", reward_folders["lora"]), tmp_path / "same")
