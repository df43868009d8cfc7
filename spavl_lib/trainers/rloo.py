"""RLOO on trl's `RLOOTrainer` with our reward model: PPO's objective without a value model.

    spavl train rloo --profile demo

trl samples several answers to a prompt, compares each score with the mean score of the others, and
updates. Ours are the prompt's token ids, the score, the checkpoints and the checks. Every optimizer
step samples new answers, so no checkpoint falls between an answer and its update, and on a CPU a
resumed run ends with bit-identical weights. With vLLM it does not, because its sampler keeps a
random state of its own.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import RLOOConfig as TRLConfig
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from spavl_lib.config import Config, RLOOConfig
from spavl_lib.data.images import decode_images
from spavl_lib.data.lengths import check_prompt_lengths
from spavl_lib.data.templates import encode_prompts, neutralise
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
from spavl_lib.trainers.export_card import model_card
from spavl_lib.trainers.inputs import load_rows, policy_inputs, reward_folder
from spavl_lib.trainers.progress import drop_stock_callbacks, first_and_last_tenth, keep_steps
from spavl_lib.trainers.reward_function import RewardFunction, build_scorer
from spavl_lib.trainers.rollout import forbidden_token_ids

LOGGED = (
    "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl",
    "entropy", "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean",
    "num_tokens",
)  # fmt: skip


class _EpochSampler(RepeatSampler):
    """trl's sampler with an order that depends on seed and epoch alone, so runs can resume."""

    def set_epoch(self, epoch: int) -> None:
        """Set the order of an epoch."""
        self.generator.manual_seed(self.seed + 1_000_003 * epoch)


class CheckedRLOOTrainer(CheckedMixin, RLOOTrainer):
    """trl's trainer with our prompts, our checkpoints, and checks before every update."""

    prompts_compared = False
    trainable_counts: dict[str, int]

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        sampler = super()._get_train_sampler(dataset)
        return _EpochSampler(
            sampler.data_source, sampler.mini_repeat_count, sampler.batch_size,
            sampler.repeat_count, sampler.shuffle, sampler.seed,
        )  # fmt: skip

    def compute_loss(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        """trl's loss; raises if it is NaN or infinite."""
        return self.check_loss(model, super().compute_loss(model, *args, **options))

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        with autocast():  # trl samples without it: a 16-bit base would meet fp32 parameters
            return super()._generate_and_score_completions(inputs)

    def _prepare_inputs(self, inputs: Any) -> dict:
        self.row_ids = list(dict.fromkeys(row["id"] for row in inputs))
        return RLOOTrainer._prepare_inputs(self, inputs)

    def _tokenize_prompts(self, prompts: list) -> tuple[list, list | None, dict]:
        """Token ids as in training the reward model, which trl's own tokenisation can miss."""
        questions = [p[-1]["content"][-1]["text"] for p in prompts]
        images = [part["image"] for p in prompts for part in p[-1]["content"][:-1]]
        encoded = encode_prompts(self.processing_class, questions, images)
        fields: dict[str, Any] = dict(encoded.vision)
        if encoded.token_types is not None:
            fields["mm_token_type_ids"] = encoded.token_types
        if not self.prompts_compared:
            self.prompts_compared = True
            trl_ids = super()._tokenize_prompts(prompts)[0]
            compare_prompts(encoded.ids, trl_ids, has_types=encoded.token_types is not None)
        return encoded.ids, [[image] for image in images], fields


def compare_prompts(ours: list[list[int]], trl_ids: list[list[int]], *, has_types: bool) -> None:
    """Check at the first step whether trl would tokenise the prompts as our reward model saw them.

    Args:
        ours: Token ids that are used.
        trl_ids: Token ids that trl would use.
        has_types: Whether trl's token types, which belong to its own ids, enter the update.

    Raises:
        InputError: They differ, and the token types would not fit.
    """
    differing = sum(list(a) != list(b) for a, b in zip(ours, trl_ids, strict=True))
    if not differing:
        return
    problem = (
        f"trl's own tokenisation gives other ids for {differing} of {len(ours)} prompts "
        f"(they begin {list(trl_ids[0])[:4]} and end {list(trl_ids[0])[-4:]}; ours begin "
        f"{ours[0][:4]} and end {ours[0][-4:]})"
    )
    if has_types:
        raise InputError(
            f"{problem}, and the token types that this model family needs belong to those; use "
            "`spavl train ppo` instead"
        )
    warnings.warn(f"{problem}; ours are used, as in training the reward model", stacklevel=2)


def check_first(logs: dict) -> None:
    """Check at step 1 that policy and reference are the same model, and that scores differ.

    Args:
        logs: Logged values of step 1.

    Raises:
        AssertionError: Policy and reference differ before any update.
        InputError: All answers to each prompt have equal scores, so there is nothing to learn.
    """
    # trl logs exp(d) - d - 1, about d^2 / 2, for a difference d of log-probabilities.
    tolerance = 1e-4 if compute_dtype() == torch.float32 else logit_rounding() ** 2 / 2
    if abs(float(logs.get("kl", 0.0))) > tolerance:
        raise AssertionError(
            f"step 1: kl = {logs['kl']}, but it must be 0 before the first update; is dropout on, "
            "or is the reference another model?"
        )
    if float(logs["frac_reward_zero_std"]) == 1.0:
        raise InputError(
            "step 1: for every prompt, all answers have the same score, so there is nothing to "
            "learn; raise rloo.temperature or rloo.num_generations, or check the reward model"
        )


@stage_maker("rloo", inputs=policy_inputs, polls_stop=True)
def train_rloo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train against this run's reward model (or `rloo.reward_model`), and save the policy.

    Args:
        config: Uses `data`, `model`, `rloo` and `seed`.
        stage: As for `train_reward`, and so are `flag` and `live`.
        flag: Stop flag.
        live: Live plot.

    Returns and raises as `train_reward`; `InputError` also for a reward model that does not fit.
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
    [rows] = load_rows(config, stage, "train")
    processor = load_processor(config.model)
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
            "rloo.use_vllm needs the vllm package; run pip install vllm, or set it to false"
        )


