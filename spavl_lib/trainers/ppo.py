"""PPO of a vision-language model against a reward model: config in, stage folder out.

    spavl train ppo --profile demo

A step is one rollout and its updates: sample answers, score them, price their distance from the
reference, estimate advantages, and take `ppo_epochs * num_minibatches` optimizer steps, each one
step for policy and value model together. trl has had no PPO since 1.13, and never one for images.
"""

import dataclasses
import itertools
import json
import math
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProcessorMixin, get_scheduler, set_seed

from spavl_lib import machine
from spavl_lib.config import Config
from spavl_lib.data.grouping import image_groups
from spavl_lib.data.lengths import check_prompt_lengths
from spavl_lib.data.load import load_preferences
from spavl_lib.data.templates import completion_ids
from spavl_lib.distributed import group, zero_parameters
from spavl_lib.errors import InputError, NonFiniteError, Preempted
from spavl_lib.machine import peak_memory_gib
from spavl_lib.modelling.load import (
    autocast,
    compute_dtype,
    device,
    load_processor,
    quiet_libraries,
)
from spavl_lib.modelling.roles import Roles, load_roles
from spavl_lib.modelling.speed.tower_cache import TowerCache
from spavl_lib.objectives.ppo import (
    KLController,
    approx_kl,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_estimate,
    kl_penalty_rewards,
    masked_mean,
    masked_whiten,
)
from spavl_lib.runs.files import read_jsonl, write_text
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers import exact_trainer as checkpointed
from spavl_lib.trainers.dpo import save_trained
from spavl_lib.trainers.engines import build_engine
from spavl_lib.trainers.exact_trainer import number
from spavl_lib.trainers.guards import Movement, gate_loss, gate_weights
from spavl_lib.trainers.inputs import note_rows, policy_inputs, reward_folder
from spavl_lib.trainers.probe import check_reference_unmoved, reference_probe
from spavl_lib.trainers.rollout import (
    Prompt,
    Rollout,
    batch_of,
    encode_rows,
    never_said,
    row_seed,
    sample,
    together,
)


