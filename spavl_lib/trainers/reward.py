"""Train the reward model, a vision-language model with a scalar head.

    spavl train reward --profile demo

A linear head reads the backbone's last hidden state at the last token that is not padding. The
model is trained to give the chosen response of each pair the higher score (Bradley-Terry). trl's
RewardTrainer does not support images, so this module uses transformers' `Trainer` with another
loss.
"""

import itertools
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin, Trainer, TrainingArguments, set_seed

from spavl_lib import machine
from spavl_lib.config import Config
from spavl_lib.data.augment import moved_images
from spavl_lib.data.load import exchange_twins, load_pair_truth, load_preferences, with_images_of
from spavl_lib.distributed import group, zero_parameters
from spavl_lib.errors import InputError, Preempted
from spavl_lib.evaluation.metrics import cost_metrics, pair_of_pairs_accuracy, reward_metrics
from spavl_lib.modelling.adapters import (
    add_lora,
    assert_freeze_plan,
    freeze_for_full,
    masters_in_fp32,
)
from spavl_lib.modelling.blank_image import run_tower_always
from spavl_lib.modelling.heads import ScalarHeadModel, save_reward_model
from spavl_lib.modelling.load import (
    load_model,
    load_processor,
    quiet_libraries,
)
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.objectives.reward import bradley_terry_loss, cost_loss
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import write_jsonl, write_text, writing
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import RESUME, StopFlag
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
from spavl_lib.trainers.progress import drop_stock_callbacks, number

LOGGED = (
    "loss", "grad_norm", "learning_rate", "rewards/accuracies", "rewards/margins",
    "rewards/chosen", "rewards/rejected", "costs/chosen", "costs/rejected", "costs/accuracies",
)  # fmt: skip

SWAPPED = 64  # largest number of held-out pairs that are scored again with exchanged responses


