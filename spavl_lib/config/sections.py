"""The settings of a run: one dataclass per section, and an explanation under each field.

Settings of scale (model, rows, steps, batch size) have no default, so a profile must state them.
Method constants (beta, loss, learning rate) default to the best values that we found.
`preset: original` sets the values of the SPA-VL authors' code instead.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import is_pydantic_dataclass

from spavl_lib import stages
from spavl_lib.config.validation import build, defaults, section, to_plain
from spavl_lib.errors import InputError
from spavl_lib.machine import Dtype

DPOLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "cdpo", "simpo",
    "orpo",
]  # fmt: skip
# Losses that sort and compare the log-ratios of all pairs of one forward pass.
RANKED = {"aot", "aot_unpaired"}
# Without label smoothing exo_pair is undefined, and robust and cdpo are the same as sigmoid.
NEEDS_SMOOTHING = {"cdpo", "exo_pair", "robust"}
SIMPO_MARGIN = 0.5
REWARDS = ("model", "judge", "length")  # rewards of RLOO and GRPO that are not functions of a user
# Losses that depend on the difference of the responses' log-ratios alone.
OF_DIFFERENCES = ("sigmoid", "hinge", "robust", "cdpo", "exo_pair", "discopop")
REFERENCE_FREE = {"simpo", "orpo", "sft"}  # losses that do not read the reference
SMOOTHED = RANKED | NEEDS_SMOOTHING  # losses that use label smoothing
# The linear layers of a decoder layer in every supported model family.
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = typing.get_args(Linear)
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
]  # fmt: skip
# Experiment trackers that transformers has a callback for, and can tell whether they are installed.
Tracker = Literal[
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow", "mlflow",
    "neptune", "swanlab", "tensorboard", "trackio", "wandb",
]  # fmt: skip
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


def _nothing_to_train(settings: Any) -> Iterator[str]:
    if not settings.max_steps and not settings.num_epochs:
        yield "max_steps and num_epochs are both 0, so nothing would be trained"


def _repeated(name: str, values: Sequence[Any]) -> Iterator[str]:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        listed = ", ".join(map(str, twice))
        yield f"{name} names {listed} more than once, so that arm would count more than once"


@section("data.columns")
class ColumnsConfig:
    """Column names of your own data set. If a name is empty, the names that common layouts use are
    tried, such as `question` or `conversations` for the prompt."""

    prompt: str = ""
    """Column of the question, or of a conversation's turns."""
    chosen: str = ""
    """Column of the preferred response."""
    rejected: str = ""
    """Column of the rejected response."""
    image: str = ""
    """Column of the image, or of its path under `image_root`."""
    image_name: str = ""
    """Column of the image's name."""
    id: str = ""
    """Column of the row's id."""
    class3: str = ""
    """Column of the tertiary harm class."""
    question_type: str = ""
    """Column of the question type: easy (a direct question), hardq (a question with a pretext) or
    hards (a demand or a plan)."""


_BUILT_IN_SOURCES = ("mini", "hub_layout", "original", "datasets")
# Setting -> sources that read it. Settings are checked against this table, because a source would
# ignore other settings without a message.
_READERS = {
    "path": ("datasets", "original", "hub_layout"),
    "subset": ("datasets",),
    "train_split": ("datasets",),
    "validation_split": ("datasets",),
    "columns": ("datasets",),
    "image_root": ("datasets", "original", "hub_layout"),
    "keywords": ("original",),
    "measure_on": ("mini",),
    "uncertain_share": ("mini",),
}


def unread_by(source: str) -> set[str]:
    """Names of the settings of `data` that a built-in source does not read."""
    if source not in _BUILT_IN_SOURCES:
        return set()
    return {name for name, readers in _READERS.items() if source not in readers}


