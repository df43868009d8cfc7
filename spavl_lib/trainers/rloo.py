"""Train a policy by RLOO against the run's reward model, with trl's `RLOOTrainer`.

    spavl train rloo --profile demo

RLOO has the same objective as PPO, but no value model. trl samples several responses to a prompt,
compares each response's score with the mean score of the other responses, and updates the policy.
This package provides the prompts' token ids, the scores, the checkpoints and the checks.

Every optimizer step samples new responses, so a checkpoint never lies between sampling and update.
On a CPU a resumed run therefore ends with bit-identical weights. With vLLM the weights differ,
because vLLM's sampler has a random state that is not saved.
"""

import contextlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BatchFeature, ProcessorMixin
from trl import RLOOConfig as TRLConfig
from trl import RLOOTrainer
from trl.trainer import rloo_trainer
from trl.trainer.utils import RepeatSampler

from spavl_lib.config import Config, RLOOConfig
from spavl_lib.data.collate import pad_rows
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import EncodedPrompts, encode_prompts, end_ids, neutralise
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import (
    assert_freeze_plan,
    freeze_for_full,
    lora_config,
    train_in_fp32,
)
from spavl_lib.modelling.heads import check_reward_model
from spavl_lib.modelling.load import (
    autocast,
    compute_dtype,
    load_model,
    load_processor,
    logit_rounding,
    quiet_libraries,
)
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.arguments import common_arguments
from spavl_lib.trainers.dpo import save_trained
from spavl_lib.trainers.exact_trainer import CheckedMixin
from spavl_lib.trainers.export_card import model_card, policy_results
from spavl_lib.trainers.inputs import load_rows, policy_inputs, reward_folder
from spavl_lib.trainers.progress import drop_stock_callbacks, first_and_last_tenth, keep_steps
from spavl_lib.trainers.reward_function import RewardFunction, build_scorer
from spavl_lib.trainers.rollout import forbidden_token_ids
from spavl_lib.trainers.vllm_sampling import vllm_sampler

LOGGED = (
    "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl",
    "entropy", "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean",
    "num_tokens",
)  # fmt: skip


class _EpochSampler(RepeatSampler):
    """trl's sampler with an order that depends only on seed and epoch.

    A resumed run therefore continues with the same order.
    """

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.generator.manual_seed(self.seed + 1_000_003 * epoch)


class CheckedRLOOTrainer(CheckedMixin, RLOOTrainer):
    """trl's trainer with this package's prompts and checkpoints, and checks before every update."""

    processing_class: Any
    prompts_compared = False
    images_seen = True  # every row has an image: `build_trainer` checks this
    trainable_counts: dict[str, int]

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        sampler = super()._get_train_sampler(dataset)
        return _EpochSampler(
            sampler.data_source, sampler.mini_repeat_count, sampler.batch_size,
            sampler.repeat_count, sampler.shuffle, sampler.seed,
        )  # fmt: skip

    def compute_loss(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        """Return trl's loss.

        Raises:
            NonFiniteError: In training, the loss is NaN or infinite.
        """
        return self.check_loss(model, super().compute_loss(model, *args, **options))

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        # trl samples without autocast, so activations of a 16-bit base would meet fp32 parameters.
        with autocast():
            return super()._generate_and_score_completions(inputs)

    def _prepare_inputs(self, inputs: Any) -> dict:
        self.row_ids = list(dict.fromkeys(row["id"] for row in inputs))
        return RLOOTrainer._prepare_inputs(self, inputs)

    def _tokenize_prompts(self, prompts: list) -> tuple[list, list | None, dict]:
        """Encode prompts as in the training of the reward model.

        trl's own tokenisation can give other token ids.
        """
        questions = [p[-1]["content"][-1]["text"] for p in prompts]
        images = [part["image"] for p in prompts for part in p[-1]["content"][:-1]]
        processor = getattr(self.processing_class, "processor", self.processing_class)
        encoded = encode_prompts(processor, questions, images)
        if not self.prompts_compared:
            self.prompts_compared = True
            # trl does not pad for Pixtral's processor, which then raises ValueError when it builds
            # tensors. In this case the prompts are not compared.
            with contextlib.suppress(ValueError):
                compare_prompts(encoded.ids, super()._tokenize_prompts(prompts)[0])
        self.processing_class = _Encoded(processor, encoded)
        return encoded.ids, [[image] for image in images], encoded.vision | encoded.token_types


class _Encoded:
    """A stand-in for the processor, which returns the prompts as they were encoded for sampling.

    For the update trl calls the processor a second time on the prompts' text. The real processor
    would add the tokenizer's BOS before the template's BOS. Its token types would then not match
    the token ids that the responses were sampled from.

    Args:
        processor: The model's processor. It provides all other attributes.
        encoded: The encoded prompts of the step.
    """

    def __init__(self, processor: ProcessorMixin, encoded: EncodedPrompts):
        self.processor, self.encoded = processor, encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, **_: Any) -> BatchFeature:
        types = {n: pad_rows(rows, 0, "left") for n, rows in self.encoded.token_types.items()}
        return BatchFeature(self.encoded.vision | types)


