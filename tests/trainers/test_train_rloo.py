"""RLOO: trl's trainer over our reward model, our prompts and our checkpoints."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from spavl_lib.config import Config
from spavl_lib.data.images import decode
from spavl_lib.data.templates import encode_prompts, render
from spavl_lib.errors import InputError, NonFiniteError, Preempted
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import load_policy
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.stages import policies
from spavl_lib.trainers import rloo
from spavl_lib.trainers.progress import StageCallback
from spavl_lib.trainers.reward_function import RewardFunction
from spavl_lib.trainers.rollout import batch_of, encode_rows
from tests.helpers import embedded_processor, metric_rows, mini_rows, smoke, spread, tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def settings(adapter: str, folder: Path | str, **changes: object) -> Config:
    """Two epochs of two steps, each two batches: every boundary a resume can fall on."""
    overrides = {
        "model.adapter": adapter, "data.train_rows": 8, "rloo.max_steps": 4,
        "rloo.per_device_batch_size": 4, "rloo.gradient_accumulation_steps": 2,
        "rloo.num_generations": 2, "rloo.max_new_tokens": 12, "rloo.save_steps": 2,
        "rloo.warmup_steps": 0, "rloo.reward_model": str(folder), "rloo.temperature": 2.0,
    }  # fmt: skip
    return smoke(overrides | {k.replace("__", "."): v for k, v in changes.items()}, run_name="r")


def train(config: Config, root: Path) -> tuple[Stage, dict]:
    stage = Run(config, root=root).stage("rloo")
    return stage, rloo.train_rloo(config, stage)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_end(
    adapter: str,
    reward_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(adapter, reward_folders[adapter])
    straight, expected = train(config, tmp_path / "straight")
    assert expected["steps"] == 4 and expected["answers"] == 32
    assert "tower" not in expected["trainable_parameters"]
    lines = metric_rows(straight)
    assert [r["step"] for r in lines] == [1, 2, 3, 4]
    assert abs(lines[0]["kl"]) < 1e-4 < abs(lines[-1]["kl"]) + 1e-3
    assert all(len(r["row_ids"]) == 4 for r in lines)
    first_epoch = {i for r in lines[:2] for i in r["row_ids"]}
    assert len(first_epoch) == 8, "an epoch asks every prompt once"

    old = StageCallback.on_step_end

    for at in (1, 3):  # in the first epoch, and in the second

        def stop(self: object, args: object, state: object, *rest: object, **more: object):  # noqa: ANN202
            if state.global_step == at:  # noqa: B023
                self.flag.reason = "SIGTERM"
            return old(self, args, state, *rest, **more)

        monkeypatch.setattr(StageCallback, "on_step_end", stop)
        stage = Run(config, root=tmp_path / f"stopped{at}").stage("rloo")
        with pytest.raises(Preempted):
            rloo.train_rloo(config, stage)
        monkeypatch.setattr(StageCallback, "on_step_end", old)
        summary = rloo.train_rloo(config, stage)
        assert metric_rows(stage) == lines
        assert summary["weights_sha256"] == expected["weights_sha256"]
        answers = [(straight.path / "rollouts.jsonl").read_bytes()]
        assert answers == [(stage.path / "rollouts.jsonl").read_bytes()]

    records = read_jsonl(straight.path / "rollouts.jsonl")
    assert len(records) == 32 and {r["step"] for r in records} == {1, 2, 3, 4}
    assert "rloo" in policies()  # inference and evaluation take it
    model = load_policy(config.model, straight.path / "model")
    names = [n for n, _ in model.named_parameters()]
    assert not any(".reward." in n for n in names), "the reward model is not part of the policy"
    assert (straight.path / "model/README.md").is_file()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_reward_is_the_reward_models_score(
    adapter: str, reward_folders: dict[str, Path], tmp_path: Path
) -> None:
    """On the policy's base or on its own: what `load_reward_model` says of the same ids."""
    folder, processor = reward_folders[adapter], embedded_processor()
    config = settings(adapter, folder, rloo__per_device_batch_size=2, rloo__num_generations=2)
    stage = Run(config, root=tmp_path).stage("rloo")
    stage.path.mkdir(parents=True)
    trainer = rloo.build_trainer(config, stage, processor, mini_rows().select(range(8)), folder)
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}

    eos = processor.tokenizer.eos_token_id
    rows = spread(mini_rows(), 3)
    chosen = [rows[i] for i in (0, 0, 1, 2)]
    answers = [[40, 41, 42, eos], [50, 51], [60, eos], [44, 45, 46, 47, 48, 49]]
    got = trainer.reward_funcs[0](
        prompts=[None] * 4, completions=[None] * 4, completion_ids=answers,
        id=[r["id"] for r in chosen], question=[r["prompt"] for r in chosen],
        image=[decode(r["image"]) for r in chosen],
    )  # fmt: skip

    model = load_reward_model(config.model, folder)
    expected = []
    for row, answer in zip(chosen, answers, strict=True):
        batch = batch_of(encode_rows(processor, [row]), [answer], 3, torch.device("cpu"))
        with torch.no_grad():
            penalty = 0.0 if answer[-1] == eos else config.rloo.missing_eos_penalty
            expected.append(model(**batch).item() - penalty)
    assert got == pytest.approx(expected, abs=5e-5)
    assert max(expected) - min(expected) > 0.01
    assert trainable == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_policy_sees_our_prompt_ids(reward_folders: dict[str, Path], tmp_path: Path) -> None:
    """Also where a question reads like an image slot; and what trl lays out is those ids."""
    processor = embedded_processor()
    rows = mini_rows().select(range(8)).to_list()
    rows[0]["prompt"] += " <image>"
    rows = type(mini_rows()).from_list(rows, features=mini_rows().features)
    config = settings("lora", reward_folders["lora"])
    stage = Run(config, root=tmp_path).stage("rloo")
    stage.path.mkdir(parents=True)
    trainer = rloo.build_trainer(config, stage, processor, rows, reward_folders["lora"])
    seen = {}

    def generate(ids: list, images: list, fields: dict) -> list:
        seen["ids"], seen["pixels"] = ids, fields["pixel_values"]
        return [[40, processor.tokenizer.eos_token_id]] * len(ids)

    trainer._generate_single_turn = generate
    inputs = [trainer.train_dataset[i // 2] for i in range(8)]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs)
    ours = encode_rows(processor, [rows[i // 2] for i in range(8)])
    assert seen["ids"] == [p.ids for p in ours]
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    kept = [i[m.bool()].tolist() for i, m in pairs]
    assert kept == [p.ids for p in ours]
    pixels = torch.cat([p.vision["pixel_values"] for p in ours])
    assert torch.equal(seen["pixels"], pixels)
    assert torch.equal(batch["pixel_values"], pixels)


def test_a_template_without_bos_is_noticed() -> None:
    _, processor = tiny("llava")
    image = decode(mini_rows()[0]["image"])
    ours = encode_prompts(processor, ["What?"], [image]).ids
    text = render(processor, "What?")
    theirs = processor(images=[image], text=[text], add_special_tokens=False)["input_ids"]
    assert ours[0] != theirs[0]
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        rloo.compare_prompts(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rloo.compare_prompts(ours, ours)


def test_bad_input(reward_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spavl train reward --profile smoke"):
        train(settings("lora", ""), tmp_path)
    other = tmp_path / "other"
    shutil.copytree(reward_folders["lora"], other)
    text = (other / "reward_config.json").read_text()
    (other / "reward_config.json").write_text(text.replace("embedded", "org/other"))
    with pytest.raises(InputError, match="'org/other'.*same base"):
        train(settings("lora", other), tmp_path)
    with pytest.raises(InputError, match="a whole model, but model.adapter is 'lora'"):
        train(settings("lora", reward_folders["full"]), tmp_path)
    (other / "score_head.safetensors").unlink()
    with pytest.raises(InputError, match="score_head.safetensors is missing"):
        train(settings("lora", other), tmp_path)
    with pytest.raises(InputError, match="use_vllm needs a CUDA GPU"):
        train(settings("lora", reward_folders["lora"], rloo__use_vllm=True), tmp_path)
    with pytest.raises(InputError, match="8 training rows, but a step takes 16"):
        changes = {"rloo__per_device_batch_size": 16}
        train(settings("lora", reward_folders["lora"], **changes), tmp_path)
    with pytest.raises(InputError, match="must be a multiple of num_generations = 3"):
        settings("lora", "", rloo__num_generations=3)
    with pytest.raises(InputError, match="leave no room for 2000 new tokens.*rloo.max_new_tokens"):
        train(settings("lora", reward_folders["lora"], rloo__max_new_tokens=2000), tmp_path)


def test_scores_that_are_no_numbers_and_empty_answers_stop_the_run() -> None:
    processor = embedded_processor()
    row = mini_rows()[0]
    columns = {"id": ["a"], "question": [row["prompt"]], "image": [decode(row["image"])]}
    options = {"batch_size": 1, "missing_eos_penalty": 0.0}
    nan = RewardFunction(lambda batch: torch.tensor([float("nan")]), processor, **options)
    with pytest.raises(NonFiniteError, match="rows a"):
        nan([None], [None], [[40, 1]], **columns)
    fine = RewardFunction(lambda batch: torch.tensor([1.0]), processor, **options)
    with pytest.raises(InputError, match="every response is empty"):
        fine([None], [None], [[1]], **columns)
    assert fine([None], [None], [[40, 1]], **columns) == [1.0]