@section("data")
class DataConfig:
    """Which preference pairs are read, and how."""

    source: str
    """mini: the small data set of this library; hub_layout: parquet files as SPA-VL has them on the
    Hub; original: the JSON lists that the SPA-VL authors' code reads; datasets: your own data, in
    any form that the `datasets` library opens. Another package can add a source (see
    `data.sources.base`)."""
    train_rows: NonNegativeInt
    """Number of training pairs; 0: all. A smaller training set is a subset of every larger one."""
    validation_rows: NonNegativeInt
    """Number of held-out pairs; 0: all."""
    test_rows: NonNegativeInt
    """Number of prompts in each evaluation set; 0: all."""
    path: str = ""
    """Folder or file of the rows, or a data set's name on the Hub. Source mini does not use it."""
    revision: str = ""
    """Commit, tag or branch on the Hub; empty: the newest. A commit makes a run repeatable."""
    subset: str = ""
    """Configuration to read, if the data set has several. Only for source datasets."""
    train_split: str = "train"
    """Split to train on; slices such as train[:90%] work. A single file has only the split train.
    Only for source datasets."""
    validation_split: str = "validation"
    """Held-out split. If the data have no split validation, about a tenth of the training rows is
    held out, and rows with the same image are never separated. Only for source datasets."""
    held_out_seed: NonNegativeInt = 0
    """Random seed of the draw of held-out rows. Only for source datasets."""
    test_path: str = ""
    """Evaluation prompts of your own: a file whose rows have a field `set` (harm, help or
    look_alikes), or a folder with harm.jsonl, help.jsonl and so on. Rows are as in `path`, without
    responses. Empty: the prompts of `source`, or mini's prompts if `source` has none."""
    extra_path: str = ""
    """File of further pairs, which are added to the rows of any source. Rows are as in a file of
    source datasets, text-only or with an image. They count as training pairs; a row with the field
    split = validation counts as a held-out pair, and one with split = development only if
    `measure_on` is development. `train_rows`, `validation_rows` and the filters below do not apply
    to them, and notebook 07 leaves them out. laptop: the pairs that `spavl fetch laptop` made."""
    measure_on: Literal["test", "development"] = "test"
    """Held-out rows to measure on. test: the pairs and prompts that are reported; development:
    other rows of the same kind and number, for choosing settings. Only mini has these rows."""
    uncertain_share: Share = 0.0
    """Share of mini's training images whose drawing is distorted, so that a model may not recognise
    the thing. The responses stay. Only mini has such images."""
    columns: ColumnsConfig = dataclasses.field(default_factory=ColumnsConfig)
    keywords: tuple[str, ...] = ()
    """Which lists of pairs to read: keys of `config_train.json` and `config_test.json`, which map a
    keyword such as easy to the path of a list. Empty: all lists. Only for source original."""
    num_workers: NonNegativeInt = 0
    """Extra processes that decode images and tokenise during a step; 0: the training process does
    both between steps. Only for reward and dpo."""
    group_by_image: bool = False
    """Put rows with the same image into the same batch, so that they share one image prefix."""
    image_root: str = ""
    """Folder that image paths start from. Empty: `path`, or the folder of `path` if that is a file.
    The source mini does not use it."""
    question_types: tuple[Literal["easy", "hardq", "hards"], ...] = ()
    """Train only on these question types; empty: on all."""
    answer_sources: tuple[str, ...] = ()
    """Train only on pairs whose two responses both come from these models; empty: on all pairs."""
    sampling: Literal["stratified", "random"] = "stratified"
    """How training rows are drawn if not all are used. stratified: every class and question type
    keeps its share; random: every row is equally likely. Validation and test rows are always
    stratified."""
    sampling_seed: NonNegativeInt = 0
    """Random seed of the draw of training rows. With the same seed, a larger set contains every
    smaller one. Validation and test rows do not depend on this seed."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """error: list every bad row and stop; skip: leave bad rows out, and count and list them."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about settings that the source would not read."""
        for field in dataclasses.fields(self):
            readers, value = _READERS.get(field.name, ()), getattr(self, field.name)
            is_default = value in (field.default, "", ()) or value == ColumnsConfig()
            if self.test_path and field.name in ("columns", "image_root"):
                continue  # the prompts of `test_path` are read with these
            if self.source in _BUILT_IN_SOURCES and readers and self.source not in readers:
                if not is_default:
                    yield (
                        f"{field.name} is set, but source = {self.source!r} does not read it; set "
                        f"source to {' or '.join(readers)}, or leave {field.name} empty"
                    )


