"""Train a vision-language model by PPO against a reward model.

    spavl train ppo --profile demo

A step is one rollout and its updates. The rollout samples responses, scores them, subtracts the KL
penalty, and estimates advantages (`ppo_rollout`). Then `ppo_epochs * num_minibatches` optimizer
steps follow. Each of them updates policy and value model together.

This module contains the training loop, because trl has had no PPO trainer since 1.13, and never had
a PPO trainer for images. `ppo_batches` divides rows into batches, `ppo_terms` applies the settings
to the formulas, and `ppo_records` builds the log rows and the summary.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import get_scheduler

from spavl_lib import machine
from spavl_lib.config import Config
from spavl_lib.data.schema import image_cells
from spavl_lib.data.templates import completion_ids
from spavl_lib.distributed import group, zero_parameters
from spavl_lib.errors import InputError
from spavl_lib.machine import peak_memory_gib
from spavl_lib.modelling.adapters import separate_projector
from spavl_lib.modelling.load import load_processor, quiet_libraries
from spavl_lib.modelling.speed.tower_cache import TowerCache
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import append_jsonl, read_jsonl
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers import ppo_batches, progress
from spavl_lib.trainers.dpo import save_trained
from spavl_lib.trainers.engines import build_engine
from spavl_lib.trainers.guards import Movement, check_steps_taken, gate_loss, gate_weights
from spavl_lib.trainers.inputs import load_rows, policy_inputs, reward_folder
from spavl_lib.trainers.ppo_records import card, rollout_records, rollout_stats, summary_figures
from spavl_lib.trainers.ppo_rollout import RolloutMaker
from spavl_lib.trainers.ppo_terms import check_first_ratio, policy_loss, value_loss
from spavl_lib.trainers.probe import check_reference_unmoved, reference_probe
from spavl_lib.trainers.progress import number
from spavl_lib.trainers.reporters import Reporter, reporter_arguments
from spavl_lib.trainers.rollout import Rollout, seed_from


@stage_maker("ppo", inputs=policy_inputs, polls_stop=True)
def train_ppo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train against this run's reward model (or `ppo.reward_model`), and save the policy.

    Args:
        config: Uses `data`, `model`, `ppo` and `seed`.
        stage: See `train_reward`. On a CPU, a resumed run is bit-identical to an uninterrupted one.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary. It names no best step, because no held-out rows are measured.

    Raises:
        SpavlError: For the reasons that `train_reward` lists.
        InputError: The reward model is missing or has another base.
    """
    reporter_arguments(config, stage)  # raises before anything is loaded
    folder = reward_folder(config.ppo.reward_model, stage)
    quiet_libraries()
    [rows] = load_rows(config, stage, load_processor(config.model), "train")
    trainer = PPOTrainer(config, stage, rows, folder, flag)
    trainer.check()
    trainer.train(live)
    summary = trainer.summary()
    policy = trainer.model.vlm_of("policy")
    save_trained(policy, trainer.processor, stage, config, card(config, summary))
    return summary


