"""The trained reward model as a reward function of trl's trainers.

The reward model scores the sampled token ids, not decoded texts. Image, template, BOS and EOS are
the same as in the reward model's training. The score is read at the response's last token, as in
PPO.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl.trainer.utils import use_adapter

from spavl_lib.config import Config
from spavl_lib.data.schema import MORE
from spavl_lib.data.templates import end_ids
from spavl_lib.modelling.heads import (
    ScalarHeadModel,
    check_reward_model,
    load_head,
    load_reward_model,
)
from spavl_lib.modelling.roles import load_reward_adapter
from spavl_lib.trainers.rollout import Prompt, batch_of, encode_rows


class RewardFunction:
    """The reward model, callable with the arguments that trl passes.

    Args:
        score: Function from a padded batch to the score of each row (rows,), read at the row's last
            token that is not padding.
        processor: Processor of policy and reward model.
        batch_size: Number of responses scored at once.
        missing_eos_penalty: Subtracted from the score of a response without an end token.
    """

    __name__ = "model"

    def __init__(
        self,
        score: Callable[[dict[str, Tensor]], Tensor],
        processor: ProcessorMixin,
        *,
        batch_size: int,
        missing_eos_penalty: float,
    ):
        self.score, self.processor, self.batch_size = score, processor, batch_size
        self.missing_eos_penalty = missing_eos_penalty
        self.end_ids: Sequence[int] = end_ids(processor)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        *,
        id: list[str],  # noqa: A002 - trl passes columns by their names
        question: list[str],
        image: list[Any],
        **_: Any,
    ) -> list[float]:
        """Score every response.

        Args:
            prompts: Conversations, not used; `question` has the original text.
            completions: Decoded responses, not used, because decoding can lose information.
            completion_ids: Sampled token ids of each response. They include an end token if one was
                sampled.
            id: Row id of each response.
            question: Question of each response.
            image: Image of each response.

        Returns:
            Score of each response. A response without an end token gets its score minus the
            penalty.
        """
        scores = self.scores(id, question, image, completion_ids)
        finished = [bool(c) and c[-1] in self.end_ids for c in completion_ids]
        return (scores - self.missing_eos_penalty * ~torch.tensor(finished)).tolist()

    def scores(
        self, ids: list[str], questions: list[str], images: list[Any], answers: list[list[int]]
    ) -> Tensor:
        """Score sampled token ids. A prompt with several responses is encoded once.

        Args:
            ids: Row id of each response.
            questions: Prompt text of each response.
            images: Image of each response, or list of its images.
            answers: Token ids of each response.

        Returns:
            Scores (rows,), fp32, on the CPU.
        """
        encoded: dict[str, Prompt] = {}
        for row_id, question, image in zip(ids, questions, images, strict=True):
            if row_id not in encoded:
                cells = image if isinstance(image, list) else [image]
                first = cells[0] if cells else None
                row = {"id": row_id, "prompt": question, "image": first, MORE: cells[1:]}
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
    """The forward pass of a reward model, which has its own base or shares the policy's base.

    Args:
        model: The reward model.
        adapter: Name of the reward model's adapter on the policy's base. Empty if the reward model
            has a separate base.
    """

    def __init__(self, model: ScalarHeadModel, adapter: str = ""):
        self.model, self.adapter = model, adapter

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Score each row of a padded batch (rows, seq). Returns (rows,)."""
        vlm = self.model.vlm
        training, batch = vlm.training, {k: v.to(self.model.device) for k, v in batch.items()}
        vlm.eval()
        try:
            if not self.adapter:
                return self.model(**batch)
            with use_adapter(vlm, self.adapter):
                return self.model(**batch)
        finally:
            vlm.train(training)
            for name, parameter in vlm.named_parameters():
                # Switching to the adapter made its parameters trainable.
                if self.adapter and f".{self.adapter}." in name:
                    parameter.requires_grad_(False)


def build_scorer(policy: nn.Module, config: Config, folder: Path) -> Scorer:
    """Load the reward model: with LoRA as an adapter on the policy's base, else as a second model.

    Args:
        policy: The policy that is trained. With LoRA it is changed in place.
        config: Config of the run.
        folder: Folder of the reward model: the `model/` that the reward trainer wrote.

    Raises:
        InputError: The reward model is missing, has another base model, or has weights that do not
            fit the base.
    """
    check_reward_model(config.model, folder)
    if not config.model.with_lora:
        return Scorer(load_reward_model(config.model, folder))
    load_reward_adapter(policy, folder, "reward")
    model = ScalarHeadModel(policy)
    model.score = load_head(folder, model.score.in_features).to(next(policy.parameters()).device)
    return Scorer(model, "reward")