@section("model")
class ModelConfig:
    """Which model is loaded and which part of it trains. The vision tower is always frozen."""

    name: str
    """`embedded`, `laptop` (run `spavl fetch laptop` first), a local folder, or a model id on the
    Hub."""
    adapter: Literal["full", "lora", "qlora", "frozen"]
    """full: train the whole language model; lora: train adapters on its linear layers; qlora: train
    adapters on 4-bit weights; frozen: train only the projector."""
    revision: str = ""
    """Commit on the Hub; empty: the newest."""
    train_projector: bool = True
    """Train the multimodal projector, as SPA-VL does."""
    projector_learning_rate: NonNegativeFloat = 0.0
    """Peak learning rate of the projector; 0: that of the trainer. With LoRA, LLaVA trains it at a
    tenth of the adapters' rate."""
    lora_rank: PositiveInt = 32
    """Rank of the adapters."""
    lora_alpha: PositiveInt = 64
    """Scale of the adapters; their update is multiplied by alpha / rank."""
    lora_targets: Annotated[tuple[Linear, ...], Field(min_length=1)] = LINEARS
    """Linear layers of the language model that get adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and takes more time."""
    image_aspect: Literal["auto", "pad", "square"] = "auto"
    """How an image that is not square is prepared for LLaVA-1.5. The names are from the LLaVA code.
    pad: pad the image to a square with the mean colour; square: crop the image to its middle;
    auto: use the checkpoint's image processor, or pad for LLaVA-1.5 checkpoints of the Hub."""
    share_prefix: Literal["auto", "require", "off"] = "auto"
    """Compute an image and question once for all rows of a batch that start with them. The results
    are the same. auto: share if the model family can; require: stop if the model family cannot
    share; off: compute every row in full, and use PEFT's own layers, not the fused LoRA pass."""

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each set of values that contradict each other."""
        if self.adapter == "frozen" and not self.train_projector:
            yield "adapter = 'frozen' without train_projector, so nothing would be trained"
        if self.projector_learning_rate and not self.train_projector:
            yield "projector_learning_rate has no effect without train_projector; set it to 0"

    @property
    def with_lora(self) -> bool:
        """Whether adapters train on one base model, which then also serves as the reference."""
        return self.adapter in ("lora", "qlora")


@section("reward")
class RewardConfig:
    """The Bradley-Terry reward model."""

    max_steps: NonNegativeInt
    """Optimizer steps; 0: train for `num_epochs` instead."""
    per_device_batch_size: PositiveInt
    """Pairs per device and forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in one optimizer step, counted over all devices."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the training pairs, used when `max_steps` is 0."""
    preset: Literal["ours", "original"] = "ours"
    """original: loss, learning rate and schedule of the SPA-VL authors' code replace those of the
    profile."""
    center_coef: NonNegativeFloat = 0.0
    """Weight of the square of the sum of a pair's scores, which keeps scores centred on 0."""
    sft_coef: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of the chosen responses through the base's frozen language-model
    head. This term keeps in the hidden states what is needed to describe the image (Yang et al.
    2024)."""
    cost_coef: NonNegativeFloat = 0.0
    """Weight of the loss of a cost head beside the reward head (Dai et al. 2023); 0: no cost head.
    The cost of a response is high if the response does harm. The loss needs labels of harmful
    requests, which only the source `mini` has."""
    shift_px: NonNegativeInt = 0
    """Shift each training image by up to this many pixels, each time by a new random amount."""
    mirror: bool = False
    """Mirror half of the training images. Leave it off for images with text."""
    original_form: bool = False
    """Use the loss of the SPA-VL authors' code, which has an epsilon inside the logarithm. Its
    gradient vanishes on pairs that the model ranks wrongly by a wide margin."""
    learning_rate: NonNegativeFloat = 3e-5
    """Peak learning rate; the default is that of the SPA-VL authors' code."""
    lr_scheduler: Scheduler = "constant_with_warmup"
    """Name of a transformers schedule; the default is that of the SPA-VL authors' code."""
    warmup_steps: NonNegativeFloat = 10
    """Steps of linear warm-up; below 1: their share of all steps."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    max_length: NonNegativeInt = 0
    """Longest sequence in tokens, prompt and image included; 0 for the model's context."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about values that cannot go together."""
        yield from _nothing_to_train(self)
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            yield f"warmup_steps = {self.warmup_steps} must be a whole number, or a share below 1"