@stage_maker("ppo", inputs=policy_inputs, polls_stop=True)
def train_ppo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train against this run's reward model (or `ppo.reward_model`), and save the policy.

    Args:
        config: Uses `data`, `model`, `ppo` and `seed`.
        stage: Where it goes; resumes from its newest whole checkpoint, bit for bit on a CPU.
        flag: Stop flag, set by a signal; polled between steps. `@stage_maker` passes it.
        live: Something with `update(rows)`.

    Returns:
        The stage's summary.

    Raises:
        InputError: Bad data, model, reward model or settings.
        NonFiniteError: A score, loss or gradient is no number.
        Preempted: Asked to stop; the same call goes on.
    """
    folder = reward_folder(config.ppo.reward_model, stage)
    quiet_libraries()
    with group.main_first():
        rows = load_preferences(config.data, "train")
    note_rows(stage, train=rows)
    trainer = PPOTrainer(config, stage, rows, folder, flag)
    trainer.check()
    trainer.train(live)
    summary = trainer.summary()
    policy = trainer.model.vlm_of("policy")
    save_trained(policy, trainer.processor, stage, config, _card(config, summary))
    return summary


class PPOTrainer:
    """The loop, its models, and what a checkpoint holds."""

    def __init__(
        self, config: Config, stage: Stage, rows: Dataset, folder: Path, flag: StopFlag | bool
    ):
        self.config, self.settings, self.stage = config, config.ppo, stage
        self.rows, self.flag = rows, flag
        self.processor: ProcessorMixin = load_processor(config.model)
        tokenizer = self.processor.tokenizer
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        set_seed(config.seed)
        model = config.model
        if config.launch.engine == "zero3":
            # Whether rows share a beginning is each batch's own; pieces come only to all at once.
            if model.share_prefix == "require":
                raise InputError("model.share_prefix = require: PPO under zero3 cannot; use zero2")
            model = dataclasses.replace(model, share_prefix="off")
        never, masters = never_said(self.processor), config.launch.engine == "ddp"
        self.model: Roles = load_roles(model, folder, never, masters=masters)
        if config.model.gradient_checkpointing:
            for role in ("policy", "value"):
                vlm = self.model.vlm_of(role)
                vlm.gradient_checkpointing_enable({"use_reentrant": False})
        groups = {role: self.model.trainable_of(role) for role in ("policy", "value")}
        rates = {"policy": self.settings.learning_rate}
        rates["value"] = self.settings.value_learning_rate or self.settings.learning_rate
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[role], "lr": rates[role]} for role in groups],
            weight_decay=self.settings.weight_decay,
        )
        self.engine = build_engine(self.model, groups, self.optimizer, config.launch)
        self.scheduler = get_scheduler(
            self.settings.lr_scheduler,
            self.optimizer,
            num_warmup_steps=self.settings.warmup_steps,
            num_training_steps=self.total_steps * self.updates_per_step,
        )
        self.kl = KLController(
            self.settings.kl_coef,
            target=self.settings.kl_target,
            horizon=self.settings.kl_horizon,
        )
        self.step, self.saved = 0, time.monotonic()
        self.reference: dict | None = None
        self.log_rows: list[dict] = []
        self.dtype = compute_dtype()

    # --- sizes --------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Rollouts of the whole run."""
        settings = self.settings
        passes = math.ceil(settings.num_epochs * len(self.rows) / settings.rollout_batch_size)
        return settings.max_steps or passes

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps a rollout."""
        return self.settings.ppo_epochs * self.settings.num_minibatches

    def prompts_of(self, step: int) -> list[int]:
        """Which rows step `step` (from 0) rolls out: seeded passes over all, none left out."""
        size, count = self.settings.rollout_batch_size, len(self.rows)
        places = [divmod(place, count) for place in range(step * size, (step + 1) * size)]
        orders = {epoch: self._order(epoch) for epoch, _ in places}
        return [orders[epoch][offset] for epoch, offset in places]

    def _order(self, epoch: int) -> list[int]:
        return _flat(self._shuffled(self.rows["image_name"], f"{self.config.seed}/prompts/{epoch}"))

    def _shuffled(self, pictures: list[str], seed: str | int) -> list[list[int]]:
        """Places in a seeded order, each alone; a picture's together with `data.group_by_image`."""
        grouped = self.config.data.group_by_image
        groups = image_groups(pictures if grouped else [""] * len(pictures))
        random.Random(seed).shuffle(groups)
        return groups

    # --- the run ------------------------------------------------------------------------------

    def check(self) -> None:
        """Before the first step.

        Raises:
            InputError: Lists the prompts that leave no room for an answer.
            DiskError: The checkpoints would not fit.
        """
        ckpt.check_room(self.stage.path / "checkpoints", self.model)
        text = self.model.vlm_of("policy").config.get_text_config()
        context = getattr(text, "max_position_embeddings", 0)
        room = self.settings.max_new_tokens
        check_prompt_lengths(self.processor, self.rows, room, context, stage="ppo")

    def train(self, live: Any = None) -> None:
        """All steps that are left."""
        vlm, as_reference = self.model.vlm_of("reference"), self.model.as_role("reference")
        with self.engine.whole():
            self.reference = reference_probe(
                vlm, self.processor, self.rows, as_reference=as_reference
            )
        self._resume()
        group.report("progress", {"step": self.step, "total": self.total_steps})
        movement = None if self.step else Movement(self.model)
        bar = tqdm(total=self.total_steps, initial=self.step, desc="ppo", unit="step")
        started = time.perf_counter() - (self.log_rows[-1]["time_s"] if self.log_rows else 0.0)
        with bar:
            while self.step < self.total_steps:
                self._stop_if_asked()
                with self.tower_cache().rollout() as cache:
                    with self.engine.whole():
                        rollout = self.roll_out(self.step, cache)
                    stats = self.update(rollout, cache)
                self.step += 1
                self._log(rollout, stats, started)
                if live:
                    live.update(self.log_rows)
                bar.update(1)
                bar.set_postfix(
                    score=f"{stats['objective/scores']:.2f}", kl=f"{stats['objective/kl']:.2f}"
                )
                if movement and self.step == min(3, self.total_steps):
                    if self.step == 3:
                        movement.check(self.model)
                    movement = None
                due = self.step % self.settings.save_steps == 0 or self.step == self.total_steps
                waited = time.monotonic() - self.saved > checkpointed.LONGEST_UNSAVED_S
                if group.any_of(due or waited):
                    self._save()
        if live and self.log_rows:
            live.update(self.log_rows, force=True)

    def tower_cache(self) -> TowerCache:
        """A fresh cache over every tower."""
        vlm = self.model.vlm_of("policy")
        cache = TowerCache(vlm, self.model.towers())
        # One process's hit is another's miss, and pieces of a tower come only to all at once.
        cache.works = cache.works and not self.engine.lockstep
        return cache

    # --- rollout ------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, step: int, cache: TowerCache) -> Rollout:
        """Sample answers to a step's prompts, and compute everything the updates rest on."""
        settings = self.settings
        self.model.eval()
        picked = [self.rows[i] for i in self.prompts_of(step)]
        prompts = encode_rows(self.processor, picked)
        seeds = [row_seed(self.config.seed, "answer", step, n) for n in range(len(prompts))]
        responses: list[list[int]] = [[] for _ in prompts]
        sampled: list[tuple[int, list[int]]] = []
        for rows in self._own(self._chunks(prompts, responses)):
            if not rows:
                continue
            batch = self._batch(prompts, responses, rows)
            with self.model.as_role("policy"), cache.rows(_pictures(prompts, rows), batch):
                with autocast():
                    said = sample(
                        self.model.vlm_of("policy"), batch, [seeds[i] for i in rows],
                        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                        forbidden_ids=self.model.forbidden_ids, eos_id=self.eos_id,
                        pad_id=self.pad_id,
                        compact=self.config.generation.cache == "compact",
                    )  # fmt: skip
            sampled += zip(rows, said, strict=True)
        for i, answer in itertools.chain(*group.gathered(sampled)):
            responses[i] = answer
        finished = [r[-1:] == [self.eos_id] for r in responses]
        decode = self.processor.tokenizer.decode
        texts = [decode(r, skip_special_tokens=True).strip() for r in responses]
        rollout = Rollout(prompts, responses, texts, finished)
        self._measure(rollout, cache)  # first: weights that are no numbers have nothing to say
        if not any(texts):
            raise InputError(
                f"step {step + 1}: every answer is empty (rows {prompts[0].row_id}, ...): the "
                "policy has collapsed; lower ppo.learning_rate or raise ppo.kl_coef, and start "
                "from an earlier checkpoint"
            )
        self._reward(rollout)
        return rollout

    def _measure(self, rollout: Rollout, cache: TowerCache) -> None:
        """Log-probabilities, values and scores under the four roles."""
        shape = (len(rollout), rollout.width)
        columns = {k: torch.zeros(shape) for k in ("logps", "ref_logps", "values", "entropy")}
        scores = torch.zeros(len(rollout))
        for rows in self._own(self._chunks(rollout.prompts, rollout.responses)):
            if not rows:
                continue
            batch = self._batch(rollout.prompts, rollout.responses, rows)
            for role, names in (
                ("policy", ("logps", "entropy")),
                ("reference", ("ref_logps",)),
                ("value", ("values",)),
                ("reward", ()),
            ):
                found = self._forward(role, rollout, rows, batch, cache)
                if role == "reward":
                    scores[rows] = found[0].float().cpu()
                for name, value in zip(names, found, strict=False):
                    columns[name][rows, : value.shape[1]] = value.float().cpu()
        mask = rollout.mask  # every row is filled by one process, and zero in the others
        columns = {k: group.sum_of(v) * mask for k, v in columns.items()}
        rollout.columns = columns | {"scores": group.sum_of(scores)}
        self._gate(rollout)

    def _gate(self, rollout: Rollout) -> None:
        """Nothing that is no number goes on."""
        for name, values in rollout.columns.items():
            bad = ~torch.isfinite(values).reshape(len(rollout), -1).all(1)
            if bad.any():
                ids = [rollout.prompts[i].row_id for i in bad.nonzero().flatten().tolist()]
                raise NonFiniteError(
                    f"step {self.step + 1}: {name} is not finite on rows {', '.join(ids[:10])}; "
                    "nothing was updated, the last checkpoint stands"
                )

    def _reward(self, rollout: Rollout) -> None:
        """Scores less penalties, KL in every token's reward, advantages and returns."""
        settings, columns, mask = self.settings, rollout.columns, rollout.mask
        lengths = mask.sum(1)
        finished = torch.tensor(rollout.finished)
        shaped = columns["scores"] - settings.length_penalty * lengths
        shaped = shaped - settings.missing_eos_penalty * ~finished
        rewards = kl_penalty_rewards(
            shaped, columns["logps"], columns["ref_logps"], mask,
            kl_coef=self.kl.kl_coef, kind=settings.kl_estimator,
        )  # fmt: skip
        if settings.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(
            rewards, columns["values"], mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda
        )
        if settings.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        columns |= {"rewards": rewards, "advantages": advantages, "returns": returns}

    # --- update -------------------------------------------------------------------------------

    def update(self, rollout: Rollout, cache: TowerCache) -> dict[str, float]:
        """Every optimizer step of a rollout.

        Returns:
            What is logged, means over the updates.
        """
        sums: dict[str, list[float]] = {}
        self.model.train()
        for epoch in range(self.settings.ppo_epochs):
            seed = row_seed(self.config.seed, "update", self.step, epoch)
            order = self._shuffled([p.picture for p in rollout.prompts], seed)
            if len(order) < self.settings.num_minibatches:
                order = [[i] for i in _flat(order)]
            for n in range(self.settings.num_minibatches):
                rows = _flat(order[n :: self.settings.num_minibatches])
                first = epoch == 0 and n == 0
                for key, value in self.minibatch(rollout, rows, cache, first=first).items():
                    sums.setdefault(key, []).append(value)
        means = {key: sum(values) / len(values) for key, values in sums.items()}
        stats = self._objective(rollout) | means
        self.kl.update(stats["objective/kl"], len(rollout))
        return stats

    def minibatch(
        self, rollout: Rollout, rows: list[int], cache: TowerCache, *, first: bool = False
    ) -> dict[str, float]:
        """One optimizer step: the policy's gradient, then the value model's, then both move."""
        ids = [rollout.prompts[i].row_id for i in rows]
        self.engine.zero_grad()
        stats = self.accumulate(rollout, rows, cache, first=first)
        norms = self.engine.step(self.settings.max_grad_norm, self.step + 1, ids)
        stats |= {f"grad_norm/{role}": norm for role, norm in norms.items()}
        stats["learning_rate"] = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        return stats

    def accumulate(
        self, rollout: Rollout, rows: list[int], cache: TowerCache, *, first: bool = False
    ) -> dict[str, float]:
        """Gradients of a minibatch, in pieces that fit the device; the sum is that of one piece.

        The policy's pieces come first, each with its backward, then the value model's: on one base
        a forward of the other adapter in between would lose the gradient.
        """
        stats: dict[str, float] = {}
        mask = rollout.mask
        tokens = int(mask[rows].sum())
        own = [rollout.prompts[i] for i in rows], [rollout.responses[i] for i in rows]
        pieces = [[rows[i] for i in part] for part in self._chunks(*own)]
        for role, loss_of in (("policy", self._policy_loss), ("value", self._value_loss)):
            for turn, (piece, counts) in enumerate(self._shared_out(pieces), 1):
                batch = self._batch(rollout.prompts, rollout.responses, piece)
                # A loss is a mean over tokens; a piece that another process has counts nothing.
                share = counts * int(mask[piece].sum()) / tokens
                found = self._forward(role, rollout, piece, batch, cache, train=True)
                loss, parts = loss_of(rollout, piece, found)
                if role == "policy" and first:
                    self._check_ratio(parts)
                gate_loss(loss, self.step + 1, [rollout.prompts[i].row_id for i in piece])
                last = role == "value" and turn == self._turns(pieces)
                self.engine.backward(loss * share, last=last)
                self.model.after_backward()
                for key, value in parts.items():
                    stats[key] = stats.get(key, 0.0) + value * share
            if role == "policy" and self.settings.sft_coef:
                stats["loss/sft_avg"] = self._sft(rollout, rows, cache)
        names = sorted(stats)
        sums = group.sum_of(torch.tensor([stats[n] for n in names], dtype=torch.float64))
        return dict(zip(names, sums.tolist(), strict=True))

    def _policy_loss(
        self, rollout: Rollout, rows: list[int], found: tuple[Tensor, ...]
    ) -> tuple[Tensor, dict[str, float]]:
        logps, entropy = found
        width = logps.shape[1]
        old, advantages, mask = self._columns(rollout, rows, width, "logps", "advantages")
        clipped = clipped_policy_loss(
            logps, old, advantages, mask, clip_range=self.settings.clip_range
        )
        mean_entropy = masked_mean(entropy, mask)
        loss = clipped.loss - self.settings.entropy_coef * mean_entropy
        ratio = torch.exp((logps - old).detach())
        return loss, {
            "loss/policy_avg": clipped.loss.item(),
            "policy/clipfrac_avg": clipped.clip_fraction.item(),
            "policy/approxkl_avg": approx_kl(logps.detach(), old, mask).item(),
            "policy/entropy_avg": mean_entropy.item(),
            "val/ratio": masked_mean(ratio, mask).item(),
            "val/ratio_error": ((ratio - 1).abs() * mask).max().item(),
        }

    def _value_loss(
        self, rollout: Rollout, rows: list[int], found: tuple[Tensor, ...]
    ) -> tuple[Tensor, dict[str, float]]:
        (values,) = found
        old, returns, mask = self._columns(rollout, rows, values.shape[1], "values", "returns")
        clipped = clipped_value_loss(
            values, old, returns, mask, value_clip_range=self.settings.value_clip_range
        )
        return self.settings.vf_coef * clipped.loss, {
            "loss/value_avg": clipped.loss.item(),
            "val/clipfrac_avg": clipped.clip_fraction.item(),
        }

    def _sft(self, rollout: Rollout, rows: list[int], cache: TowerCache) -> float:
        """Backward of the chosen answers' cross-entropy; its mean, in nats a token."""
        picked = self.prompts_of(self.step)
        records = [self.rows[picked[i]] for i in rows]
        answers = [
            completion_ids(self.processor, r["prompt"], r["chosen"], image=r["image"] is not None)
            for r in records
        ]
        chosen = Rollout([rollout.prompts[i] for i in rows], answers, [], [])
        tokens, mean = int(chosen.mask.sum()), 0.0
        parts = list(self._chunks(chosen.prompts, chosen.responses))
        for part, counts in self._shared_out(parts):
            batch = self._batch(chosen.prompts, chosen.responses, part)
            own = [rows[i] for i in part]
            width = max(len(answers[i]) for i in part)
            with cache.rows(_pictures(rollout.prompts, own), batch), autocast():
                logps, _ = self.engine(
                    "policy", width=width, temperature=self.settings.temperature, **batch
                )
            mask = chosen.mask[part, :width].to(logps.device)
            loss = -counts * (logps * mask).sum() / tokens
            self.engine.backward(self.settings.sft_coef * loss, last=False)
            self.model.after_backward()
            mean += loss.item()
        return mean

    def _check_ratio(self, parts: dict[str, float]) -> None:
        """Before the first update of a rollout the policy is the one that sampled.

        Raises:
            AssertionError: It is not: dropout is on, or sampling and updates see other numbers.
        """
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        if parts["val/ratio_error"] > tolerance:
            raise AssertionError(
                f"step {self.step + 1}: before any update the probability ratio is off by "
                f"{parts['val/ratio_error']:.2e} (allowed {tolerance:.0e})"
            )

    # --- batches ------------------------------------------------------------------------------

    def _turns(self, parts: list[list[int]]) -> int:
        return -(-len(parts) // machine.world_size())

    def _own(self, parts: Iterator[list[int]]) -> Iterator[list[int]]:
        """This process's batches of a rollout, with a look at the stop flag before each.

        All come equally often: who has run out gets an empty one.
        """
        parts = list(parts)
        for turn in range(self._turns(parts)):
            self._stop_if_asked()
            place = turn * machine.world_size() + machine.rank()
            yield parts[place] if place < len(parts) else []

    def _shared_out(self, parts: list[list[int]]) -> Iterator[tuple[list[int], int]]:
        """This process's batches of an update; who has run out repeats the last, counting 0.

        Under ZeRO all must call the model equally often.
        """
        for turn in range(self._turns(parts)):
            place = turn * machine.world_size() + machine.rank()
            yield parts[min(place, len(parts) - 1)], int(place < len(parts))

    def _chunks(self, prompts: list[Prompt], responses: list[list[int]]) -> Iterator[list[int]]:
        """Places of rows in batches that fit the device."""
        lengths = [len(p.ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        pictures = [p.picture for p in prompts]
        yield from together(lengths, pictures, self.settings.per_device_batch_size)

    def _batch(
        self, prompts: list[Prompt], responses: list[list[int]], rows: list[int]
    ) -> dict[str, Tensor]:
        return batch_of(
            [prompts[i] for i in rows], [responses[i] for i in rows], self.pad_id, device()
        )

    def _forward(
        self,
        role: str,
        rollout: Rollout,
        rows: list[int],
        batch: dict[str, Tensor],
        cache: TowerCache,
        *,
        train: bool = False,
    ) -> tuple[Tensor, ...]:
        width = max(len(rollout.responses[i]) for i in rows)
        model = self.engine if train else self.model
        with cache.rows(_pictures(rollout.prompts, rows), batch), autocast():
            return model(
                role,
                width=width,
                temperature=self.settings.temperature,
                entropy_gradient=train and self.settings.entropy_coef > 0,
                **batch,
            )

    def _columns(
        self, rollout: Rollout, rows: list[int], width: int, *names: str
    ) -> tuple[Tensor, ...]:
        values = [rollout.columns[name][rows, :width].to(device()) for name in names]
        return (*values, rollout.mask[rows, :width].to(device()))

    # --- what is written ----------------------------------------------------------------------

    def _objective(self, rollout: Rollout) -> dict[str, float]:
        """What the rollout itself says, before any update."""
        columns, mask = rollout.columns, rollout.mask
        scores, lengths = columns["scores"], mask.sum(1).float()
        kl = (kl_estimate(columns["logps"], columns["ref_logps"], kind="k1") * mask).sum(1)
        return {
            "objective/scores": scores.mean().item(),
            "objective/scores_std": scores.std(unbiased=False).item(),
            "objective/rlhf_reward": columns["rewards"].sum(1).mean().item(),
            "objective/kl": kl.mean().item(),
            "objective/entropy": masked_mean(columns["entropy"], mask).item(),
            "objective/kl_coef": self.kl.kl_coef,
            "response/length": lengths.mean().item(),
            "response/finished": sum(rollout.finished) / len(rollout),
            "response/empty": sum(not t for t in rollout.texts) / len(rollout),
            "val/explained_variance": explained_variance(
                columns["values"], columns["returns"], mask
            ),
        }

    def _log(self, rollout: Rollout, stats: dict[str, float], started: float) -> None:
        row = {"step": self.step} | {k: number(v) for k, v in stats.items()}
        row["time_s"] = round(time.perf_counter() - started, 2)
        row["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self.stage.log(row)
        self.log_rows.append(row)
        if not machine.is_main():
            return
        kl = (rollout.columns["logps"] - rollout.columns["ref_logps"]).sum(1).tolist()
        with self._rollouts_path.open("a", encoding="utf-8") as handle:
            for i, prompt in enumerate(rollout.prompts):
                record = {
                    "step": self.step,
                    "id": prompt.row_id,
                    "prompt": prompt.text,
                    "response": rollout.texts[i],
                    "reward": round(rollout.columns["scores"][i].item(), 6),
                    "kl": round(kl[i], 6),
                    "num_tokens": len(rollout.responses[i]),
                    "finished": rollout.finished[i],
                }
                handle.write(json.dumps(record, ensure_ascii=False) + "\n")

    @property
    def _rollouts_path(self) -> Path:
        return self.stage.path / "rollouts.jsonl"

    def summary(self) -> dict:
        """Of a finished run."""
        tail = self.log_rows[-max(1, len(self.log_rows) // 10) :]
        head = self.log_rows[: len(tail)]

        def mean(rows: list[dict], key: str) -> float:
            return round(sum(r[key] for r in rows) / len(rows), 6)

        return {
            "steps": self.step,
            "optimizer_steps": self.step * self.updates_per_step,
            "prompts": len(self.rows),
            "rollouts": self.step * self.settings.rollout_batch_size,
            "launch": self.engine.found,
            "trainable_parameters": {
                role: sum(map(zero_parameters.numel, parameters))
                for role, parameters in self.engine.groups.items()
            },
            "scores": {
                "first_steps": mean(head, "objective/scores"),
                "last_steps": mean(tail, "objective/scores"),
            },
            "kl": {
                "last_steps": mean(tail, "objective/kl"),
                "highest": max(r["objective/kl"] for r in self.log_rows),
            },
            "kl_coef": self.kl.kl_coef,
            "weights_sha256": ckpt.tensors_sha256(ckpt.trainable_tensors(self.model)),
        }

    # --- checkpoints --------------------------------------------------------------------------

    def _save(self) -> None:
        tensors, plain = self.engine.tensors()
        gate_weights(tensors.get("trainable", {}), self.step, [])
        rng, rng_plain = ckpt.rng_state()
        ckpt.save_checkpoint(
            self.stage.path / "checkpoints",
            self.step,
            tensors | {"rng": rng},
            plain
            | {
                "step": self.step,
                "sharing": self.engine.sharing,
                "scheduler": self.scheduler.state_dict(),
                "kl": self.kl.state_dict(),
                "rng": rng_plain,
                "reference": self.reference,
            },
        )
        self.saved = time.monotonic()

    def _resume(self) -> None:
        newest, skipped = ckpt.latest_checkpoint(self.stage.path / "checkpoints")
        for problem in skipped:
            warnings.warn(f"{problem}: using an older checkpoint", stacklevel=2)
        if newest:
            state = ckpt.load_state(newest)
            changed = [k for k in self.stage.allowed if k.startswith(("data/", "model/"))]
            check_reference_unmoved(state.get("reference"), self.reference, waived=bool(changed))
            ckpt.check_sharing(newest, state["sharing"], self.engine.sharing)
            with checkpointed.keeping_settings(self.optimizer, self.scheduler):
                self.engine.load(newest, state)
                self.scheduler.load_state_dict(state["scheduler"])
            self.kl.load_state_dict(state["kl"])
            # A process that was not there when it was written keeps the seed's.
            if own := ckpt.load_state(newest, machine.rank()):
                ckpt.load_rng(ckpt.load_tensors(newest, "rng", machine.rank()), own["rng"])
            self.step = state["step"]
        # Lines of steps that were never checkpointed are written again.
        self.log_rows = [r for r in read_jsonl(self.stage.metrics_path) if r["step"] <= self.step]
        group.barrier()
        for path in (self.stage.metrics_path, self._rollouts_path) if machine.is_main() else ():
            kept = [r for r in read_jsonl(path) if r["step"] <= self.step]
            write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))

    def _stop_if_asked(self) -> None:
        """Between pieces of work: the last finished step is saved, an unfinished one is dropped."""
        if group.any_of(bool(self.flag)):
            if not self.flag:
                self.flag.reason = "a stop in another process"
            self._save()
            raise Preempted(
                f"stopped by {self.flag.reason} after step {self.step} of {self.total_steps}; "
                "checkpoint written, run the same command to go on"
            )


def _flat(groups: list[list[int]]) -> list[int]:
    return [i for group in groups for i in group]


def _pictures(prompts: list[Prompt], rows: list[int]) -> list[str]:
    """Of the rows that have one."""
    return [prompts[i].picture for i in rows if prompts[i].picture]


def _card(config: Config, summary: dict) -> str:
    settings = config.ppo
    name = "the embedded demonstration model" if config.model.name == "embedded" else (
        config.model.name
    )  # fmt: skip
    lora = "library_name: peft\n" if config.model.with_lora else ""
    return f"""---
base_model: {config.model.name}
{lora}tags: [ppo, rlhf, safety, vision-language]
---

# PPO-aligned {name}

Trained by `spavl train ppo --profile {config.profile}` on prompts of `{config.data.source}`:
{summary["rollouts"]} answers in {summary["steps"]} rollouts, {summary["optimizer_steps"]} optimizer
steps, peak rate {settings.learning_rate}, kl_coef {settings.kl_coef} ({settings.kl_estimator}),
seed {config.seed}, {config.model.adapter} fine-tuning, projector
{"trained" if config.model.train_projector else "frozen"}, vision tower frozen.

| | value |
|---|---|
| mean score, first tenth of the steps | {summary["scores"]["first_steps"]} |
| mean score, last tenth | {summary["scores"]["last_steps"]} |
| KL to the reference, last tenth, nats an answer | {summary["kl"]["last_steps"]} |

A research artefact of a tutorial: it may still answer unsafely, or refuse what is harmless.
Use it under the licences of its base model and data.
"""