def compare_prompts(ours: list[list[int]], trl_ids: list[list[int]]) -> None:
    """Warn if trl's own tokenisation of the prompts differs from the one that this package uses.

    The reward model was trained with this package's tokenisation.

    Args:
        ours: Token ids of each prompt, as this package encodes it. These ids are used.
        trl_ids: Token ids of each prompt, as trl would encode it.
    """
    differing = sum(list(a) != list(b) for a, b in zip(ours, trl_ids, strict=True))
    if differing:
        warnings.warn(
            f"trl's own tokenisation gives other ids for {differing} of {len(ours)} prompts "
            f"(they begin {list(trl_ids[0])[:4]} and end {list(trl_ids[0])[-4:]}; ours begin "
            f"{ours[0][:4]} and end {ours[0][-4:]}); ours are used, as in training the reward "
            "model",
            stacklevel=2,
        )


def check_first(logs: dict) -> None:
    """Check at step 1 that policy and reference are the same model, and that scores differ.

    Args:
        logs: Logged values of step 1.

    Raises:
        AssertionError: Policy and reference differ before any update.
        InputError: For every prompt, all responses have equal scores, so nothing can be learned.
    """
    # For a difference d of log-probabilities trl logs exp(d) - d - 1, which is about d^2 / 2.
    tolerance = 1e-4 if compute_dtype() == torch.float32 else logit_rounding() ** 2 / 2
    if abs(float(logs.get("kl", 0.0))) > tolerance:
        raise AssertionError(
            f"step 1: kl = {logs['kl']}, but it must be 0 before the first update; is dropout on, "
            "or is the reference another model?"
        )
    if float(logs["frac_reward_zero_std"]) == 1.0:
        raise InputError(
            "step 1: for every prompt, all responses have the same score, so there is nothing to "
            "learn; raise rloo.temperature or rloo.num_generations, or check the reward model"
        )


@stage_maker("rloo", inputs=policy_inputs, polls_stop=True)
def train_rloo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train against this run's reward model (or `rloo.reward_model`), and save the policy.

    Args:
        config: Uses `data`, `model`, `rloo` and `seed`.
        stage: See `train_reward`.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary. It names no best step, because no held-out rows are measured.

    Raises:
        SpavlError: For the reasons that `train_ppo` lists.
    """
    folder = reward_folder(config.rloo.reward_model, stage)
    if config.model.share_prefix == "require":
        raise InputError(
            "model.share_prefix = require does not work for RLOO, because trl computes the forward "
            "passes; set it to auto"
        )
    check_vllm(config.rloo)
    check_reward_model(config.model, folder)
    quiet_libraries()
    processor = load_processor(config.model)
    [rows] = load_rows(config, stage, processor, "train")
    trainer = build_trainer(config, stage, processor, rows, folder)
    ckpt.check_room(trainer.checkpoints, trainer.model)
    trainer.report_to_stage(
        stage, flag, logged=LOGGED, live=live, accuracy="reward", check_first=check_first
    )
    newest = ckpt.newest_checkpoint(trainer.checkpoints)
    keep_steps(stage.path / "rollouts.jsonl", ckpt.load_state(newest)["step"] if newest else 0)
    trainer.train_from(newest)
    summary = _summary(config, stage, trainer, rows)
    save_trained(trainer.model, processor, stage, config, _card(config, summary))
    return summary


def check_vllm(rloo: RLOOConfig) -> None:
    """Raise if `rloo.use_vllm` is set and vLLM cannot sample on this machine.

    Raises:
        InputError: There is no CUDA GPU, or the package is missing.
    """
    if not rloo.use_vllm:
        return
    if not torch.cuda.is_available():
        raise InputError(
            "rloo.use_vllm needs a CUDA GPU, and this machine has none; set it to false"
        )
    if not importlib.util.find_spec("vllm"):
        raise InputError(
            "rloo.use_vllm needs the vllm package (docs/vllm.md); install it, or set it to false"
        )


def build_trainer(
    config: Config, stage: Stage, processor: ProcessorMixin, rows: Dataset, folder: Path
) -> CheckedRLOOTrainer:
    """Build trl's trainer with this package's prompts.

    With LoRA, policy and reward model share one base.

    Args:
        config: Config of the run.
        stage: Stage to write into.
        processor: Processor of the model.
        rows: Training rows, which provide the prompts.
        folder: Folder of the reward model: the `model/` that the reward trainer wrote.

    Raises:
        InputError: There are too few rows for a step, or a row has no image.
    """
    rloo, lora = config.rloo, config.model.with_lora
    prompts_a_step = rloo.global_batch_size // rloo.num_generations
    if len(rows) < prompts_a_step:
        raise InputError(
            f"{len(rows)} training rows, but a step takes {prompts_a_step} prompts; raise "
            "data.train_rows, or lower rloo.per_device_batch_size or "
            "rloo.gradient_accumulation_steps"
        )
    without = [i for i, cell in zip(rows["id"], rows["image"], strict=True) if cell is None]
    if without:
        raise InputError(
            f"trl's RLOO needs an image with every prompt, and {len(without)} rows have none: "
            f"{', '.join(without[:20])}; leave these rows out, or use `spavl train ppo`, which "
            "also takes prompts without an image"
        )
    reward = RewardFunction(
        _no_scorer_yet, processor, batch_size=rloo.per_device_batch_size,
        missing_eos_penalty=rloo.missing_eos_penalty, log=stage.path / "rollouts.jsonl",
    )  # fmt: skip
    policy = load_model(config.model)
    reward.end_ids = end_ids(processor, policy)
    policy.generation_config.eos_token_id = list(reward.end_ids)  # trl stops responses at these ids
    if not lora:
        policy = policy.float()  # the master weights must be fp32, as in DPO
        freeze_for_full(policy, config.model)
    with vllm_sampler(rloo_trainer):
        trainer = CheckedRLOOTrainer(
            model=policy,
            reward_funcs=reward,
            args=_arguments(config, stage, processor),
            train_dataset=rows.select_columns(["id", "prompt", "image"]).with_transform(
                lambda batch: _for_trl(processor, batch)
            ),
            processing_class=processor,
            peft_config=lora_config(policy, config.model) if lora else None,
        )
    if lora:
        train_in_fp32(trainer.model)
    elif trainer.ref_model is not None:
        # trl loads the reference in the type in which its weights are stored, but `load_model` has
        # rounded the policy's weights to 16 bit. If the stored type is another one, the models
        # differ. The reference therefore gets the policy's weights.
        trainer.ref_model.load_state_dict(policy.state_dict())
    trainer.trainable_counts = assert_freeze_plan(trainer.model, config.model)
    reward.score = build_scorer(trainer.model, config, folder)
    trainer.checkpoints = stage.path / "checkpoints"
    drop_stock_callbacks(trainer)
    return trainer


def _no_scorer_yet(batch: dict[str, Tensor]) -> Tensor:
    raise RuntimeError("the reward model is loaded after the trainer has built the policy")


def _for_trl(processor: ProcessorMixin, batch: dict[str, list]) -> dict[str, list]:
    """Build trl's columns: conversations, decoded images, unchanged questions, and row ids."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    chats = [[{"role": "user", "content": neutralise(q, processor)}] for q in batch["prompt"]]
    return {
        "id": batch["id"],
        "question": batch["prompt"],
        "prompt": chats,
        "image": decode_images(rows),
    }