@section("dpo")
class DPOConfig:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    max_steps: NonNegativeInt
    """Optimizer steps; 0: train for `num_epochs` instead."""
    per_device_batch_size: PositiveInt
    """Pairs per device and forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in one optimizer step, counted over all devices."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the training pairs, used when `max_steps` is 0."""
    preset: Literal["ours", "original"] = "ours"
    """original: beta, loss, learning rate and schedule of the SPA-VL authors' code replace those of
    the profile."""
    beta: PositiveFloat = 0.1
    """KL coefficient, without unit. A higher value keeps the policy nearer the reference."""
    loss_type: tuple[DPOLoss, ...] = ("sigmoid", "sft")
    """Names of losses to add up: those of trl, cdpo (a sum of two of them), and simpo and orpo of
    this library. sft is the cross-entropy of the chosen responses, a mean over all their tokens in
    an optimizer step; it keeps chosen responses from becoming less likely. MPO is sigmoid, bco_pair
    and sft with weights 0.8, 0.2 and 1; ORPO is sft and orpo with weights 1 and lambda. If all of
    them are among simpo, orpo and sft, no reference model is used, and the logged rewards are beta
    times the mean log-probability of a response's tokens."""
    loss_weights: tuple[float, ...] = (1.0, 1.0)
    """One weight per loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs whose preference is wrong, for the losses robust, cdpo, exo_pair, aot
    and aot_unpaired."""
    assistant_turns: Literal["last", "all"] = "last"
    """In a conversation of several turns, the responses that the loss sft counts: the chosen one,
    or all of the assistant's, those in the prompt included. Chosen and rejected conversation have
    the earlier turns in common, so in losses of the two responses' difference they cancel."""
    simpo_margin: NonNegativeFloat = SIMPO_MARGIN
    """By how much the chosen response's reward must be higher in the loss simpo (the paper's
    gamma). SimPO needs a beta of about 2, because its rewards are means over tokens."""
    learning_rate: NonNegativeFloat = 2e-5
    """Peak learning rate. A small model needs a higher one than a large model."""
    lr_scheduler: Scheduler = "cosine"
    """Name of a transformers schedule."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    max_length: NonNegativeInt = 0
    """Longest sequence in tokens, prompt and image included; 0 for the model's context."""
    cache_reference: bool = False
    """Compute the reference log-probabilities of all pairs before the first step, and store them
    for later runs on the same model and data. Training then needs no reference model, which saves
    memory in full fine-tuning. It also saves time over several passes or several runs."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints."""
    eval_steps: NonNegativeInt = 0
    """Steps between evaluations on the held-out pairs; 0 evaluates only at the end. The summary's
    `best` names the step with the lowest loss."""

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each set of values that contradict each other."""
        yield from _nothing_to_train(self)
        if len(self.loss_type) != len(self.loss_weights):
            yield (
                f"loss_weights needs one weight per loss: there are {len(self.loss_type)} losses "
                f"{list(self.loss_type)} and {len(self.loss_weights)} weights"
            )
        losses = set(self.loss_type)
        if self.label_smoothing and not losses & SMOOTHED:
            yield (
                f"label_smoothing = {self.label_smoothing} has no effect on "
                f"{list(self.loss_type)}: only {', '.join(sorted(SMOOTHED))} use it"
            )
        if not self.label_smoothing and (needing := sorted(losses & NEEDS_SMOOTHING)):
            yield f"{' and '.join(needing)} need label_smoothing above 0, such as 0.001 or 0.1"
        if self.cache_reference and not self.with_reference:
            yield (
                f"cache_reference has no effect, because {list(self.loss_type)} need no reference; "
                "set it to false"
            )
        if self.simpo_margin != SIMPO_MARGIN and "simpo" not in losses:
            yield f"simpo_margin has no effect on {list(self.loss_type)}: only simpo uses it"
        if self.assistant_turns == "all":
            if "sft" not in losses:
                yield "assistant_turns = all has no effect without the loss sft; set it to last"
            if others := sorted(losses.difference(OF_DIFFERENCES, ["sft"])):
                yield (
                    f"assistant_turns = all would change {' and '.join(others)}, which do not "
                    "depend on differences alone; set it to last, or combine sft with "
                    f"{', '.join(OF_DIFFERENCES)}"
                )
        if self.gradient_accumulation_steps > 1 and (ranked := sorted(losses & RANKED)):
            yield (
                f"{' and '.join(ranked)} rank the pairs of one forward pass, so "
                "gradient_accumulation_steps must be 1; set a larger per_device_batch_size"
            )

    @property
    def with_reference(self) -> bool:
        """Whether a loss reads the reference's log-probabilities."""
        return not set(self.loss_type) <= REFERENCE_FREE

    @property
    def runs_reference(self) -> bool:
        """Whether a training step runs the reference model."""
        return self.with_reference and not self.cache_reference

    @property
    def global_batch_size(self) -> int:
        """Pairs in one optimizer step, counted over all devices.

        With several processes each of them accumulates fewer micro-batches
        (`distributed.settings.local_accumulation`).
        """
        return self.per_device_batch_size * self.gradient_accumulation_steps


