"""Training against rewards with groups of responses: what RLOO and GRPO share.

trl samples several responses to a prompt, and compares each response's reward with the rewards of
the others. So no value model is needed. This package provides the prompts' token ids, the rewards,
the checkpoints and the checks.

Every optimizer step samples new responses, so a checkpoint never lies between sampling and update.
On a CPU a resumed run therefore ends with bit-identical weights. With vLLM the weights differ,
because vLLM's sampler has a random state that is not saved.
"""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BatchFeature, ProcessorMixin, Trainer
from trl.trainer.utils import RepeatSampler

from spavl_lib.config import Config, GroupConfig
from spavl_lib.data.collate import pad_rows
from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import EncodedPrompts, encode_prompts, end_ids, neutralise
from spavl_lib.errors import InputError, NonFiniteError
from spavl_lib.modelling.adapters import (
    assert_freeze_plan,
    freeze_for_full,
    lora_config,
    train_in_fp32,
)
from spavl_lib.modelling.load import (
    autocast,
    compute_dtype,
    load_model,
    load_processor,
    logit_rounding,
    quiet_libraries,
)
from spavl_lib.runs.files import append_jsonl, read_jsonl
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.arguments import common_arguments
from spavl_lib.trainers.dpo import save_trained
from spavl_lib.trainers.exact_trainer import CheckedMixin
from spavl_lib.trainers.export_card import model_card, policy_results
from spavl_lib.trainers.guards import REMEDY
from spavl_lib.trainers.inputs import check_images, load_rows, reward_folder
from spavl_lib.trainers.progress import drop_stock_callbacks, first_and_last_tenth, keep_steps
from spavl_lib.trainers.reward_function import RewardFunction, build_scorer
from spavl_lib.trainers.rewards import Reward, build_rewards, check_rewards
from spavl_lib.trainers.rollout import forbidden_token_ids
from spavl_lib.trainers.vllm_sampling import vllm_sampler

