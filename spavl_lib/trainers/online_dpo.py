"""Train a policy by DPO on its own responses, which the reward model ranks (Guo et al. 2024).

    spavl train online_dpo --profile demo

In every round the policy of that time answers prompts several times. The best and the worst
response to a prompt, by the reward model's score, become a pair, and DPO makes one pass over the
round's pairs. The reference is the base model in all rounds. `rounds/N.jsonl` has the pairs.
"""

import dataclasses
import random
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import ProcessorMixin, TrainerCallback

from spavl_lib.config import Config, GenerationConfig
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import completion_ids
from spavl_lib.errors import InputError, NonFiniteError
from spavl_lib.generation.generate import generate
from spavl_lib.modelling.adapters import assert_freeze_plan
from spavl_lib.modelling.heads import check_reward_model
from spavl_lib.modelling.load import load_processor, quiet_libraries
from spavl_lib.runs.files import read_jsonl, write_jsonl
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.dpo import (
    LOGGED,
    build_trainer,
    check_reference,
    probe_reference,
    save_trained,
    summary_of,
)
from spavl_lib.trainers.export_card import model_card
from spavl_lib.trainers.guards import REMEDY
from spavl_lib.trainers.inputs import load_rows, policy_inputs, reward_folder
from spavl_lib.trainers.reward_function import RewardFunction, build_scorer


class RoundRows(TorchDataset):
    """The pairs of the present round. `rows` is replaced when a round begins."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Rounds(TrainerCallback):
    """Samples and ranks the responses of a round when it begins.

    A round whose file exists is not sampled again, so a resumed run trains on the same pairs.

    Args:
        trainer: The trainer.
        config: Uses `online_dpo`, `dpo` and `seed`.
        stage: The stage, which gets `rounds/`.
        processor: Processor of the model.
        prompts: Preference rows, whose prompts are used.
        reward: The reward model.
        flag: Stop flag, which is polled while responses are sampled.
    """

    def __init__(
        self, trainer: Any, config: Config, stage: Stage, processor: ProcessorMixin,
        prompts: Dataset, reward: RewardFunction, flag: StopFlag,
    ):  # fmt: skip
        self.trainer, self.config, self.processor = trainer, config, processor
        self.prompts, self.reward, self.flag = prompts, reward, flag
        self.folder = stage.path / "rounds"

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the pairs of the round that begins into the trainer."""
        number = int(state.epoch or 0)
        rows = self.rows_of(number)
        self.trainer.train_dataset.rows = pairs_of(rows, self.ranked(number, rows))

    def rows_of(self, number: int) -> list[dict]:
        """The preference rows whose prompts a round uses.

        Args:
            number: Number of the round, from 0.
        """
        order = list(range(len(self.prompts)))
        random.Random(f"{self.config.seed}/rounds").shuffle(order)
        size = self.config.online_dpo.prompts or len(order)
        return [self.prompts[order[(number * size + i) % len(order)]] for i in range(size)]

    def ranked(self, number: int, rows: list[dict]) -> list[dict]:
        """The best and the worst response to each prompt of a round, with their scores.

        Args:
            number: Number of the round, from 0.
            rows: The round's rows.
        """
        path = self.folder / f"{number + 1}.jsonl"
        if path.is_file():
            return read_jsonl(path)
        settings, model = self.config.online_dpo, self.trainer.model
        sampling = GenerationConfig(
            batch_size=self.config.dpo.per_device_batch_size * 2, do_sample=True,
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        )  # fmt: skip
        training = model.training
        model.eval()
        try:
            answers = generate(
                model, self.processor, [r for r in rows for _ in range(settings.num_generations)],
                sampling, self.folder / f"{number + 1}.answers.jsonl",
                seed=self.config.seed + number, should_stop=self.flag, desc=f"round {number + 1}",
            )  # fmt: skip
        finally:
            model.train(training)
        scores = self.scores(rows, answers)
        pairs = []
        for i, row in enumerate(rows):
            place = slice(i * settings.num_generations, (i + 1) * settings.num_generations)
            own = list(zip(scores[place], (a["response"] for a in answers[place]), strict=True))
            (high, best), (low, worst) = max(own, key=_score), min(own, key=_score)
            pairs.append(
                {"id": row["id"], "chosen": best, "rejected": worst, "scores": [high, low]}
            )
        if not any(p["chosen"] != p["rejected"] for p in pairs):
            raise InputError(
                f"round {number + 1}: for every prompt, all responses have the same score, so "
                "there is nothing to learn; raise online_dpo.temperature or "
                "online_dpo.num_generations, or check the reward model"
            )
        write_jsonl(path, pairs)
        return pairs

    def scores(self, rows: list[dict], answers: list[dict]) -> list[float]:
        """Score responses as the reward model was trained: with the template and an end token.

        Args:
            rows: The round's rows.
            answers: Records of the responses, several for each row.

        Raises:
            NonFiniteError: A score is NaN or infinite.
        """
        times = self.config.online_dpo.num_generations
        images = [image for image in decode_images(rows) for _ in range(times)]
        asked = [row for row in rows for _ in range(times)]
        ids = [
            completion_ids(self.processor, r["prompt"], a["response"], image=len(image))
            for r, a, image in zip(asked, answers, images, strict=True)
        ]
        questions = [row["prompt"] for row in asked]
        found = self.reward.scores([row["id"] for row in asked], questions, images, ids)
        bad = [r["id"] for r, s in zip(asked, found.isfinite().tolist(), strict=True) if not s]
        if bad:
            raise NonFiniteError(
                f"the reward model's score is not finite on rows {', '.join(bad[:10])}; {REMEDY}"
            )
        cut = torch.tensor([not answer["finished"] for answer in answers])
        found = found - self.config.online_dpo.missing_eos_penalty * cut
        return [round(score, 6) for score in found.tolist()]