@section("kto")
class KTOConfig:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024). It trains on single responses, each
    of which is good or bad; here these are the chosen and the rejected responses of the pairs."""

    max_steps: NonNegativeInt = 0
    """Optimizer steps; 0: train for `num_epochs` instead."""
    per_device_batch_size: Annotated[int, Field(ge=2)] = 16
    """Responses per device and forward pass. Each prompt is also paired with the response of
    another row of the batch, to estimate the KL divergence; hence at least 2."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in one optimizer step, counted over all devices."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the responses, used when `max_steps` is 0."""
    beta: PositiveFloat = 0.1
    """KL coefficient, without unit. A higher value keeps the policy nearer the reference."""
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of the loss of chosen responses."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of the loss of rejected responses."""
    learning_rate: NonNegativeFloat = 2e-5
    """Peak learning rate. A small model needs a higher one than a large model."""
    lr_scheduler: Scheduler = "cosine"
    """Name of a transformers schedule."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    max_length: NonNegativeInt = 0
    """Longest sequence in tokens, prompt and image included; 0 for the model's context."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints."""

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each set of values that contradict each other."""
        yield from _nothing_to_train(self)

    @property
    def global_batch_size(self) -> int:
        """Responses in one optimizer step."""
        return self.per_device_batch_size * self.gradient_accumulation_steps


@section("ppo")
class PPOConfig:
    """Proximal policy optimisation against the reward model (Ouyang et al. 2022)."""

    max_steps: NonNegativeInt
    """Rollouts, each followed by its updates; 0: train for `num_epochs` instead."""
    rollout_batch_size: PositiveInt
    """Prompts in a rollout, counted over all devices."""
    per_device_batch_size: PositiveInt
    """Rows per device and forward pass, in sampling and in updates."""
    max_new_tokens: PositiveInt
    """Longest response in tokens."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the training prompts, used when `max_steps` is 0."""
    preset: Literal["ours", "original"] = "ours"
    """original: the method settings of the SPA-VL authors' code replace those of the profile."""
    ppo_epochs: PositiveInt = 2
    """Passes over a rollout."""
    num_minibatches: PositiveInt = 2
    """Optimizer steps in each pass over a rollout."""
    learning_rate: NonNegativeFloat = 1e-5
    """Peak learning rate of the policy. A small model needs a higher one than a large model."""
    value_learning_rate: NonNegativeFloat = 0.0
    """Peak learning rate of the value model; 0: the same as the policy's."""
    lr_scheduler: Scheduler = "cosine"
    """Name of a transformers schedule."""
    warmup_steps: NonNegativeInt = 10
    """Optimizer steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest gradient norm; the policy and the value model are clipped separately."""
    gamma: Share = 1.0
    """Discount of later rewards."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation. 1 has no bias; lower values reduce variance."""
    clip_range: PositiveFloat = 0.2
    """Clip range of the probability ratio in the policy loss."""
    value_clip_range: NonNegativeFloat = 0.0
    """Clip range of the value loss, in units of reward; 0: no clipping. Use 0 if rewards are large
    (several units). The first predictions are then several units wrong, and clipping lets them move
    by only about this range per rollout."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    kl_coef: NonNegativeFloat = 0.5
    """KL coefficient: reward subtracted per nat of KL to the reference."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """k1: the log ratio, which is unbiased; k3: never negative, with less variance."""
    kl_target: NonNegativeFloat = 0.0
    """Mean KL per response, in nats, that `kl_coef` adapts to reach; 0 keeps `kl_coef` fixed."""
    kl_horizon: PositiveInt = 1000
    """Number of responses after which `kl_coef` has changed by about 20 % at most."""
    cost_limit: float | None = None
    """Largest mean cost of the responses (Dai et al. 2023), in the unit of the cost head: above 0 a
    response counts as harmful. Harmless prompts lower the mean, so a useful limit is usually below
    0. While the mean cost is above the limit, the Lagrange multiplier grows. none: costs are not
    used."""
    lagrange_learning_rate: NonNegativeFloat = 0.05
    """Change of the multiplier's logarithm per rollout, for each unit that the mean cost is above
    the limit."""
    lagrange_initial: PositiveFloat = 1.0
    """The Lagrange multiplier at the start: the weight of the cost if the reward's weight is 1."""
    whiten_advantages: bool = True
    """Scale the advantages of a rollout to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale the rewards of a rollout to variance 1."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits, in sampling and in every log-probability."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Amount subtracted from the score of a response that did not end with EOS."""
    length_penalty: NonNegativeFloat = 0.0
    """Amount subtracted from the score for every token of the response."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    sft_coef: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of the chosen responses. In our runs the policy became equally
    safe without this term, but worse at naming what the image shows."""
    max_length: NonNegativeInt = 0
    """Longest chosen response for `sft_coef`, in tokens, prompt and image included; 0: the model's
    context."""
    reward_model: str = ""
    """`model/` folder of a reward model; empty: the reward model of this run."""
    save_steps: PositiveInt = 20
    """Rollouts between checkpoints."""

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each set of values that contradict each other."""
        yield from _nothing_to_train(self)
        if self.num_minibatches > self.rollout_batch_size:
            yield (
                f"num_minibatches = {self.num_minibatches} for a rollout of "
                f"{self.rollout_batch_size} prompts: some would be empty"
            )

    @property
    def uses_run_reward(self) -> bool:
        """Whether the method needs the reward model of this run."""
        return not self.reward_model


@section()
class GroupConfig:
    """What RLOO and GRPO share. Every optimizer step samples new responses, several for each
    prompt, and no value model is trained."""

    max_steps: NonNegativeInt
    """Optimizer steps; 0: train for `num_epochs` instead."""
    per_device_batch_size: PositiveInt
    """Responses per device and forward pass."""
    max_new_tokens: PositiveInt
    """Longest response in tokens."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of responses in one optimizer step."""
    num_generations: Annotated[int, Field(ge=2)] = 4
    """Responses per prompt; each is compared with the others."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the training prompts, used when `max_steps` is 0."""
    learning_rate: NonNegativeFloat = 1e-5
    """Peak learning rate. A small model needs a higher one than a large model."""
    lr_scheduler: Scheduler = "constant_with_warmup"
    """Name of a transformers schedule."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits, in sampling and in every log-probability."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Amount subtracted from the reward model's score of a response that did not end with EOS."""
    rewards: Annotated[tuple[str, ...], Field(min_length=1)] = ("model",)
    """Rewards to add up. model: the reward model's score; judge: 1 for a response that the judge of
    `evaluation` approves of, else 0; length: minus the response's tokens as a share of
    `max_new_tokens`; anything else names a Python function, as file.py:function or
    package.module:function, with the arguments of trl's reward functions."""
    reward_weights: tuple[float, ...] = (1.0,)
    """One weight per reward."""
    reward_model: str = ""
    """`model/` folder of a reward model; empty: the reward model of this run."""
    use_vllm: bool = False
    """Sample with vLLM; needs a CUDA GPU and the vllm package. A resumed run then gives other
    results than an uninterrupted one."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """colocate: vLLM runs on the training GPU; server: it runs on a server that `trl vllm-serve`
    started."""
    vllm_server_base_url: str = ""
    """Address of the vLLM server, such as http://localhost:8000. Only for vllm_mode server."""
    vllm_gpu_memory_utilization: PositiveFloat = 0.3
    """Share of the GPU's memory that vLLM may take. Only for vllm_mode colocate."""
    save_steps: PositiveInt = 20
    """Steps between checkpoints."""

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each set of values that contradict each other."""
        yield from _nothing_to_train(self)
        if self.global_batch_size % self.num_generations:
            yield (
                f"per_device_batch_size x gradient_accumulation_steps = {self.global_batch_size} "
                f"must be a multiple of num_generations = {self.num_generations}"
            )
        if len(self.rewards) != len(self.reward_weights):
            yield (
                f"reward_weights needs one weight per reward: there are {len(self.rewards)} "
                f"rewards {list(self.rewards)} and {len(self.reward_weights)} weights"
            )
        yield from _repeated("rewards", self.rewards)
        for name in self.rewards:
            if name not in REWARDS and ":" not in name:
                yield (
                    f"rewards: {name!r} is none of model, judge and length; a function of your own "
                    "is named file.py:function"
                )
        if self.reward_model and "model" not in self.rewards:
            yield f"reward_model has no effect on rewards = {list(self.rewards)}; leave it empty"
        if self.use_vllm and self.vllm_mode == "server" and not self.vllm_server_base_url:
            yield "vllm_mode = 'server' needs vllm_server_base_url"

    @property
    def global_batch_size(self) -> int:
        """Responses in one optimizer step; these methods train in a single process."""
        return self.per_device_batch_size * self.gradient_accumulation_steps

    @property
    def uses_run_reward(self) -> bool:
        """Whether the method needs the reward model of this run."""
        return "model" in self.rewards and not self.reward_model


@section("rloo")
class RLOOConfig(GroupConfig):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): like PPO, but with no value model. Each
    response is compared with the mean reward of the other responses to its prompt."""

    beta: NonNegativeFloat = 0.05
    """KL coefficient: score subtracted per nat of KL to the reference."""
    normalize_advantages: bool = True
    """Scale the advantages of a step's responses to mean 0 and variance 1."""