LOGGED = (
    "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl",
    "entropy", "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean",
    "num_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class GroupMethod:
    """A method that compares the responses of a group."""

    trainer: type
    """trl's trainer with `GroupMixin`."""
    arguments: Callable[[Any, dict[str, Any]], Any]
    """Makes trl's arguments from the method's section of the config and the common arguments."""
    module: ModuleType
    """The module of trl's trainer, in which trl looks its vLLM sampler up."""


class _EpochSampler(RepeatSampler):
    """trl's sampler with an order that depends only on seed and epoch.

    A resumed run therefore continues with the same order.
    """

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.generator.manual_seed(self.seed + 1_000_003 * epoch)


class GroupMixin(CheckedMixin, Trainer):
    """For a trainer of trl: this package's prompts and checkpoints, and checks before updates."""

    processing_class: Any
    prompts_compared = False
    images_seen = True  # every row has an image: `build_trainer` checks this
    trainable_counts: dict[str, int]
    section: GroupConfig
    stage: Stage
    rewards: list[Reward]
    ends: Sequence[int]

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
        return super(CheckedMixin, self)._prepare_inputs(inputs)

    def _calculate_rewards(
        self,
        inputs: list[dict],
        prompts: list,
        completions: list,
        completion_ids_list: list,
    ) -> Tensor:
        """Compute and log the rewards (responses, rewards).

        Raises:
            InputError: Every response is empty, or a reward has the wrong form.
            NonFiniteError: A reward is NaN or infinite. trl would silently drop such a response.
        """
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ids = [row["id"] for row in inputs]
        texts = [tokenizer.decode(c, skip_special_tokens=True).strip() for c in completion_ids_list]
        if not any(texts):
            raise InputError(
                f"every response is empty (rows {ids[0]}, ...): the policy has collapsed; lower "
                f"{self.stage.name}.learning_rate or raise {self.stage.name}.beta, and start from "
                "an earlier checkpoint"
            )
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for reward, column in zip(self.rewards, found.T, strict=True):
            bad = [i for i, fine in zip(ids, column.isfinite().tolist(), strict=True) if not fine]
            if bad:
                raise NonFiniteError(
                    f"the reward {reward.__name__!r} is not finite on rows {', '.join(bad[:10])}; "
                    f"{getattr(reward, 'remedy', REMEDY)}"
                )
        weights = torch.tensor(self.section.reward_weights, device=found.device)
        rows = zip(ids, inputs, texts, completion_ids_list, found.tolist(), strict=True)
        append_jsonl(
            self.stage.path / "rollouts.jsonl",
            [
                {
                    "step": self.state.global_step + 1, "id": row_id, "prompt": row["question"],
                    "response": text, "reward": round(total, 6),
                    "rewards": {
                        r.__name__: round(v, 6) for r, v in zip(self.rewards, values, strict=True)
                    },
                    "num_tokens": len(tokens), "finished": bool(tokens) and tokens[-1] in self.ends,
                }
                for (row_id, row, text, tokens, values), total in zip(
                    rows, (found * weights).sum(1).tolist(), strict=True
                )
            ],
        )  # fmt: skip
        return found

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


def check_first(logs: dict, section: str) -> None:
    """Check at step 1 that policy and reference are the same model, and that rewards differ.

    Args:
        logs: Logged values of step 1.
        section: Name of the method's section of the config.

    Raises:
        AssertionError: Policy and reference differ before any update.
        InputError: For every prompt, all responses have equal rewards, so nothing can be learned.
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
            "step 1: for every prompt, all responses have the same reward, so there is nothing to "
            f"learn; raise {section}.temperature or {section}.num_generations, or check the rewards"
        )


def train_group(
    method: GroupMethod, config: Config, stage: Stage, flag: StopFlag, live: Any = None
) -> dict:
    """Train against the rewards of the method's section, and save the policy.

    Args:
        method: The method.
        config: Uses `data`, `model`, the method's section and `seed`.
        stage: See `train_reward`. Its name is the name of the method's section.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary. It names no best step, because no held-out rows are measured.

    Raises:
        SpavlError: For the reasons that `train_ppo` lists.
    """
    name = stage.name
    if config.model.share_prefix == "require":
        raise InputError(
            f"model.share_prefix = require does not work for {name.upper()}, because trl computes "
            "the forward passes; set it to auto"
        )
    check_vllm(name, config.section(name))
    check_rewards(config, stage)
    quiet_libraries()
    processor = load_processor(config.model)
    [rows] = load_rows(config, stage, processor, "train")
    trainer = build_trainer(method, config, stage, processor, rows)
    ckpt.check_room(trainer.checkpoints, trainer.model)
    trainer.report_to_stage(
        stage, flag, logged=logged(trainer.rewards), live=live, accuracy="reward",
        check_first=functools.partial(check_first, section=name),
    )  # fmt: skip
    newest = ckpt.newest_checkpoint(trainer.checkpoints)
    keep_steps(stage.path / "rollouts.jsonl", ckpt.load_state(newest)["step"] if newest else 0)
    trainer.train_from(newest)
    summary = _summary(stage, trainer, rows)
    save_trained(trainer.model, processor, stage, config, _card(config, stage.name, summary))
    return summary


def check_vllm(name: str, section: GroupConfig) -> None:
    """Raise if `use_vllm` is set and vLLM cannot sample on this machine.

    Args:
        name: Name of the method's section.
        section: The section.

    Raises:
        InputError: There is no CUDA GPU, or the package is missing.
    """
    if not section.use_vllm:
        return
    if not torch.cuda.is_available():
        raise InputError(
            f"{name}.use_vllm needs a CUDA GPU, and this machine has none; set it to false"
        )
    if not importlib.util.find_spec("vllm"):
        raise InputError(
            f"{name}.use_vllm needs the vllm package (docs/vllm.md); install it, or set it to false"
        )


def build_trainer(
    method: GroupMethod, config: Config, stage: Stage, processor: ProcessorMixin, rows: Dataset
) -> Any:
    """Build trl's trainer with this package's prompts and rewards.

    With LoRA, policy and reward model share one base.

    Args:
        method: The method.
        config: Config of the run.
        stage: Stage to write into. Its name is the name of the method's section.
        processor: Processor of the model.
        rows: Training rows, which provide the prompts.

    Raises:
        InputError: There are too few rows for a step, a row has no image, or a reward cannot be
            made.
    """
    name, section, lora = stage.name, config.section(stage.name), config.model.with_lora
    prompts_a_step = section.global_batch_size // section.num_generations
    if len(rows) < prompts_a_step:
        raise InputError(
            f"{len(rows)} training rows, but a step takes {prompts_a_step} prompts; raise "
            f"data.train_rows, or lower {name}.per_device_batch_size or "
            f"{name}.gradient_accumulation_steps"
        )
    check_images(name, config.data, rows)
    policy = load_model(config.model)
    ends = end_ids(processor, policy)
    policy.generation_config.eos_token_id = list(ends)  # trl stops responses at these ids
    if not lora:
        policy = policy.float()  # the master weights must be fp32, as in DPO
        freeze_for_full(policy, config.model)
    rewards = build_rewards(config, stage, processor, ends)
    with vllm_sampler(method.module):
        trainer = method.trainer(
            model=policy,
            reward_funcs=rewards,
            args=method.arguments(section, _arguments(config, stage, processor)),
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
    for reward in rewards:
        if isinstance(reward, RewardFunction):
            folder = reward_folder(section.reward_model, stage)
            reward.score = build_scorer(trainer.model, config, folder)
    trainer.section, trainer.stage, trainer.rewards, trainer.ends = section, stage, rewards, ends
    trainer.checkpoints = stage.path / "checkpoints"
    trainer.projector_rate = config.model.projector_learning_rate
    drop_stock_callbacks(trainer)
    return trainer


def logged(rewards: Sequence[Reward]) -> tuple[str, ...]:
    """Names of the logged values: those of all methods, and the mean of each of several rewards."""
    several = [f"rewards/{reward.__name__}/mean" for reward in rewards]
    return (*LOGGED, *(several if len(several) > 1 else ()))


def _for_trl(processor: ProcessorMixin, batch: dict[str, list]) -> dict[str, list]:
    """Build trl's columns: conversations, decoded images, unchanged questions, and row ids."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    chats = [[{"role": "user", "content": neutralise(q, processor)}] for q in batch["prompt"]]
    return {
        "id": batch["id"],
        "question": batch["prompt"],
        "prompt": chats,
        "image": [image for [image] in decode_images(rows)],
    }


def _arguments(config: Config, stage: Stage, processor: ProcessorMixin) -> dict[str, Any]:
    """Keyword arguments that the configs of trl's RLOO and GRPO have in common."""
    section, forbidden = config.section(stage.name), forbidden_token_ids(processor)
    if section.use_vllm:
        sampling: dict[str, Any] = {"logit_bias": dict.fromkeys(forbidden, -100.0)}
    else:
        sampling = {"suppress_tokens": list(forbidden)}
    # trl loads only one model itself: the reference of full fine-tuning, by the base model's name.
    # That model needs the revision.
    revision = {"revision": config.model.revision} if config.model.revision else None
    return {
        **common_arguments(stage.name, config, stage),
        # `data.num_workers` applies to preference pairs only, because the collator of pairs decodes
        # images and tokenises. Prompts need no worker processes.
        "dataloader_num_workers": 0,
        "num_generations": section.num_generations,
        "max_completion_length": section.max_new_tokens,
        "generation_kwargs": sampling,
        "temperature": section.temperature,
        "beta": section.beta,
        "reward_weights": list(section.reward_weights),
        "model_init_kwargs": None if config.model.with_lora else revision,
        "use_vllm": section.use_vllm,
        "vllm_mode": section.vllm_mode,
        "vllm_server_base_url": section.vllm_server_base_url or None,
        "vllm_gpu_memory_utilization": section.vllm_gpu_memory_utilization,
        "disable_dropout": True,
        "gradient_checkpointing": config.model.gradient_checkpointing,
    }


def _summary(stage: Stage, trainer: Any, rows: Dataset) -> dict:
    log = [r for r in read_jsonl(stage.metrics_path) if "reward" in r]
    several = {
        reward.__name__: first_and_last_tenth(log, f"rewards/{reward.__name__}/mean")
        for reward in trainer.rewards
    }
    return {
        "steps": trainer.state.global_step,
        "prompts": len(rows),
        "answers": trainer.state.global_step * trainer.section.global_batch_size,
        "trainable_parameters": trainer.trainable_counts,
        "reward": first_and_last_tenth(log, "reward"),
        **({"rewards": several} if len(several) > 1 else {}),
        "kl_a_token": {"last_steps": first_and_last_tenth(log, "kl")["last_steps"]},
        "weights_sha256": ckpt.tensors_sha256(ckpt.trainable_tensors(trainer.model)),
    }


def _card(config: Config, name: str, summary: dict) -> str:
    section = config.section(name)
    return model_card(
        config, name, tags=("trl", "rlhf"), source="prompts of ", table="result",
        facts=[
            f"{summary['answers']} responses",
            f"{section.num_generations} for each prompt",
            f"{summary['steps']} steps",
            f"peak rate {section.learning_rate}",
            f"beta {section.beta}",
        ],
        results=policy_results(
            "reward", summary["reward"], summary["kl_a_token"]["last_steps"], "token"
        ),
    )  # fmt: skip