def _arguments(config: Config, stage: Stage, processor: ProcessorMixin) -> TRLConfig:
    rloo, forbidden = config.rloo, forbidden_token_ids(processor)
    if rloo.use_vllm:
        sampling: dict[str, Any] = {"logit_bias": dict.fromkeys(forbidden, -100.0)}
    else:
        sampling = {"suppress_tokens": list(forbidden)}
    # trl loads only one model itself: the reference of full fine-tuning, by the base model's name.
    # That model needs the revision.
    revision = {"revision": config.model.revision} if config.model.revision else None
    # `data.num_workers` applies to preference pairs only, because the collator of pairs decodes
    # images and tokenises. RLOO's data loader needs no worker processes.
    common = common_arguments("rloo", config, stage) | {"dataloader_num_workers": 0}
    return TRLConfig(
        **common,
        num_generations=rloo.num_generations,
        max_completion_length=rloo.max_new_tokens,
        generation_kwargs=sampling,
        temperature=rloo.temperature,
        beta=rloo.beta,
        normalize_advantages=rloo.normalize_advantages,
        model_init_kwargs=None if config.model.with_lora else revision,
        use_vllm=rloo.use_vllm,
        vllm_mode=rloo.vllm_mode,
        vllm_server_base_url=rloo.vllm_server_base_url or None,
        vllm_gpu_memory_utilization=rloo.vllm_gpu_memory_utilization,
        disable_dropout=True,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )


def _summary(config: Config, stage: Stage, trainer: CheckedRLOOTrainer, rows: Dataset) -> dict:
    logged = [r for r in read_jsonl(stage.metrics_path) if "reward" in r]
    return {
        "steps": trainer.state.global_step,
        "prompts": len(rows),
        "answers": trainer.state.global_step * config.rloo.global_batch_size,
        "trainable_parameters": trainer.trainable_counts,
        "reward": first_and_last_tenth(logged, "reward"),
        "kl_a_token": {"last_steps": first_and_last_tenth(logged, "kl")["last_steps"]},
        "weights_sha256": ckpt.tensors_sha256(ckpt.trainable_tensors(trainer.model)),
    }


def _card(config: Config, summary: dict) -> str:
    rloo = config.rloo
    return model_card(
        config, "rloo", tags=("trl", "rlhf"), source="prompts of ", table="result",
        facts=[
            f"{summary['answers']} responses",
            f"{rloo.num_generations} for each prompt",
            f"{summary['steps']} steps",
            f"peak rate {rloo.learning_rate}",
            f"beta {rloo.beta}",
        ],
        results=policy_results(
            "reward", summary["reward"], summary["kl_a_token"]["last_steps"], "token"
        ),
    )  # fmt: skip