@section("grpo")
class GRPOConfig(GroupConfig):
    """Group relative policy optimisation (Shao et al. 2024). Each response is compared with the
    mean and the standard deviation of its group, and the KL penalty is a part of the loss."""

    per_device_batch_size: PositiveInt = 16
    """Responses per device and forward pass."""
    max_steps: NonNegativeInt = 0
    """Optimizer steps; 0: train for `num_epochs` instead."""
    max_new_tokens: PositiveInt = 64
    """Longest response in tokens."""
    beta: NonNegativeFloat = 0.04
    """KL coefficient; the default is the paper's."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"
    """How the loss is averaged. grpo: first over the tokens of each response, as in the paper;
    dapo, the default of trl: over all tokens of a step; dr_grpo: divided by `max_new_tokens`, so
    that length has no influence; bnpo: over the tokens of a forward pass."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """group: divide by the standard deviation of the group's rewards, as in the paper; batch: by
    that of all rewards of a step; none: do not divide."""


@section("online_dpo")
class OnlineDPOConfig:
    """DPO on the policy's own responses, which the reward model ranks (Guo et al. 2024). In every
    round the policy of that time answers prompts several times, and the best and the worst response
    to a prompt are a pair. Losses, rates and batch sizes are those of `dpo`."""

    rounds: PositiveInt = 4
    """Rounds of sampling, each followed by one pass over its pairs."""
    prompts: NonNegativeInt = 0
    """Prompts of a round, each round other ones while there are enough; 0: all training prompts."""
    num_generations: Annotated[int, Field(ge=2)] = 4
    """Responses per prompt."""
    max_new_tokens: PositiveInt = 64
    """Longest response in tokens."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits in sampling."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Amount subtracted from the score of a response that did not end with EOS."""
    reward_model: str = ""
    """`model/` folder of a reward model; empty: the reward model of this run."""

    @property
    def uses_run_reward(self) -> bool:
        """Whether the method needs the reward model of this run."""
        return not self.reward_model


@section("generation")
class GenerationConfig:
    """How responses are generated for inference and evaluation."""

    batch_size: PositiveInt
    """Prompts per batch."""
    max_new_tokens: PositiveInt = 64
    """Longest response in tokens."""
    do_sample: bool = False
    """true: sample; false: greedy decoding."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits when sampling."""
    top_p: PositiveShare = 1.0
    """Sample from the smallest set of tokens with this total probability."""
    cache: Literal["compact", "dynamic", "static"] = "compact"
    """Cache of keys and values. compact: finished responses leave the batch, which does not change
    the results. compact works with LLaVA, in greedy decoding and PPO's rollouts; elsewhere dynamic
    is used. dynamic: transformers' cache that grows with the response. static: transformers' cache
    that is allocated at full size."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Engine that generates. vllm is optional and needs Linux; prompts and the format of records
    are the same."""
    vllm_memory: PositiveShare = 0.9
    """Share of the GPU's memory that vLLM takes; without a GPU, of the machine's memory. Only for
    backend vllm."""


