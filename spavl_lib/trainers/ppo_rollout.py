"""The four models of PPO, and the rollouts that they give.

A rollout is made in three passes: the policy samples answers; policy, reference, value and reward
model measure them; scores and KL penalty become rewards and advantages.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import ProcessorMixin, set_seed

from spavl_lib.config import Config
from spavl_lib.data.lengths import check_prompt_lengths
from spavl_lib.distributed import group
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import autocast, compute_dtype, device, load_processor
from spavl_lib.modelling.roles import Roles, load_roles
from spavl_lib.modelling.speed.tower_cache import TowerCache
from spavl_lib.objectives.ppo import KLController
from spavl_lib.trainers import ppo_batches
from spavl_lib.trainers.ppo_terms import add_advantages, check_finite
from spavl_lib.trainers.rollout import (
    Prompt,
    Rollout,
    batch_of,
    encode_rows,
    forbidden_token_ids,
    sample,
    seed_from,
)

# Columns that each role's forward pass fills; the reward model's scores have no columns.
COLUMNS = {
    "policy": ("logps", "entropy"),
    "reference": ("ref_logps",),
    "value": ("values",),
    "reward": (),
}


class RolloutMaker:
    """Loads the models, and rolls them out on the prompts of a step.

    Args:
        config: Config of the run.
        rows: Training rows; their prompts are rolled out.
        folder: Reward model, a reward trainer's `model/`.
    """

    def __init__(self, config: Config, rows: Dataset, folder: Path):
        self.config, self.settings, self.rows = config, config.ppo, rows
        self.processor: ProcessorMixin = load_processor(config.model)
        tokenizer = self.processor.tokenizer
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        set_seed(config.seed)
        model, engine = config.model, config.launch.engine
        if engine == "zero3":
            # ZeRO-3 gathers a layer when all processes call it together. A shared prefix changes
            # which layers are called, and each process decides that by its own batch.
            if model.share_prefix == "require":
                raise InputError(
                    "model.share_prefix = require does not work for PPO under zero3; set it to "
                    "auto, or launch.engine to zero2"
                )
            model = dataclasses.replace(model, share_prefix="off")
        forbidden = forbidden_token_ids(self.processor)
        self.model: Roles = load_roles(model, folder, forbidden, masters=engine == "ddp")
        if config.model.gradient_checkpointing:
            for role in ("policy", "value"):
                vlm = self.model.vlm_of(role)
                vlm.gradient_checkpointing_enable({"use_reentrant": False})
        self.kl = KLController(
            self.settings.kl_coef, target=self.settings.kl_target, horizon=self.settings.kl_horizon
        )
        self.dtype = compute_dtype()
        self.lockstep = False

    def check_prompts(self) -> None:
        """Raise if a prompt leaves no room for an answer in the model's context.

        Raises:
            InputError: Lists the prompts.
        """
        text = self.model.vlm_of("policy").config.get_text_config()
        context = getattr(text, "max_position_embeddings", 0)
        room = self.settings.max_new_tokens
        check_prompt_lengths(self.processor, self.rows, room, context, stage="ppo")

    def prompts_of(self, step: int) -> list[int]:
        """Indices of the training rows whose prompts step `step` (from 0) rolls out."""
        return ppo_batches.rollout_rows(
            self.rows["image_name"], step, self.settings.rollout_batch_size, self.config.seed,
            by_image=self.config.data.group_by_image,
        )  # fmt: skip

    def tower_cache(self) -> TowerCache:
        """A new cache for the output of every vision tower."""
        cache = TowerCache(self.model.vlm_of("policy"), self.model.towers())
        # Under ZeRO-3 all processes must call the tower together, but they miss at other times.
        cache.works = cache.works and not self.lockstep
        return cache

    @torch.no_grad()
    def roll_out(self, step: int, cache: TowerCache) -> Rollout:
        """Sample answers to a step's prompts, and compute all that the updates need.

        Args:
            step: Number of the step, from 0.
            cache: `tower_cache()`, inside its `rollout()` block.

        Raises:
            InputError: Every answer is empty.
            NonFiniteError: A log-probability, value or score is NaN or infinite.
        """
        self.model.eval()
        prompts = encode_rows(self.processor, [self.rows[i] for i in self.prompts_of(step)])
        responses = self._sample(prompts, step, cache)
        finished = [response[-1:] == [self.eos_id] for response in responses]
        decode = self.processor.tokenizer.decode
        texts = [decode(response, skip_special_tokens=True).strip() for response in responses]
        rollout = Rollout(prompts, responses, texts, finished)
        self._measure(rollout, step, cache)  # before the next check: NaN weights give empty answers
        if not any(texts):
            raise InputError(
                f"step {step + 1}: every answer is empty (rows {prompts[0].row_id}, ...): the "
                "policy has collapsed; lower ppo.learning_rate or raise ppo.kl_coef, and start "
                "from an earlier checkpoint"
            )
        add_advantages(rollout, self.settings, self.kl.kl_coef)
        return rollout

    def _sample(self, prompts: list[Prompt], step: int, cache: TowerCache) -> list[list[int]]:
        """Token ids of an answer to every prompt; the processes share the prompts out."""
        settings = self.settings
        seeds = [seed_from(self.config.seed, "answer", step, n) for n in range(len(prompts))]
        responses: list[list[int]] = [[] for _ in prompts]
        sampled: list[tuple[int, list[int]]] = []
        for rows in ppo_batches.own_batches(self._micro_batches(prompts, responses)):
            self._stop_if_asked()
            if not rows:
                continue
            batch = self._batch(prompts, responses, rows)
            with self.model.as_role("policy"), cache.rows(_images(prompts, rows), batch):
                with autocast():
                    answers = sample(
                        self.model.vlm_of("policy"), batch, [seeds[i] for i in rows],
                        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                        forbidden_ids=self.model.forbidden_ids, eos_id=self.eos_id,
                        pad_id=self.pad_id,
                        compact=self.config.generation.cache == "compact",
                    )  # fmt: skip
            sampled += zip(rows, answers, strict=True)
        for row, answer in itertools.chain(*group.gathered(sampled)):
            responses[row] = answer
        return responses

    def _measure(self, rollout: Rollout, step: int, cache: TowerCache) -> None:
        """Add log-probabilities, entropies, values and scores to a rollout."""
        shape = (len(rollout), rollout.width)
        columns = {name: torch.zeros(shape) for names in COLUMNS.values() for name in names}
        scores = torch.zeros(len(rollout))
        batches = self._micro_batches(rollout.prompts, rollout.responses)
        for rows in ppo_batches.own_batches(batches):
            self._stop_if_asked()
            if not rows:
                continue
            batch = self._batch(rollout.prompts, rollout.responses, rows)
            for role, names in COLUMNS.items():
                outputs = self._forward(self.model, role, rollout, rows, batch, cache)
                if role == "reward":
                    scores[rows] = outputs[0].float().cpu()
                for name, value in zip(names, outputs, strict=False):
                    columns[name][rows, : value.shape[1]] = value.float().cpu()
        mask = rollout.mask
        # One process fills a row; in the others it is zero.
        columns = {name: group.sum_of(values) * mask for name, values in columns.items()}
        rollout.columns = columns | {"scores": group.sum_of(scores)}
        check_finite(rollout, step + 1)

    def _micro_batches(self, prompts: list[Prompt], responses: list[list[int]]) -> list[list[int]]:
        """Divide rows into batches that fit the device."""
        lengths = [len(p.ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        images = [prompt.image_digest for prompt in prompts]
        return ppo_batches.micro_batches(lengths, images, self.settings.per_device_batch_size)

    def _batch(
        self, prompts: list[Prompt], responses: list[list[int]], rows: list[int]
    ) -> dict[str, Tensor]:
        """The padded tensors of some rows, on the device."""
        return batch_of(
            [prompts[i] for i in rows], [responses[i] for i in rows], self.pad_id, device()
        )

    def _forward(
        self,
        model: Callable[..., tuple[Tensor, ...]],
        role: str,
        rollout: Rollout,
        rows: list[int],
        batch: dict[str, Tensor],
        cache: TowerCache,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """The outputs of `Roles.forward` for some rows, through the model or through an engine."""
        width = max(len(rollout.responses[i]) for i in rows)
        temperature = self.settings.temperature
        with cache.rows(_images(rollout.prompts, rows), batch):
            return model(role, width=width, temperature=temperature, **options, **batch)

    def _stop_if_asked(self) -> None:
        """Called before every batch of a rollout."""


def _images(prompts: list[Prompt], rows: list[int]) -> list[str]:
    """Digests of the images of those rows that have one."""
    return [prompts[i].image_digest for i in rows if prompts[i].image_digest]
