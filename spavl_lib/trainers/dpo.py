"""Train a vision-language model by DPO, with trl's `DPOTrainer`.

    spavl train dpo --profile demo

trl computes the losses, except for SimPO and ORPO, which it does not have with images. This package
builds the batches (BOS, EOS, one image slot) and chooses the trainable parameters. It checks the
first steps, and it writes checkpoints from which a run resumes with identical results.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer

from spavl_lib import machine
from spavl_lib.config import Config
from spavl_lib.distributed import zero_parameters
from spavl_lib.modelling.adapters import (
    assert_freeze_plan,
    compute_as_masters,
    freeze_for_full,
    lora_config,
    train_in_fp32,
)
from spavl_lib.modelling.blank_image import run_tower_always
from spavl_lib.modelling.load import (
    BASE_FILE,
    compute_dtype,
    load_model,
    load_processor,
    logit_rounding,
    model_hashes,
    quiet_libraries,
    rounding,
)
from spavl_lib.modelling.speed.completion_head import score_completions_only
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.objectives.preference import orpo_loss, simpo_loss
from spavl_lib.runs.files import let_others_read, read_jsonl, write_json, write_text, writing
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.arguments import common_arguments
from spavl_lib.trainers.exact_trainer import (
    CheckedMixin,
    RowCollator,
    WholeStepMixin,
    check_rows_fit,
)
from spavl_lib.trainers.export_card import model_card
from spavl_lib.trainers.inputs import limit_of, load_rows, training_inputs
from spavl_lib.trainers.probe import reference_probe
from spavl_lib.trainers.progress import best_step, drop_stock_callbacks, number
from spavl_lib.trainers.reference_cache import NAMES, cache_key, with_reference

LOGGED = (
    "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy",
    "num_tokens", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies",
    "eval_rewards/chosen", "eval_rewards/rejected", "eval_logps/chosen", "eval_logps/rejected",
)  # fmt: skip

# Tokens of a long response. The rounding errors of single tokens are independent, so the error of
# their sum grows with the square root of this number.
LONG_ANSWER = 256
OWN = {"simpo", "orpo"}  # losses that trl does not have


class CheckedDPOTrainer(WholeStepMixin, CheckedMixin, DPOTrainer):
    """trl's trainer with this package's checkpoints, and with checks before every update.

    The loss of a step does not depend on how the step is divided into micro-batches. The loss `sft`
    is a mean over the tokens of the step's chosen responses. All other losses are means over the
    step's pairs.
    """

    loss_types: list[str]
    loss_weights: list[float]
    losses: tuple[tuple[str, float], ...] = ()
    """Name and weight of every loss, also of those that trl does not have."""
    simpo_margin: float = 0.5
    with_reference: bool = True
    """False if no loss reads the reference. trl then gets 0 for its log-probabilities."""

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """Compute this micro-batch's part of the step's loss.

        Raises:
            NonFiniteError: In training, the part is NaN or infinite.
        """
        of_pairs, of_tokens = self.shares(inputs, model.training)
        weights = [
            (name, weight * (of_tokens if name == "sft" else of_pairs))
            for name, weight in self.losses
        ]
        theirs = stock_losses(weights, self.label_smoothing)
        whole = self.loss_types, self.loss_weights
        self.loss_types, self.loss_weights = [n for n, _ in theirs], [w for _, w in theirs]
        if not self.with_reference:
            zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
            inputs = inputs | dict.fromkeys(NAMES, zeros)
        try:
            with _log_probabilities(model) as seen:
                loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_types, self.loss_weights = whole
        own = [(name, weight) for name, weight in weights if name in OWN]
        if own or not self.with_reference:
            means = _means(seen[0], inputs["completion_mask"])
            added = sum(weight * self._own_loss(name, *means) for name, weight in own)
            loss = (loss[0] + added, *loss[1:]) if isinstance(loss, tuple) else loss + added
            if not self.with_reference:
                self._log_rewards(*means)
        self.check_loss(model, loss[0] if isinstance(loss, tuple) else loss)
        return loss

    def _own_loss(self, name: str, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The mean of a loss of `OWN` over a micro-batch's pairs.

        Args:
            name: Name of the loss.
            chosen: Mean log-probability of a token of each chosen response (pairs,), in nats.
            rejected: The same of the rejected responses.
        """
        if name == "simpo":
            return simpo_loss(chosen, rejected, beta=self.beta, margin=self.simpo_margin).mean()
        return orpo_loss(chosen, rejected).mean()

    def _log_rewards(self, chosen: Tensor, rejected: Tensor) -> None:
        """Replace the rewards that trl has logged for this micro-batch.

        Without a reference trl's are sums over tokens, which are lower for longer responses.

        Args:
            chosen: As for `_own_loss`.
            rejected: As for `_own_loss`.
        """
        first, second = (
            self.accelerator.gather(self.beta * means.detach()) for means in (chosen, rejected)
        )
        values = {
            "chosen": first, "rejected": second, "margins": first - second,
            "accuracies": (first > second).float(),
        }  # fmt: skip
        logged = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            logged[f"rewards/{name}"][-1] = value.mean().item()