@section("evaluation")
class EvaluationConfig:
    """What is measured, and who judges."""

    judge: str = "exact"
    """exact: compares with the ground-truth labels, which only mini has; phrases: looks for refusal
    phrases, in any data; guard: asks a guard model on this machine; endpoint: asks a model behind
    an OpenAI-compatible address. Another package can add a judge."""
    judge_phrases: Literal["phrases-v1", "gcg"] = "phrases-v1"
    """Which list of refusal phrases to use. Only for judge phrases."""
    judge_model: str = ""
    """For judge guard: a model id on the Hub, or a folder. For judge endpoint: the model's name at
    the endpoint. For judge head: the file that `spavl judge fit` wrote."""
    judge_revision: str = ""
    """Commit of the guard model on the Hub; empty: the newest. Only for judge guard."""
    judge_url: str = ""
    """Address of the endpoint, such as http://localhost:8000/v1. Only for judge endpoint. The key
    is read from the environment variable SPAVL_JUDGE_KEY or OPENAI_API_KEY."""
    judge_budget: NonNegativeInt = 0
    """Largest number of requests to the endpoint for each judge, repeated ones included; 0: no
    limit. Responses beyond the limit stay unjudged. Only for judges endpoint and grade."""
    judge_yes: bool = False
    """Whether you agree that the endpoint's host receives what is judged: prompts, responses, and
    with judge_images the images. Needed if the host is another machine. Only for judge endpoint."""
    judge_batch_size: PositiveInt = 8
    """Responses per batch. Only for judge guard."""
    judge_images: bool = False
    """Show the image to the judge model, which must accept images. Only for judges guard and
    endpoint."""
    judge_canaries: bool = True
    """First ask the judge model about responses with a known verdict, and stop if a verdict
    is wrong. Only for judges guard and endpoint."""
    held_out_drawings: bool = True
    """Repeat mini's evaluation sets with drawings that are never used in training."""
    benchmarks: tuple[str, ...] = ("figstep:tiny",)
    """Published benchmarks that notebook 06 asks the models of the run, as `spavl evaluate` names
    them. Those whose files are missing are left out."""
    benchmark_rows: NonNegativeInt = 20
    """Number of rows of each of these benchmarks, evenly spread; 0: all."""
    quick_rows: NonNegativeInt = 0
    """Largest number of prompts of each test set in the quick rates of notebooks 03 and 04; 0: as
    many as the notebook asks for."""


@section("scaling")
class ScalingConfig:
    """Arms of notebook 07. An arm is a training that differs from the profile in one setting. Each
    of the settings `sizes` to `lora_ranks` defines a family of arms, one for every value."""

    sizes: tuple[NonNegativeInt, ...] = ()
    """One arm for each of these numbers of training pairs, in any order. 0, or a number above the
    number of all pairs, means all pairs."""
    question_types: tuple[Literal["easy", "hardq", "hards", "mixed"], ...] = ()
    """One arm for each of these question types; mixed: an arm trained on all types."""
    answers: tuple[str, ...] = ()
    """One arm for each entry NAME=SOURCE+SOURCE. The arm is called NAME. It trains on the pairs
    whose two responses both come from these models. NAME=all: the arm trains on all pairs."""
    projector: tuple[Literal["trained", "frozen"], ...] = ()
    """trained: an arm that trains the projector; frozen: an arm with a frozen projector."""
    lora_ranks: tuple[PositiveInt, ...] = ()
    """One arm with adapters of each of these ranks; alpha is twice the rank."""
    learning_rate: NonNegativeFloat = 0.0
    """Learning rate of all arms but those of `lora_ranks`; 0: `dpo.learning_rate`. Arms with few
    pairs take few steps, and may need a higher rate than a pass over all pairs."""
    lora_learning_rate: NonNegativeFloat = 0.0
    """Learning rate of the arms of `lora_ranks`; 0: `dpo.learning_rate`. Adapters need about ten
    times the rate of full training (Schulman et al., LoRA Without Regret, 2025)."""
    ablation_rows: NonNegativeInt = 0
    """Largest number of training pairs of an arm; 0: no limit. All arms of a family get the same
    number of pairs, at most what its smallest arm has. Neither rule applies to `sizes`."""
    seeds: tuple[NonNegativeInt, ...] = ()
    """Random seeds. Every arm is trained once with each seed. The seed also decides which pairs the
    arm gets."""
    min_steps: PositiveInt = 20
    """Smallest number of optimizer steps of an arm; an arm with few pairs repeats them."""
    eval_rows: NonNegativeInt = 0
    """Number of prompts in each evaluation set of an arm; 0: all."""
    workers: NonNegativeInt = 0
    """Number of arms trained at the same time; 0: as many as fit on the machine."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about values that cannot go together."""
        for name in ("sizes", "question_types", "projector", "lora_ranks", "seeds"):
            yield from _repeated(name, getattr(self, name))
        yield from _repeated("answers", [text.partition("=")[0].strip() for text in self.answers])