def _score(pair: tuple[float, str]) -> float:
    return pair[0]


def pairs_of(rows: list[dict], ranked: list[dict]) -> list[dict]:
    """Preference rows with the policy's own responses.

    Two equal responses stay a pair: their loss has no gradient.
    """
    return [
        row | {"chosen": pair["chosen"], "rejected": pair["rejected"]}
        for row, pair in zip(rows, ranked, strict=True)
    ]


@stage_maker("online_dpo", inputs=policy_inputs, polls_stop=True)
def train_online_dpo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train in rounds, evaluate on the held-out pairs, and save the policy with its model card.

    Args:
        config: Uses `data`, `model`, `dpo`, `online_dpo` and `seed`.
        stage: See `train_reward`.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary. Its `rounds` has the mean score of all best and all worst responses,
        and the number of pairs of two different responses.

    Raises:
        SpavlError: For the reasons that `train_ppo` lists.
    """
    folder = reward_folder(config.online_dpo.reward_model, stage)
    check_reward_model(config.model, folder)
    if config.data.group_by_image:
        raise InputError("data.group_by_image has no effect on online DPO; set it to false")
    settings = dataclasses.replace(
        config.dpo, max_steps=0, num_epochs=config.online_dpo.rounds, cache_reference=False
    )
    config = dataclasses.replace(config, dpo=settings)
    quiet_libraries()
    processor = load_processor(config.model)
    rows, held_out = load_rows(config, stage, processor, "train", "validation")
    trainer = build_trainer(config, stage, processor, rows, held_out)
    parts = assert_freeze_plan(trainer.model, config.model)
    ckpt.check_room(trainer.checkpoints, trainer.model)
    probe_reference(trainer, processor, rows)
    reward = RewardFunction(
        build_scorer(trainer.model, config, folder), processor,
        batch_size=2 * settings.per_device_batch_size, missing_eos_penalty=0.0,
    )  # fmt: skip
    rounds = Rounds(trainer, config, stage, processor, rows, reward, flag)
    trainer.train_dataset = RoundRows(rounds.rows_of(0))
    trainer.add_callback(rounds)
    trainer.report_to_stage(
        stage, flag, logged=LOGGED, live=live,
        check_first=check_reference if config.dpo.with_reference else None,
    )  # fmt: skip
    trainer.train_from(ckpt.newest_checkpoint(trainer.checkpoints))
    summary = summary_of(trainer, LOGGED) | {
        "global_batch_size": config.dpo.global_batch_size,
        "prompts": len(rows), "validation_rows": len(held_out), "trainable_parameters": parts,
        "rounds": [
            _facts(read_jsonl(rounds.folder / f"{number + 1}.jsonl"))
            for number in range(config.online_dpo.rounds)
        ],
    }  # fmt: skip
    save_trained(trainer.model, processor, stage, config, _card(config, summary))
    return summary


def _facts(pairs: list[dict]) -> dict:
    high, low = zip(*(pair["scores"] for pair in pairs), strict=True)
    return {
        "best": round(sum(high) / len(pairs), 4),
        "worst": round(sum(low) / len(pairs), 4),
        "pairs": sum(pair["chosen"] != pair["rejected"] for pair in pairs),
    }


def _card(config: Config, summary: dict) -> str:
    online, dpo = config.online_dpo, config.dpo
    return model_card(
        config, "online_dpo", tags=("trl", "dpo"), source="prompts of ", table="held-out pairs",
        facts=[
            f"{online.rounds} rounds",
            f"{online.num_generations} responses for each prompt",
            f"{summary['steps']} steps of {summary['global_batch_size']}",
            f"losses {list(dpo.loss_type)} weighted {list(dpo.loss_weights)}",
            f"beta {dpo.beta}",
            f"peak rate {dpo.learning_rate}",
        ],
        results=summary["validation"],
    )  # fmt: skip