class PPOTrainer(RolloutMaker):
    """The trainer: `RolloutMaker` with an optimizer, a training loop and checkpoints.

    Args:
        config: Config of the run.
        stage: Stage to write into.
        rows: Training rows, which provide the prompts.
        folder: Folder of the reward model: the `model/` that the reward trainer wrote.
        flag: Stop flag. False if nothing will stop the trainer.
    """

    def __init__(
        self, config: Config, stage: Stage, rows: Dataset, folder: Path, flag: StopFlag | bool
    ):
        super().__init__(config, rows, folder)
        self.stage, self.flag = stage, flag
        settings = self.settings
        groups = {role: self.model.trainable_of(role) for role in ("policy", "value")}
        rates = {"policy": settings.learning_rate}
        rates["value"] = settings.value_learning_rate or settings.learning_rate
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[role], "lr": rates[role]} for role in groups],
            weight_decay=settings.weight_decay,
        )
        if config.model.projector_learning_rate and config.launch.engine != "ddp":
            raise InputError(
                "model.projector_learning_rate does not work for PPO with DeepSpeed, which clips "
                "each group of parameters by itself; set it to 0, or launch.engine to ddp"
            )
        separate_projector(self.optimizer, self.model, config.model.projector_learning_rate)
        self.engine = build_engine(self.model, groups, self.optimizer, config.launch)
        self.lockstep = self.engine.lockstep
        self.scheduler = get_scheduler(
            settings.lr_scheduler,
            self.optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=self.total_steps * self.updates_per_step,
        )
        self.step, self.saved = 0, time.monotonic()
        self.optimizer_steps = 0  # steps that the loss scaler skipped are not counted
        self.reference: dict[str, list] = {}
        self.log_rows: list[dict] = []

    @property
    def total_steps(self) -> int:
        """Number of rollouts in the whole run."""
        settings = self.settings
        passes = math.ceil(settings.num_epochs * len(self.rows) / settings.rollout_batch_size)
        return settings.max_steps or passes

    @property
    def updates_per_step(self) -> int:
        """Number of optimizer steps for each rollout."""
        return self.settings.ppo_epochs * self.settings.num_minibatches

    # --- the run ------------------------------------------------------------------------------

    def check(self) -> None:
        """Check before the first step that the disk has room for the checkpoints.

        Raises:
            DiskError: The disk has too little room.
        """
        ckpt.check_room(self.stage.path / "checkpoints", self.model)

    def train(self, live: Any = None) -> None:
        """Take all remaining steps.

        Args:
            live: Object with `update(rows)`, called after every step.

        Raises:
            NonFiniteError: A score, loss or gradient is NaN or infinite.
            Preempted: The stop flag is set. The last finished step is saved.
        """
        vlm, as_reference = self.model.vlm_of("reference"), self.model.as_role("reference")
        with self.engine.whole():
            self.reference = reference_probe(
                vlm, self.processor, self.rows, as_reference=as_reference
            )
        self._resume()
        group.report("progress", {"step": self.step, "total": self.total_steps})
        begun, taken, images = self.step, 0, False
        movement = None if begun else Movement(self.model)
        bar = Bar(total=self.total_steps, initial=self.step, desc=self.stage.title, unit="step")
        started = time.perf_counter() - (self.log_rows[-1]["time_s"] if self.log_rows else 0.0)
        with bar, self._reporting() as report:
            while self.step < self.total_steps:
                self._stop_if_asked()
                with self.tower_cache().rollout() as cache:
                    with self.engine.whole():
                        rollout = self.roll_out(self.step, cache)
                    stats = self.update(rollout, cache)
                self.step += 1
                self._log(rollout, stats, started)
                report.log(self.log_rows[-1])
                if live:
                    live.update(self.log_rows)
                bar.update(1)
                bar.set_postfix(
                    score=f"{stats['objective/scores']:.2f}", kl=f"{stats['objective/kl']:.2f}"
                )
                taken += "grad_norm/policy" in stats
                images |= any(prompt.image_digest for prompt in rollout.prompts)
                if movement and (taken == 3 or (taken > 3 and images)):
                    movement = movement.check(self.model, images)
                due = self.step % self.settings.save_steps == 0 or self.step == self.total_steps
                overdue = time.monotonic() - self.saved > progress.LONGEST_UNSAVED_S
                if group.any_of(due or overdue):
                    self._save()
        if live and self.log_rows:
            live.update(self.log_rows, force=True)
        if not begun:
            check_steps_taken(taken, self.step)

    # --- update -------------------------------------------------------------------------------

    def update(self, rollout: Rollout, cache: TowerCache) -> dict[str, float]:
        """Take every optimizer step of a rollout, then adapt KL coefficient and multiplier.

        Args:
            rollout: A rollout with advantages and returns.
            cache: The cache that the rollout was made with.

        Returns:
            Values to log: the rollout's values, and means over the updates.
        """
        sums: dict[str, list[float]] = {}
        self.model.train()
        for epoch in range(self.settings.ppo_epochs):
            minibatches = ppo_batches.minibatches(
                [prompt.image_digest for prompt in rollout.prompts],
                self.settings.num_minibatches,
                seed_from(self.config.seed, "update", self.step, epoch),
                by_image=self.config.data.group_by_image,
            )
            for n, rows in enumerate(minibatches):
                first = epoch == 0 and n == 0
                for key, value in self.minibatch(rollout, rows, cache, first=first).items():
                    sums.setdefault(key, []).append(value)
        means = {key: sum(values) / len(values) for key, values in sums.items()}
        stats = rollout_stats(rollout, self.kl.kl_coef, self.multiplier) | means
        if skipped := len(sums["learning_rate"]) - len(sums.get("grad_norm/policy", ())):
            stats["skipped"] = skipped
        self.kl.update(stats["objective/kl"], len(rollout))
        if self.multiplier:
            self.multiplier.update(stats["objective/costs"])
        return stats

    def minibatch(
        self, rollout: Rollout, rows: list[int], cache: TowerCache, *, first: bool = False
    ) -> dict[str, float]:
        """Take one optimizer step, which updates policy and value model together.

        Args:
            rollout: A rollout with advantages and returns.
            rows: Rows of the minibatch, over all processes.
            cache: The cache that the rollout was made with.
            first: Whether this is the rollout's first update. The probability ratio must then be 1.

        Returns:
            Values to log: losses, clip fractions, learning rate, and gradient norms, which are
            missing if the loss scaler skipped the step.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite; nothing was updated.
        """
        ids = [rollout.prompts[i].row_id for i in rows]
        self.engine.zero_grad()
        stats = self.accumulate(rollout, rows, cache, first=first)
        norms = self.engine.step(self.settings.max_grad_norm, self.step + 1, ids)
        stats["learning_rate"] = self.scheduler.get_last_lr()[0]
        if self.engine.skipped:
            return stats
        self.optimizer_steps += 1
        stats |= {f"grad_norm/{role}": norm for role, norm in norms.items()}
        self.scheduler.step()
        return stats

    def accumulate(
        self, rollout: Rollout, rows: list[int], cache: TowerCache, *, first: bool = False
    ) -> dict[str, float]:
        """Add up the gradients of a minibatch's losses over its micro-batches.

        The sum does not depend on the size of the micro-batches. With LoRA policy and value model
        share one base, and switching the adapter between a forward pass and its backward pass would
        lose the gradient. So all backward passes of the policy come before the first forward pass
        of the value model, unless the two are separate models (`side_by_side`).

        Args:
            rollout: A rollout with advantages and returns.
            rows: Rows of the minibatch, over all processes.
            cache: The cache that the rollout was made with.
            first: Whether to check that the probability ratio is 1.

        Returns:
            Values to log, as means over the minibatch's response tokens. `val/ratio_error` is the
            mean over micro-batches of the largest error in each.

        Raises:
            AssertionError: `first` is set, and the probability ratio is not 1.
            NonFiniteError: A loss is NaN or infinite.
        """
        mask, settings = rollout.mask, self.settings
        tokens = int(mask[rows].sum())
        places = self._micro_batches(
            [rollout.prompts[i] for i in rows], [rollout.responses[i] for i in rows]
        )
        micro_batches = ppo_batches.own_batches_in_step(
            [[rows[i] for i in part] for part in places]
        )

        def add_gradients(role: str, loss_of: Callable) -> dict[str, float]:
            stats: dict[str, float] = {}
            for turn, (micro_batch, weight) in enumerate(micro_batches, 1):
                batch = self._batch(rollout.prompts, rollout.responses, micro_batch)
                # A loss is a mean over a micro-batch's tokens. Weighted by the micro-batch's share
                # of the minibatch's tokens, the losses add up to the mean over the minibatch.
                share = weight * int(mask[micro_batch].sum()) / tokens
                outputs = self._forward(
                    self.engine, role, rollout, micro_batch, batch, cache,
                    entropy_gradient=settings.entropy_coef > 0,
                )  # fmt: skip
                loss, values = loss_of(rollout, micro_batch, outputs, settings)
                if role == "policy" and first:
                    check_first_ratio(rollout, micro_batch, outputs[0], self.step + 1, self.dtype)
                gate_loss(loss, self.step + 1, [rollout.prompts[i].row_id for i in micro_batch])
                last = role == "value" and turn == len(micro_batches)
                self.engine.backward(loss * share, last=last)
                self.model.after_backward()
                for key, value in values.items():
                    stats[key] = stats.get(key, 0.0) + value * share
            if role == "policy" and settings.sft_coef:
                stats["loss/sft_avg"] = self._add_sft_gradient(rollout, rows, cache)
            return stats

        of_policy, of_value = self.side_by_side(
            lambda: add_gradients("policy", policy_loss), lambda: add_gradients("value", value_loss)
        )
        stats = of_policy | of_value
        names = sorted(stats)
        sums = group.sum_of(torch.tensor([stats[n] for n in names], dtype=torch.float64))
        return dict(zip(names, sums.tolist(), strict=True))

    def _add_sft_gradient(self, rollout: Rollout, rows: list[int], cache: TowerCache) -> float:
        """Add the gradient of the cross-entropy of the prompts' chosen responses.

        Args:
            rollout: The rollout. Its encoded prompts are used.
            rows: Rows of the minibatch, over all processes.
            cache: The cache that the rollout was made with.

        Returns:
            This process's share of the mean cross-entropy, in nats per token.
        """
        prompt_rows = self.prompts_of(self.step)
        records = [self.rows[prompt_rows[i]] for i in rows]
        answers = [
            completion_ids(self.processor, r["prompt"], r["chosen"], image=len(image_cells(r)))
            for r in records
        ]
        chosen = Rollout([rollout.prompts[i] for i in rows], answers, [], [])
        tokens, mean = int(chosen.mask.sum()), 0.0
        places = self._micro_batches(chosen.prompts, chosen.responses)
        for micro_batch, weight in ppo_batches.own_batches_in_step(places):
            batch = self._batch(chosen.prompts, chosen.responses, micro_batch)
            logps, _ = self._forward(self.engine, "policy", chosen, micro_batch, batch, cache)
            mask = chosen.mask[micro_batch, : logps.shape[1]].to(logps.device)
            loss = -weight * (logps * mask).sum() / tokens
            self.engine.backward(self.settings.sft_coef * loss, last=False)
            self.model.after_backward()
            mean += loss.item()
        return mean

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[Reporter]:
        """Open a context in which the trackers of `report_to` are open."""
        reporter = Reporter(
            self.config, self.stage, "ppo", self.model, step=self.step, total=self.total_steps
        )
        try:
            yield reporter
        finally:
            reporter.close()

    # --- log and summary ----------------------------------------------------------------------

    @property
    def _rollouts_path(self) -> Path:
        return self.stage.path / "rollouts.jsonl"

    def _log(self, rollout: Rollout, stats: dict[str, float], started: float) -> None:
        row = {"step": self.step} | {key: number(value) for key, value in stats.items()}
        row["time_s"] = round(time.perf_counter() - started, 2)
        row["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self.stage.log(row)
        self.log_rows.append(row)
        if machine.is_main():
            append_jsonl(self._rollouts_path, rollout_records(rollout, self.step))

    def summary(self) -> dict:
        """Return the summary of a finished run."""
        return {
            "steps": self.step,
            "optimizer_steps": self.optimizer_steps,
            "prompts": len(self.rows),
            "rollouts": self.step * self.settings.rollout_batch_size,
            "launch": self.engine.engine_found,
            "trainable_parameters": {
                role: sum(map(zero_parameters.numel, parameters))
                for role, parameters in self.engine.groups.items()
            },
            **summary_figures(self.log_rows),
            "kl_coef": self.kl.kl_coef,
            **({"lagrange_multiplier": self.multiplier.value} if self.multiplier else {}),
            "weights_sha256": ckpt.tensors_sha256(ckpt.trainable_tensors(self.model)),
        }

    # --- checkpoints --------------------------------------------------------------------------

    def _save(self) -> None:
        tensors, plain = self.engine.tensors()
        gate_weights(tensors.get("trainable", {}), self.step, [])
        rng, rng_plain = ckpt.rng_state()
        state = {
            "step": self.step,
            "optimizer_steps": self.optimizer_steps,
            "sharing": self.engine.sharing,
            "scheduler": self.scheduler.state_dict(),
            "kl": self.kl.state_dict(),
            **({"multiplier": self.multiplier.state_dict()} if self.multiplier else {}),
            "rng": rng_plain,
            "reference": self.reference,
        }
        folder = self.stage.path / "checkpoints"
        ckpt.save_checkpoint(folder, self.step, tensors | {"rng": rng}, plain | state)
        self.saved = time.monotonic()

    def _resume(self) -> None:
        newest = ckpt.newest_checkpoint(self.stage.path / "checkpoints")
        if newest:
            state = ckpt.load_state(newest)
            check_reference_unmoved(
                state.get("reference"), self.reference, allowed_changes=self.stage.allowed
            )
            ckpt.check_sharing(newest, state["sharing"], self.engine.sharing)
            with ckpt.keeping_settings(self.optimizer, self.scheduler):
                self.engine.load(newest, state)
                self.scheduler.load_state_dict(state["scheduler"])
            self.kl.load_state_dict(state["kl"])
            if self.multiplier:
                self.multiplier.load_state_dict(state["multiplier"])
            ckpt.restore_rng(newest)
            self.step = state["step"]
            # Checkpoints of older versions hold no count of optimizer steps. The count is then
            # computed, and includes steps that the loss scaler skipped.
            steps = self.step * self.updates_per_step
            self.optimizer_steps = state.get("optimizer_steps", steps)
        # Drop log rows of steps after the checkpoint, because these steps run again.
        self.log_rows = [r for r in read_jsonl(self.stage.metrics_path) if r["step"] <= self.step]
        group.barrier()
        if machine.is_main():
            for path in (self.stage.metrics_path, self._rollouts_path):
                progress.keep_steps(path, self.step)

    def _stop_if_asked(self) -> None:
        """If the stop flag is set, save the last finished step and stop. The current step is lost.

        The resumed run repeats the current step.

        Raises:
            Preempted: The stop flag is set.
        """
        if progress.asked_to_stop(self.flag):
            self._save()
            raise progress.stopped(self.flag, f"after step {self.step} of {self.total_steps}")