@section("launch")
class LaunchConfig:
    """Processes that train together. The effective batch size does not depend on their number."""

    num_processes: PositiveInt = 1
    """Number of processes, counted over all machines. accelerate starts them if there are several,
    or if DeepSpeed is the engine."""
    num_threads: NonNegativeInt = 0
    """Threads of each process on the CPU. 0: one for each core, which suits large models. A sum is
    split among the threads, so results depend on this number in the last bits."""
    engine: Literal["ddp", "zero2", "zero3"] = "ddp"
    """ddp: every process holds the whole model. zero2, zero3: DeepSpeed divides the optimizer state
    and the gradients among the processes, and under zero3 also the parameters."""
    cpu_offload: bool = False
    """Whether DeepSpeed keeps the optimizer state, and under zero3 also the parameters, in main
    memory."""
    num_machines: PositiveInt = 1
    """Number of machines. All of them must see the disk that holds the run folder."""
    machine_rank: NonNegativeInt = 0
    """Rank of this machine: 0 for the one that `main_address` names, then 1, 2 and so on."""
    main_address: str = "127.0.0.1"
    """Address of machine 0, as the other machines reach it."""
    main_port: NonNegativeInt = 0
    """Port on machine 0. 0: any free port, which works only on a single machine."""
    timeout_s: PositiveInt = 1800
    """Longest wait in seconds: at the start for other machines, then for a slow process."""

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each set of values that contradict each other."""
        if self.num_processes % self.num_machines:
            yield (
                f"num_processes = {self.num_processes} must be a multiple of num_machines = "
                f"{self.num_machines}"
            )
        if self.machine_rank >= self.num_machines:
            yield (
                f"machine_rank = {self.machine_rank}, but the {self.num_machines} machines are "
                "numbered from 0"
            )
        if self.num_machines > 1 and not self.main_port:
            yield (
                f"num_machines = {self.num_machines} needs main_port, a port that all machines know"
            )
        if self.cpu_offload and self.engine == "ddp":
            yield "cpu_offload needs engine zero2 or zero3"


@section()
class Config:
    """All settings that a run depends on."""

    profile: str
    """Name of the profile that the settings come from."""
    data: DataConfig
    model: ModelConfig
    reward: RewardConfig
    dpo: DPOConfig
    ppo: PPOConfig
    rloo: RLOOConfig
    generation: GenerationConfig
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    kto: KTOConfig = dataclasses.field(default_factory=KTOConfig)
    online_dpo: OnlineDPOConfig = dataclasses.field(default_factory=OnlineDPOConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = dataclasses.field(default_factory=ScalingConfig)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)
    plugins: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    """Stage name -> settings of a trainer or other stage that another package registers."""
    report_to: tuple[Tracker, ...] = ()
    """Experiment trackers that every trainer reports its logged values to, besides metrics.jsonl;
    empty: none. tensorboard writes files into the stage's folder; other trackers, such as wandb,
    mlflow or trackio, are set up by their own environment variables."""
    seed: NonNegativeInt = 0
    """Random seed of weights, data order and sampling."""
    run_name: str = ""
    """Name of the run's folder under runs/; empty: the profile's name."""
    dtype: Dtype = ""
    """Precision of matrix products. Empty: `$SPAVL_DTYPE`, or the hardware's best precision if the
    variable is not set. A stage's config.yaml names the precision that the stage was made in."""

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each set of values that contradict each other."""
        ppo = self.ppo
        if ppo.cost_limit is not None and ppo.uses_run_reward and not self.reward.cost_coef:
            yield (
                f"ppo.cost_limit = {ppo.cost_limit} needs a reward model with a cost head; set "
                "reward.cost_coef above 0, or ppo.reward_model to the folder of such a model"
            )

    def section(self, name: str) -> Any:
        """The settings of a stage: a section of this config, or a plugin's settings.

        Raises:
            InputError: The stage has no settings, or the plugin's settings are wrong.
        """
        built_in = getattr(self, name, None)
        if dataclasses.is_dataclass(built_in) and name not in self.plugins:
            return built_in
        settings = stages.find(name).settings
        if settings is None:
            raise InputError(f"stage {name!r} has no settings under `plugins`")
        key = f"plugins.{name}"
        return build(_checked(settings, key), self.plugins.get(name, {}), prefix=f"{key}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return to_plain(self)

    def changed(self, names: Iterable[str]) -> dict[str, Any]:
        """The settings that differ from their defaults, as plain values.

        They name a training for good: a setting that a later version adds, with the old behaviour
        as its default, is not among them.

        Args:
            names: Names of sections, or of single values such as `seed`.

        Returns:
            Name -> the section's changed settings, or the value.
        """
        plain, known, found = self.to_dict(), defaults(Config), {}
        for name in names:
            part = found[name] = plain[name]
            if isinstance(part, dict):
                found[name] = {
                    key: value
                    for key, value in part.items()
                    if (path := f"{name}.{key}") not in known or value != known[path]
                }
        return found


@functools.cache
def _checked(settings: type, key: str) -> type:
    """Make a plugin's settings class check its values, even if it is a plain dataclass."""
    return settings if is_pydantic_dataclass(settings) else section(key)(settings)
