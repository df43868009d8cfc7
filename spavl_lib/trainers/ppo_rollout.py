"""The four models of PPO, and the rollouts that they produce.

A rollout is made in three passes. First, the policy samples responses. Second, policy, reference,
value and reward model compute log-probabilities, values and scores of the responses. Third, rewards
and advantages are computed from these numbers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import ProcessorMixin, set_seed

from spavl_lib.config import Config
from spavl_lib.data.templates import end_ids
from spavl_lib.distributed import group
from spavl_lib.errors import InputError
from spavl_lib.modelling.blank_image import run_tower_always
from spavl_lib.modelling.load import autocast, compute_dtype, device, load_processor
from spavl_lib.modelling.roles import ROLES, Roles, load_roles
from spavl_lib.modelling.speed.side_by_side import SideBySide
from spavl_lib.modelling.speed.tower_cache import TowerCache
from spavl_lib.objectives.lagrangian import LagrangeMultiplier
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

# Columns of the rollout that each role's forward pass fills. The reward model fills no column of
# this kind, because scores and costs have one value for each row, and not one for each token.
COLUMNS = {
    "policy": ("logps", "entropy"),
    "reference": ("ref_logps",),
    "value": ("values",),
    "reward": (),
}


class RolloutMaker:
    """The models of a PPO run, and the method `roll_out`, which makes the rollout of a step.

    Args:
        config: Config of the run.
        rows: Training rows, which provide the prompts.
        folder: Folder of the reward model: the `model/` that the reward trainer wrote.
    """

    def __init__(self, config: Config, rows: Dataset, folder: Path):
        self.config, self.settings, self.rows = config, config.ppo, rows
        self.processor: ProcessorMixin = load_processor(config.model)
        self.pad_id = self.processor.tokenizer.pad_token_id
        set_seed(config.seed)
        model, engine = config.model, config.launch.engine
        if engine == "zero3":
            # ZeRO-3 needs all processes to call the same layers together. With prefix sharing,
            # which layers a process calls depends on its own batch, so processes could differ.
            if model.share_prefix == "require":
                raise InputError(
                    "model.share_prefix = require does not work for PPO under zero3; set it to "
                    "auto, or launch.engine to zero2"
                )
            model = dataclasses.replace(model, share_prefix="off")
        forbidden = forbidden_token_ids(self.processor)
        limit = self.settings.cost_limit
        self.model: Roles = load_roles(
            model, folder, forbidden, masters=engine == "ddp", with_cost=limit is not None
        )
        if engine == "zero3":
            for vlm in {id(v): v for v in map(self.model.vlm_of, ROLES)}.values():
                run_tower_always(vlm, self.processor)
        self.end_ids = end_ids(self.processor, self.model.vlm_of("policy"))
        if config.model.gradient_checkpointing:
            for role in ("policy", "value"):
                vlm = self.model.vlm_of(role)
                vlm.gradient_checkpointing_enable({"use_reentrant": False})
        self.kl = KLController(
            self.settings.kl_coef, target=self.settings.kl_target, horizon=self.settings.kl_horizon
        )
        self.multiplier: LagrangeMultiplier | None = None
        if limit is not None:
            self.multiplier = LagrangeMultiplier(
                self.settings.lagrange_initial, limit=limit,
                learning_rate=self.settings.lagrange_learning_rate,
            )  # fmt: skip
        self.dtype = compute_dtype()
        self.lockstep = False
        self.side_by_side = SideBySide(self.model.apart and engine == "ddp")

    def prompts_of(self, step: int) -> list[int]:
        """Return the indices of the training rows that step `step` (from 0) rolls out."""
        return ppo_batches.rollout_rows(
            self.rows["image_name"], step, self.settings.rollout_batch_size, self.config.seed,
            by_image=self.config.data.group_by_image,
        )  # fmt: skip

    def tower_cache(self) -> TowerCache:
        """Build a new cache of the vision towers' outputs."""
        cache = TowerCache(self.model.vlm_of("policy"), self.model.towers())
        # Under ZeRO-3 all processes must call the tower together. With a cache, each process would
        # call the tower only for images that are not in its cache yet, so the calls would differ.
        cache.works = cache.works and not self.lockstep
        return cache

    @torch.no_grad()
    def roll_out(self, step: int, cache: TowerCache) -> Rollout:
        """Sample responses to a step's prompts, and compute the columns that the updates need.

        Args:
            step: Number of the step, from 0.
            cache: A `tower_cache()`, inside its `rollout()` context.

        Raises:
            InputError: Every response is empty.
            NonFiniteError: A log-probability, value or score is NaN or infinite.
        """
        self.model.eval()
        prompts = encode_rows(self.processor, [self.rows[i] for i in self.prompts_of(step)])
        responses = self._sample(prompts, step, cache)
        finished = [response[-1] in self.end_ids for response in responses]
        decode = self.processor.tokenizer.decode
        texts = [decode(response, skip_special_tokens=True).strip() for response in responses]
        rollout = Rollout(prompts, responses, texts, finished)
        # `_measure` runs before the check for empty responses. NaN weights also cause empty
        # responses, and then the error of `_measure`, which reports the NaN, is the right one.
        self._measure(rollout, step, cache)
        if not any(texts):
            raise InputError(
                f"step {step + 1}: every response is empty (rows {prompts[0].row_id}, ...): the "
                "policy has collapsed; lower ppo.learning_rate or raise ppo.kl_coef, and start "
                "from an earlier checkpoint"
            )
        add_advantages(rollout, self.settings, self.kl.kl_coef, self.multiplier)
        return rollout

    def _sample(self, prompts: list[Prompt], step: int, cache: TowerCache) -> list[list[int]]:
        """Sample a response to every prompt. The prompts are divided among the processes.

        Args:
            prompts: Encoded prompts of the rollout.
            step: Number of the step, from 0. The seeds depend on it.
            cache: The rollout's cache.

        Returns:
            Token ids of every response, in the order of the prompts. Every process gets all
            responses.
        """
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
                        forbidden_ids=self.model.forbidden_ids, end_ids=self.end_ids,
                        pad_id=self.pad_id,
                        compact=self.config.generation.cache == "compact",
                    )  # fmt: skip
            sampled += zip(rows, answers, strict=True)
        for row, answer in itertools.chain(*group.gathered(sampled)):
            responses[row] = answer
        return responses

    def _measure(self, rollout: Rollout, step: int, cache: TowerCache) -> None:
        """Add log-probabilities, entropies, values, scores and costs to a rollout."""
        shape = (len(rollout), rollout.width)
        columns = {name: torch.zeros(shape) for names in COLUMNS.values() for name in names}
        names = ("scores", "costs") if self.multiplier else ("scores",)
        of_rows = {name: torch.zeros(len(rollout)) for name in names}
        batches = self._micro_batches(rollout.prompts, rollout.responses)
        for rows in ppo_batches.own_batches(batches):
            self._stop_if_asked()
            if not rows:
                continue
            batch = self._batch(rollout.prompts, rollout.responses, rows)
            first, second = self.side_by_side(
                *(
                    functools.partial(self._measure_rows, rollout, rows, batch, cache, roles)
                    for roles in (("policy", "reference"), ("value", "reward"))
                )
            )
            for role, outputs in (first | second).items():
                if role == "reward":
                    for name, value in zip(names, outputs, strict=True):
                        of_rows[name][rows] = value.float().cpu()
                for name, value in zip(COLUMNS[role], outputs, strict=False):
                    columns[name][rows, : value.shape[1]] = value.float().cpu()
        mask = rollout.mask
        # One process has filled each row, and the row is zero in all others. The sum over processes
        # therefore equals the filled row.
        columns = {name: group.sum_of(values) * mask for name, values in columns.items()}
        rollout.columns = columns | {n: group.sum_of(values) for n, values in of_rows.items()}
        check_finite(rollout, step + 1)

    @torch.no_grad()
    def _measure_rows(
        self,
        rollout: Rollout,
        rows: list[int],
        batch: dict[str, Tensor],
        cache: TowerCache,
        roles: tuple[str, ...],
    ) -> dict[str, tuple[Tensor, ...]]:
        """Outputs of some roles for the rows of a micro-batch; arguments as in `_forward`."""
        return {
            role: self._forward(self.model, role, rollout, rows, batch, cache) for role in roles
        }

    def _micro_batches(self, prompts: list[Prompt], responses: list[list[int]]) -> list[list[int]]:
        """Divide rows into micro-batches."""
        lengths = [len(p.ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        images = [prompt.image_digest for prompt in prompts]
        return ppo_batches.micro_batches(lengths, images, self.settings.per_device_batch_size)

    def _batch(
        self, prompts: list[Prompt], responses: list[list[int]], rows: list[int]
    ) -> dict[str, Tensor]:
        """Build the padded batch of some rows, on the device."""
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
        """Run `Roles.forward` on some rows.

        Args:
            model: The `Roles`, or the engine that wraps it.
            role: Role to compute.
            rollout: The rollout.
            rows: Rows of a micro-batch.
            batch: The padded batch of these rows.
            cache: The rollout's cache.
            options: Further arguments of `Roles.forward`.
        """
        width = max(len(rollout.responses[i]) for i in rows)
        temperature = self.settings.temperature
        with cache.rows(_images(rollout.prompts, rows), batch):
            return model(role, width=width, temperature=temperature, **options, **batch)

    def _stop_if_asked(self) -> None:
        """Do nothing. `PPOTrainer` overrides this method to stop the run if the stop flag is set.

        `RolloutMaker` calls this method before every micro-batch of a rollout.
        """


def _images(prompts: list[Prompt], rows: list[int]) -> list[str]:
    """Return a key for each image of some rows. Without keys the tower cache lets a batch pass."""
    if any(prompts[i].image_digest and not prompts[i].image_keys for i in rows):
        return []
    return [key for i in rows for key in prompts[i].image_keys]