def _means(logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log-probability of a token of each chosen and each rejected response, (pairs,) each.

    Args:
        logps: Log-probabilities (responses, tokens), 0 where a token does not count; the chosen
            responses come first.
        mask: The batch's `completion_mask` (responses, 1 + tokens).
    """
    tokens = mask[:, 1:].sum(1).clamp(min=1)
    chosen, rejected = (logps[:, 1 - mask.shape[1] :].sum(1) / tokens).chunk(2)
    return chosen, rejected


def stock_losses(losses: list[tuple[str, float]], smoothing: float) -> list[tuple[str, float]]:
    """The losses that trl computes: those it has, and two whose sum is cDPO's.

    With the label smoothing e, cdpo is 2 (1 - e) sigmoid - (1 - 2 e) robust.

    Args:
        losses: Name and weight of every loss.
        smoothing: Label smoothing, without which cdpo is sigmoid.
    """
    found = []
    for name, weight in losses:
        if name == "cdpo":
            found.append(("sigmoid", 2 * (1 - smoothing) * weight))
            found.append(("robust", -(1 - 2 * smoothing) * weight))
        elif name not in OWN:
            found.append((name, weight))
    return found or [("sft", 0.0)]  # trl wants a loss


@contextlib.contextmanager
def _log_probabilities(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the log-probabilities of the model's forward passes; the policy's come first."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _module, _args, output: seen.append(output.log_probs))
    try:
        yield seen
    finally:
        hook.remove()


def check_reference(logs: dict, *, beta: float = 0.0) -> None:
    """Check at step 1, before any update, that policy and reference are the same model.

    Args:
        logs: Logged values of step 1. An implicit reward is beta times the log-ratio of policy and
            reference, so every implicit reward must be 0.
        beta: DPO's beta if the log-probabilities of the reference are cached, else 0. Cached
            log-probabilities were computed in other batches. In 16 bit, rounding may therefore
            change each token's log-probability by `logit_rounding`, and the check allows for this.
            Without the cache both models compute the same batch, with bit-identical results.

    Raises:
        AssertionError: Policy and reference differ: dropout is on, or the reference is not the base
            model.
    """
    tolerance = rounding()
    if beta and compute_dtype() != torch.float32:
        tolerance = max(tolerance, beta * logit_rounding() * LONG_ANSWER**0.5)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        if abs(float(logs.get(key, 0.0))) > tolerance:  # KTO may draw no response of a side
            raise AssertionError(
                f"step 1: {key} = {logs[key]}, but it must be 0 before the first update; is "
                "dropout on, or is the reference another model?"
            )


@stage_maker("dpo", inputs=training_inputs, polls_stop=True)
def train_dpo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train the policy, evaluate it on the held-out pairs, and save it with its model card.

    Args:
        config: Uses `data`, `model`, `dpo` and `seed`.
        stage: See `train_reward`.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary. Its `best` names the step with the lowest loss on the held-out pairs.
        This loss is measured after the last step and, if `dpo.eval_steps` is set, also during
        training. `model/` always holds the weights of the last step, even if an earlier step was
        better.

    Raises:
        SpavlError: For the reasons that `train_reward` lists.
    """
    quiet_libraries()
    processor = load_processor(config.model)
    train_rows, held_out = load_rows(config, stage, processor, "train", "validation")
    trainer = build_trainer(config, stage, processor, train_rows, held_out)
    parts = assert_freeze_plan(trainer.model, config.model)
    check_rows_fit(trainer, train_rows, processor)
    ckpt.check_room(trainer.checkpoints, trainer.model)
    probe_reference(trainer, processor, train_rows)
    if config.dpo.cache_reference:
        with zero_parameters.gathered_parameters(trainer.model):
            use_cached_reference(trainer, config, stage, processor)
    if not config.dpo.with_reference:
        leave_out_reference(trainer)
    cached = config.dpo.beta if config.dpo.cache_reference else 0.0
    first = functools.partial(check_reference, beta=cached) if config.dpo.with_reference else None
    trainer.report_to_stage(
        stage, flag, logged=LOGGED, live=live,
        check_first=first,
    )  # fmt: skip
    trainer.train_from(ckpt.newest_checkpoint(trainer.checkpoints))
    summary = summary_of(trainer, LOGGED) | {
        "global_batch_size": config.dpo.global_batch_size,
        "train_rows": len(train_rows), "validation_rows": len(held_out),
        "trainable_parameters": parts,
        "best": best_step(read_jsonl(stage.metrics_path), "eval_loss"),
    }  # fmt: skip
    save_trained(trainer.model, processor, stage, config, _card(config, summary))
    return summary


def probe_reference(trainer: Any, processor: ProcessorMixin, rows: Dataset) -> None:
    """Measure the reference on some rows, so that a resumed run notices another reference.

    Args:
        trainer: A trainer of trl with `CheckedMixin`.
        processor: Processor of the model.
        rows: Preference rows.
    """
    lora = trainer.ref_model is None
    with zero_parameters.gathered_parameters(trainer.model):
        trainer.reference = reference_probe(
            trainer.model if lora else trainer.ref_model, processor, rows,
            as_reference=trainer.model.disable_adapter() if lora else contextlib.nullcontext(),
        )  # fmt: skip


def summary_of(trainer: Any, logged: Sequence[str]) -> dict:
    """Evaluate on the held-out rows, and collect the facts of a training on responses.

    Args:
        trainer: A trainer of trl with `CheckedMixin`, after its last step.
        logged: Names of the values of the evaluation to keep.
    """
    evaluation = {k: number(v) for k, v in trainer.evaluate().items() if k in logged}
    return {
        "steps": trainer.state.global_step,
        "launch": trainer.engine_found,
        "epochs": round(trainer.state.epoch or 0.0, 3),
        "validation": evaluation,
        "weights_sha256": ckpt.tensors_sha256(ckpt.trainable_tensors(trainer.model)),
    }


def build_trainer(
    config: Config, stage: Stage, processor: ProcessorMixin, train_rows: Dataset, held_out: Dataset
) -> CheckedDPOTrainer:
    """Build trl's trainer with `RowCollator` as its collator.

    Args:
        config: Config of the run.
        stage: Stage to write into.
        processor: Processor of the model.
        train_rows: Preference rows to train on.
        held_out: Preference rows to evaluate on.

    Returns:
        The trainer. With LoRA the reference model is the base with disabled adapters. In full
        fine-tuning the reference model is a frozen copy of the base.
    """
    dpo = config.dpo
    losses = tuple(zip(dpo.loss_type, dpo.loss_weights, strict=True))
    stock = stock_losses(list(losses), dpo.label_smoothing)
    arguments = TRLConfig(
        **common_arguments("dpo", config, stage),
        per_device_eval_batch_size=dpo.per_device_batch_size,
        beta=dpo.beta,
        loss_type=[name for name, _ in stock],
        loss_weights=[weight for _, weight in stock],
        label_smoothing=dpo.label_smoothing,
        # trl must not truncate, because truncation could drop image tokens or the EOS. The collator
        # raises an error for a row that is too long.
        max_length=None,
        gradient_checkpointing=config.model.gradient_checkpointing,
        eval_strategy="steps" if dpo.eval_steps else "no",
        eval_steps=dpo.eval_steps or None,
    )
    policy, reference = policy_and_reference(config)
    lora = config.model.with_lora
    trainer = CheckedDPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        data_collator=RowCollator(
            processor, limit_of(config, "dpo").longest, all_turns=dpo.assistant_turns == "all"
        ),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=lora_config(policy, config.model) if lora else None,
    )
    trainer.losses = losses
    trainer.simpo_margin = dpo.simpo_margin
    trainer.with_reference = dpo.with_reference
    trainer.group_by_image = config.data.group_by_image
    finish_trainer(trainer, config, stage, processor)
    return trainer


