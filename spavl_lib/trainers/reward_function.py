"""Our reward model as the reward function of trl's trainers.

It scores sampled ids over the pixels and the prompt it was trained on, never decoded texts: the
same template, BOS and EOS, and the score is read at an answer's true last token, as in PPO.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl.trainer.utils import use_adapter

from spavl_lib.config import Config
from spavl_lib.errors import InputError, NonFiniteError
from spavl_lib.modelling.heads import (
    ScalarHeadModel,
    check_reward_model,
    load_head,
    load_reward_model,
)
from spavl_lib.modelling.load import compute_dtype
from spavl_lib.modelling.roles import load_reward_adapter
from spavl_lib.runs.files import append_jsonl
from spavl_lib.trainers.rollout import Prompt, batch_of, encode_rows


class RewardFunction:
    """Our reward model as trl calls it: the ids and pixels it was trained on, not texts.

    Args:
        score: A left-padded batch -> score of each row (rows,), read at its last real token.
        processor: Of model and reward model.
        batch_size: Answers scored at once.
        missing_eos_penalty: Taken from an answer that did not end.
        log: JSONL file of rollouts, one line an answer.
    """

    __name__ = "reward_model"

    def __init__(
        self,
        score: Callable[[dict[str, Tensor]], Tensor],
        processor: ProcessorMixin,
        *,
        batch_size: int,
        missing_eos_penalty: float,
        log: Path | None = None,
    ):
        self.score, self.processor, self.batch_size = score, processor, batch_size
        self.missing_eos_penalty, self.log = missing_eos_penalty, log

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        *,
        id: list[str],  # noqa: A002 - trl hands over columns by their names
        question: list[str],
        image: list[Any],
        trainer_state: Any = None,
        **_: Any,
    ) -> list[float]:
        """Score of each answer, less the penalty of one that did not end.

        Args:
            prompts: Conversations; the questions say it all.
            completions: Answers as trl decodes them; the ids say it all.
            completion_ids: Sampled ids, EOS included where it was said.
            id: Of each row.
            question: Of each row.
            image: Of each row.
            trainer_state: For the log.

        Raises:
            InputError: Every answer is empty.
            NonFiniteError: A score is no number; trl would leave its answer out without a word.
        """
        tokenizer = self.processor.tokenizer
        texts = [tokenizer.decode(c, skip_special_tokens=True).strip() for c in completion_ids]
        if not any(texts):
            raise InputError(
                f"every answer is empty (rows {id[0]}, ...): the policy has collapsed; lower "
                "rloo.learning_rate or raise rloo.beta, and start from an earlier checkpoint"
            )
        scores = self.scores(id, question, image, completion_ids)
        bad = [i for i, s in zip(id, scores.tolist(), strict=True) if not abs(s) < float("inf")]
        if bad:
            raise NonFiniteError(
                f"the reward model's score is not finite on rows {', '.join(bad[:10])}; nothing "
                "was updated, the last checkpoint stands"
            )
        finished = [c[-1:] == [tokenizer.eos_token_id] for c in completion_ids]
        rewards = scores - self.missing_eos_penalty * ~torch.tensor(finished)
        if self.log and trainer_state is not None:
            append_jsonl(
                self.log,
                [
                    {
                        "step": trainer_state.global_step + 1,
                        "id": row_id,
                        "prompt": question[i],
                        "response": texts[i],
                        "reward": round(scores[i].item(), 6),
                        "num_tokens": len(completion_ids[i]),
                        "finished": finished[i],
                    }
                    for i, row_id in enumerate(id)
                ],
            )
        return rewards.tolist()

    def scores(
        self, ids: list[str], questions: list[str], images: list[Any], answers: list[list[int]]
    ) -> Tensor:
        """Scores (rows,) of sampled ids, each prompt encoded once."""
        encoded: dict[str, Prompt] = {}
        for row_id, question, image in zip(ids, questions, images, strict=True):
            if row_id not in encoded:
                row = {"id": row_id, "prompt": question, "image": image}
                [encoded[row_id]] = encode_rows(self.processor, [row])
        lengths = [len(encoded[i].ids) + len(a) for i, a in zip(ids, answers, strict=True)]
        order = sorted(range(len(ids)), key=lambda n: (-lengths[n], n))
        pad, scores = self.processor.tokenizer.pad_token_id, torch.zeros(len(ids))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = batch_of(
                [encoded[ids[n]] for n in rows], [answers[n] for n in rows], pad,
                torch.device("cpu"),
            )  # fmt: skip
            scores[rows] = self.score(batch).float().cpu()
        return scores


class Scorer:
    """A reward model's forward, beside the policy or on its own base.

    Args:
        model: The reward model.
        adapter: Its adapter's name where it lives on the policy's base.
    """

    def __init__(self, model: ScalarHeadModel, adapter: str = ""):
        self.model, self.adapter = model, adapter

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores (rows,) of a padded batch."""
        vlm, dtype = self.model.vlm, compute_dtype()
        training, batch = vlm.training, {k: v.to(self.model.device) for k, v in batch.items()}
        vlm.eval()
        half = dtype != torch.float32
        try:
            with torch.autocast(self.model.device.type, dtype=dtype, enabled=half):
                if not self.adapter:
                    return self.model(**batch)
                with use_adapter(vlm, self.adapter):
                    return self.model(**batch)
        finally:
            vlm.train(training)
            for name, parameter in vlm.named_parameters():
                if self.adapter and f".{self.adapter}." in name:  # switching makes it trainable
                    parameter.requires_grad_(False)


def build_scorer(policy: nn.Module, config: Config, folder: Path) -> Scorer:
    """The reward model: an adapter and a head more on the policy's base, or a model of its own.

    Raises:
        InputError: It was trained on another base, or does not fit.
    """
    check_reward_model(config.model, folder)
    if not config.model.with_lora:
        return Scorer(load_reward_model(config.model, folder))
    load_reward_adapter(policy, folder, "reward")
    model = ScalarHeadModel(policy)
    model.score = load_head(folder, model.score.in_features).to(next(policy.parameters()).device)
    return Scorer(model, "reward")