def build_trainer(
    config: Config, stage: Stage, processor: ProcessorMixin, rows: Dataset, folder: Path
) -> CheckedRLOOTrainer:
    """Build trl's trainer over our prompts; with LoRA the reward model shares the policy's base.

    Args:
        config: Config of the run.
        stage: Stage to write into.
        processor: Processor of the model.
        rows: Training rows; their prompts are answered.
        folder: Reward model, a reward trainer's `model/`.

    Raises:
        InputError: Too few rows for a step, a row without an image, or a prompt without room for an
            answer.
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
            f"{', '.join(without[:20])}; leave them out, or use `spavl train ppo`, which takes them"
        )
    reward = RewardFunction(
        _no_scorer_yet, processor, batch_size=rloo.per_device_batch_size,
        missing_eos_penalty=rloo.missing_eos_penalty, log=stage.path / "rollouts.jsonl",
    )  # fmt: skip
    policy = load_model(config.model)
    if not lora:
        policy = policy.float()  # fp32 master weights, as in DPO
        freeze_for_full(policy, config.model)
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
    trainer.trainable_counts = assert_freeze_plan(trainer.model, config.model)
    reward.score = build_scorer(trainer.model, config, folder)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", 0)
    check_prompt_lengths(processor, rows, rloo.max_new_tokens, context, stage="rloo")
    trainer.checkpoints = stage.path / "checkpoints"
    drop_stock_callbacks(trainer)
    return trainer


def _no_scorer_yet(batch: dict[str, Tensor]) -> Tensor:
    raise RuntimeError("the reward model is loaded after the trainer has built the policy")


def _for_trl(processor: ProcessorMixin, batch: dict[str, list]) -> dict[str, list]:
    """Columns for trl: conversations, decoded images, and the original question and id."""
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
    # trl itself loads only the reference of full fine-tuning, from the base model's path.
    revision = {"revision": config.model.revision} if config.model.revision else None
    # trl's loader draws prompts itself; worker processes are left to the trainers of pairs.
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
    rloo, reward = config.rloo, summary["reward"]
    return model_card(
        config, "rloo", tags=("trl", "rlhf"), source="prompts of ", table="result",
        facts=[
            f"{summary['answers']} answers",
            f"{rloo.num_generations} to a prompt",
            f"{summary['steps']} steps",
            f"peak rate {rloo.learning_rate}",
            f"beta {rloo.beta}",
        ],
        results={
            "mean reward, first tenth of the steps": reward["first_steps"],
            "mean reward, last tenth": reward["last_steps"],
            "KL to the reference, last tenth, nats a token": summary["kl_a_token"]["last_steps"],
        },
    )  # fmt: skip