def policy_and_reference(config: Config) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Load the policy with its trainable parameters, and a frozen reference.

    With LoRA there is no reference: it is the base with disabled adapters.
    """
    policy = load_model(config.model)
    if config.model.with_lora:
        return policy, None
    reference = load_model(config.model).requires_grad_(False)
    # The master weights must be fp32, because in half precision rounding loses small updates.
    # DeepSpeed keeps fp32 master weights itself.
    if config.launch.engine == "ddp":
        policy, reference = policy.float(), compute_as_masters(reference)
    freeze_for_full(policy, config.model)
    return policy, reference


def finish_trainer(trainer: Any, config: Config, stage: Stage, processor: ProcessorMixin) -> None:
    """Share prefixes, score responses only, set the precision of what trains, and the folders.

    Args:
        trainer: A trainer of trl with `CheckedMixin` that has built its models.
        config: Config of the run.
        stage: Stage to write into.
        processor: Processor of the model.
    """
    lora = config.model.with_lora
    for model in filter(None, (trainer.model, trainer.ref_model)):
        if apply_sharing(model, config.model.share_prefix):
            score_completions_only(model.get_base_model() if lora else model)
        if config.launch.engine == "zero3":
            run_tower_always(model, processor)
    if lora and (config.model.adapter == "qlora" or config.launch.engine == "ddp"):
        train_in_fp32(trainer.model)
    trainer.checkpoints, trainer.launch_config = stage.path / "checkpoints", config.launch
    trainer.projector_rate = config.model.projector_learning_rate
    drop_stock_callbacks(trainer)


def leave_out_reference(trainer: CheckedDPOTrainer) -> None:
    """Train without a reference model. The memory of a reference that was built is freed."""
    trainer.precompute_ref_logps, trainer.ref_model = True, None


def use_cached_reference(
    trainer: CheckedDPOTrainer, config: Config, stage: Stage, processor: ProcessorMixin
) -> None:
    """Add the reference's log-probabilities to every row, from a cache file in the runs folder.

    Args:
        trainer: The trainer whose rows get the log-probabilities. The trainer's reference model is
            then freed.
        config: Config of the run.
        stage: Stage that is trained. The cache folder lies beside the folder of the stage's run.
        processor: Processor of the model.
    """
    folder, size = stage.run.path.parent / "reference_logps", config.dpo.per_device_batch_size
    for split in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, split)
        desc = f"reference {split.removesuffix('_dataset')}"
        key = cache_key(config, processor, rows)
        setattr(trainer, split, with_reference(trainer, rows, folder, key, size, desc))
    trainer.precompute_ref_logps = True
    trainer.ref_model = None  # this frees the reference model's memory


def save_trained(
    model: PreTrainedModel, processor: ProcessorMixin, stage: Stage, config: Config, card: str
) -> Path:
    """Write the stage's `model/`: the weights, the processor and a model card.

    With LoRA the weights are those of the adapter, else of the complete model.

    Args:
        model: The trained policy.
        processor: Processor of the model.
        stage: Stage to write into.
        config: Config of the run.
        card: Text of the model card.

    Returns:
        The folder `model/`.
    """
    target, state = stage.path / "model", zero_parameters.for_saving(model)
    if not machine.is_main():
        return target
    with writing(target):
        lora = {"selected_adapters": ["default"]} if config.model.with_lora else {}
        model.save_pretrained(target, **state, **lora)
        processor.save_pretrained(target)
        let_others_read(target)
    write_json(target / BASE_FILE, {"name": config.model.name, "files": model_hashes(config.model)})
    write_text(target / "README.md", card)
    return target


def _card(config: Config, summary: dict) -> str:
    dpo = config.dpo
    return model_card(
        config, "dpo", tags=("trl",), source="", table="held-out pairs",
        facts=[
            f"{summary['train_rows']} pairs",
            f"{summary['steps']} steps of {summary['global_batch_size']}",
            f"losses {list(dpo.loss_type)} weighted {list(dpo.loss_weights)}",
            *([f"label smoothing {dpo.label_smoothing}"] if dpo.label_smoothing else []),
            *([] if dpo.with_reference else ["no reference model"]),
            f"beta {dpo.beta}",
            f"peak rate {dpo.learning_rate}",
        ],
        results=summary["validation"],
    )  # fmt: skip