class VLMRewardTrainer(WholeStepMixin, CheckedMixin, Trainer):
    """transformers' trainer with the Bradley-Terry loss over collated pairs.

    Args:
        config: Config of the run. Its `reward` section configures the loss.
        args: Positional arguments of `Trainer`.
        kwargs: Keyword arguments of `Trainer`.
    """

    def __init__(self, *args: Any, config: Config, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.settings = config.reward
        self.sums: dict[str, list[float]] = {}
        self.harmful: dict[str, bool] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute this micro-batch's part () of the step's loss, in nats.

        The loss is the mean Bradley-Terry loss over the pairs. If `reward.sft_coef` is set, the
        weighted cross-entropy of the chosen responses is added, and likewise the weighted loss of
        the cost head if `reward.cost_coef` is set.

        Args:
            model: The reward model, as accelerate prepared it.
            inputs: A batch of the collator. The first half of its rows are chosen responses, the
                second half rejected ones.
            return_outputs: Whether to return the chosen responses' scores too.
            num_items_in_batch: Not used. transformers passes it.

        Raises:
            NonFiniteError: In training, the loss is NaN or infinite.
        """
        batch = {k: v for k, v in inputs.items() if k not in ("completion_mask", "row_ids")}
        moves = self.settings.shift_px or self.settings.mirror
        if model.training and moves and "pixel_values" in batch:
            batch["pixel_values"] = self._augmented(batch["pixel_values"], batch["input_ids"])
        coef, cost_coef = self.settings.sft_coef, self.settings.cost_coef
        if cost_coef:
            batch["costs"] = True
        if coef:
            mask = inputs["completion_mask"].clone()
            mask[len(mask) // 2 :] = 0  # chosen responses only
            batch["completion_mask"] = mask
        outputs = model(**batch)
        scores, *others = outputs if coef or cost_coef else (outputs,)
        chosen, rejected = scores.chunk(2)
        loss = bradley_terry_loss(
            chosen,
            rejected,
            center_coef=self.settings.center_coef,
            original_form=self.settings.original_form,
        ).mean()
        if coef:
            loss = loss - coef * others[-1][: len(chosen)].mean()
        if cost_coef:
            loss = loss + cost_coef * self._cost_loss(others[0], model.training)
        loss = loss * self.shares(inputs, model.training)[0]
        self.check_loss(model, loss)
        if model.training:
            margins = (chosen - rejected).detach()
            for key, value in (
                ("rewards/accuracies", (margins > 0).float().mean()),
                ("rewards/margins", margins.mean()),
                ("rewards/chosen", chosen.detach().mean()),
                ("rewards/rejected", rejected.detach().mean()),
            ):
                self.sums.setdefault(key, []).append(float(value))
        return (loss, {"scores": chosen}) if return_outputs else loss

    def _cost_loss(self, costs: Tensor, training: bool) -> Tensor:
        """Compute the mean loss () of the costs of a micro-batch, in nats, and log the costs.

        Args:
            costs: Costs (2 * pairs,), those of the chosen responses first.
            training: Whether to log.
        """
        chosen, rejected = costs.chunk(2)
        harmful = torch.tensor([self.harmful[row] for row in self.row_ids], device=chosen.device)
        if training:
            right = torch.cat([chosen < 0, (rejected > 0) == harmful])
            for key, value in (
                ("costs/accuracies", right.float().mean()),
                ("costs/chosen", chosen.detach().mean()),
                ("costs/rejected", rejected.detach().mean()),
            ):
                self.sums.setdefault(key, []).append(float(value))
        return cost_loss(chosen, rejected, harmful).mean()

    def _augmented(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Shift and mirror training images, equally for both rows of a pair.

        Args:
            pixels: Images (2 * pairs with an image, ...).
            ids: Token ids (2 * pairs, seq), which show which pairs have an image.
        """
        rows = self.row_ids
        if len(pixels) != 2 * len(rows):
            slots = ids[: len(rows)] == self.model.vlm.config.image_token_id
            rows = [row for row, has in zip(rows, slots.any(1).tolist(), strict=True) if has]
        place = f"{self.args.seed}/{self.state.global_step}"
        half = moved_images(
            pixels[: len(pixels) // 2],
            [f"{place}/{row}" for row in rows],
            shift_px=self.settings.shift_px,
            mirror=self.settings.mirror,
        )
        return torch.cat([half, half])

    def log(self, logs: dict, *args: Any, **kwargs: Any) -> None:
        """Add the scores' means to the log, and write it.

        The means are over all micro-batches and processes since the last logged step.
        """
        if "loss" in logs:
            logs |= group.mean_of({k: sum(v) / len(v) for k, v in self.sums.items()})
            self.sums = {}
        super().log(logs, *args, **kwargs)


@stage_maker("reward", inputs=training_inputs, polls_stop=True)
def train_reward(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train the reward model, score the held-out pairs, and save the model.

    Args:
        config: Uses `data`, `model`, `reward` and `seed`.
        stage: Stage to write into. Training resumes from its newest complete checkpoint.
        flag: Stop flag, which a signal sets. Training polls the flag after each step.
            `@stage_maker` passes the flag.
        live: Object with `update(rows)`, such as `plotting.LivePlot`. None shows no plot.

    Returns:
        The stage's summary. Its `metrics` hold pair accuracy, calibration and controls. The summary
        names no best step, because the held-out pairs are scored only after the training.

    Raises:
        InputError: Data, model or settings are invalid.
        NonFiniteError: A loss or gradient is NaN or infinite.
        Preempted: The stop flag is set. The same call continues the training.
    """
    quiet_libraries()
    harmful = harm_labels(config) if config.reward.cost_coef else {}
    processor = load_processor(config.model)
    train_rows, held_out = load_rows(config, stage, processor, "train", "validation")
    trainer = build_trainer(config, stage, processor, train_rows)
    trainer.harmful = harmful
    parts = assert_freeze_plan(trainer.model.vlm, config.model, head=False)
    check_rows_fit(trainer, train_rows, processor)
    ckpt.check_room(trainer.checkpoints, trainer.model)
    trainer.report_to_stage(stage, flag, logged=LOGGED, live=live)
    trainer.train_from(ckpt.newest_checkpoint(trainer.checkpoints))
    model, size = trainer.model.eval(), config.reward.per_device_batch_size
    scored = score_pairs(model, processor, held_out, size, should_stop=flag)
    exchanged = []
    if len(held_out) > 1:  # a single row has no other image to exchange with
        moved = exchange_images(held_out)
        exchanged = score_pairs(model, processor, moved, size, should_stop=flag)
    turned = exchange_answers(held_out.select(range(min(SWAPPED, len(held_out)))))
    swapped = score_pairs(model, processor, turned, size, should_stop=flag)
    if machine.is_main():
        write_jsonl(stage.path / "samples.jsonl", scored)
    metrics = reward_metrics(scored, exchanged, swapped, load_pair_truth(config.data))
    if model.cost is not None:
        metrics["cost"] = cost_metrics(scored, harmful)
    if config.data.source == "mini":
        twins = load_preferences(config.data, "twins")
        for key, rows in (
            ("twin_accuracy", twins),
            ("twin_accuracy_exchanged", exchange_twins(twins)),
        ):
            scored_twins = score_pairs(model, processor, rows, size, should_stop=flag)
            metrics[key] = pair_of_pairs_accuracy(scored_twins)
            if model.cost is not None:
                metrics["cost"][key] = cost_metrics(scored_twins, harmful)["pair_accuracy"]
    summary = {
        "steps": trainer.state.global_step,
        "train_rows": len(train_rows),
        "validation_rows": len(held_out),
        "launch": trainer.engine_found,
        "trainable_parameters": parts
        | {
            name: zero_parameters.numel(head.weight)
            for name, head in (("score", model.score), ("cost", model.cost))
            if head is not None
        },
        "metrics": metrics,
        "final_loss": number(
            next(h["loss"] for h in trainer.state.log_history[::-1] if "loss" in h)
        ),
        "weights_sha256": ckpt.tensors_sha256(ckpt.trainable_tensors(model)),
    }
    target = stage.path / "model"
    with writing(target):
        save_reward_model(model, target, config.model)
        if machine.is_main():
            processor.save_pretrained(target)
            write_text(target / "README.md", _card(config, summary))
    return summary


def _card(config: Config, summary: dict) -> str:
    reward, metrics = config.reward, summary["metrics"]
    pairs = reward.per_device_batch_size * reward.gradient_accumulation_steps
    rates = {name: metrics[name]["value"] for name in ("pair_accuracy",) if name in metrics}
    return model_card(
        config, "reward", tags=("reward-model",), source="", table="held-out pairs",
        title="Reward model over",
        use=(
            "it scores answers by the preferences of its training pairs, and a policy can learn to "
            "please it without being safe"
        ),
        facts=[
            f"{summary['train_rows']} pairs",
            f"{summary['steps']} steps of {pairs}",
            f"peak rate {reward.learning_rate}",
        ],
        results=rates | {"final loss": summary["final_loss"]},
    )  # fmt: skip


def harm_labels(config: Config) -> dict[str, bool]:
    """Row id -> whether the request is harmful, so that the rejected response does harm.

    Args:
        config: Uses `data`.

    Raises:
        InputError: The source of the pairs does not say which requests are harmful, or pairs of
            `data.extra_path` are added, which have no labels.
    """
    if config.data.extra_path:
        raise InputError(
            f"reward.cost_coef = {config.reward.cost_coef} needs labels of harmful requests, and "
            f"the pairs of data.extra_path {config.data.extra_path!r} have none; set "
            "reward.cost_coef to 0, or data.extra_path to an empty text"
        )
    labels = {
        row: bool(facts["harmful"])
        for row, facts in load_pair_truth(config.data).items()
        if "harmful" in facts
    }
    if not labels:
        raise InputError(
            f"reward.cost_coef = {config.reward.cost_coef} needs labels of harmful requests, and "
            f"data.source {config.data.source} has none; set data.source to mini, or "
            "reward.cost_coef to 0"
        )
    return labels


def build_model(config: Config) -> ScalarHeadModel:
    """Build the base model with a new scalar head, and freeze what is not trained."""
    vlm = load_model(config.model)
    set_seed(config.seed)  # seeded after loading, because loading in shards uses random numbers
    if not config.model.with_lora:
        # As in DPO, the master weights must be fp32. DeepSpeed keeps fp32 master weights itself.
        if config.launch.engine == "ddp":
            vlm = vlm.float()
        freeze_for_full(vlm, config.model)
        # Scores do not depend on the language-model head, so the head stays frozen.
        vlm.get_output_embeddings().requires_grad_(False)
    else:
        vlm = add_lora(vlm, config.model)
        if config.launch.engine == "ddp":
            masters_in_fp32(vlm)
    if config.model.gradient_checkpointing:
        vlm.gradient_checkpointing_enable({"use_reentrant": False})
    apply_sharing(vlm, config.model.share_prefix)
    model = ScalarHeadModel(vlm, with_cost=config.reward.cost_coef > 0)
    return model.to(next(vlm.parameters()).device)


def build_trainer(
    config: Config, stage: Stage, processor: ProcessorMixin, train_rows: Dataset
) -> VLMRewardTrainer:
    """Build the trainer with its model and collator.

    Args:
        config: Config of the run.
        stage: Stage to write into.
        processor: Processor of the model.
        train_rows: Preference rows to train on.
    """
    arguments = TrainingArguments(**common_arguments("reward", config, stage))
    model = build_model(config)
    if config.launch.engine == "zero3":
        run_tower_always(model, processor)
    trainer = VLMRewardTrainer(
        model=model,
        args=arguments,
        data_collator=RowCollator(processor, limit_of(config, "reward").longest),
        train_dataset=train_rows,
        config=config,
    )
    trainer.group_by_image = config.data.group_by_image
    trainer.checkpoints, trainer.launch_config = stage.path / "checkpoints", config.launch
    trainer.projector_rate = config.model.projector_learning_rate
    drop_stock_callbacks(trainer)
    return trainer


@torch.no_grad()
def score_pairs(
    model: ScalarHeadModel,
    processor: ProcessorMixin,
    rows: Dataset,
    batch_size: int,
    *,
    should_stop: object = False,
) -> list[dict]:
    """Score both responses of every pair.

    The batches are divided among the processes. Every process gets the results of all pairs.

    Args:
        model: Reward model, in evaluation mode.
        processor: Processor of the model.
        rows: Preference rows.
        batch_size: Number of pairs in a batch.
        should_stop: Stop flag, polled before each batch.

    Returns:
        For each pair: id, prompt, classes, question type, both scores, both responses' lengths in
        words, and both costs if the model has a cost head.

    Raises:
        Preempted: The stop flag is set.
    """
    collate, starts = RowCollator(processor), range(0, len(rows), batch_size)
    turns = range(-(-len(starts) // machine.world_size()))
    done: list[tuple[int, list[dict]]] = []
    for turn in Bar(turns, desc="score", leave=False):
        if group.any_of(bool(should_stop)):
            raise Preempted(f"stopped while scoring held-out pairs; {RESUME}")
        place, scored = turn * machine.world_size() + machine.rank(), []
        # Under ZeRO-3 all processes must call the model equally often, so a process without a batch
        # computes the last batch again. That result is not used.
        start = starts[min(place, len(starts) - 1)]
        part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = collate(part)
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, Tensor)}
        batch.pop("completion_mask")
        with_cost = model.cost is not None
        scores, *costs = model(costs=True, **batch) if with_cost else (model(**batch),)
        halves = [half.tolist() for values in (scores, *costs) for half in values.chunk(2)]
        for row, c, r, *of_costs in zip(part, *halves, strict=True):
            columns = ("id", "prompt", "class1", "class2", "class3", "question_type")
            scored.append(
                {name: row[name] for name in columns}
                | {
                    "chosen_score": c,
                    "rejected_score": r,
                    "chosen_words": len(row["chosen"].split()),
                    "rejected_words": len(row["rejected"].split()),
                }
                | dict(zip(("chosen_cost", "rejected_cost"), of_costs, strict=False))
            )
        if place < len(starts):
            done.append((place, scored))
    in_order = sorted(itertools.chain(*group.gathered(done)), key=lambda item: item[0])
    return [row for _, scored in in_order for row in scored]


def exchange_images(rows: Dataset) -> Dataset:
    """Give every row another row's image, to measure how much the scores depend on the image.

    Row i gets the image of the row that lies half a data set further on, counted in a circle.
    """
    half = len(rows) // 2
    return with_images_of(rows, [*range(half, len(rows)), *range(half)])


def exchange_answers(rows: Dataset) -> Dataset:
    """Exchange the chosen and the rejected response of every row."""
    names = {"chosen": "rejected", "rejected": "chosen"}
    return rows.rename_columns({n: f"{n}_" for n in names}).rename_columns(
        {f"{n}_": other for n, other in names.items()}
    )
