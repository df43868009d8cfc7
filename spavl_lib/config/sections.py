"""The settings of a run: one dataclass per section, one sentence per field.

Scale (model, rows, steps, batch size) has no default, so a profile must state it. Method constants
(beta, loss, learning rate) default to the best values we found; `preset: original` sets those of
the original code.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import is_pydantic_dataclass

from spavl_lib import stages
from spavl_lib.config.validation import build, section, to_plain
from spavl_lib.errors import InputError
from spavl_lib.machine import Dtype

DPOLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
# The linear layers of a decoder layer in every supported model family.
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = typing.get_args(Linear)
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
]  # fmt: skip
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


def _nothing_to_train(settings: Any) -> Iterator[str]:
    if not settings.max_steps and not settings.num_epochs:
        yield "max_steps and num_epochs are both 0, so nothing would be trained"


@section("data.columns")
class ColumnsConfig:
    """Column names of your own data set; an empty name stands for the names of known layouts."""

    prompt: str = ""
    """Column of the question, or of its conversation turns."""
    chosen: str = ""
    """Column of the preferred response."""
    rejected: str = ""
    """Column of the other response."""
    image: str = ""
    """Column of the image, or of its path under `image_root`."""
    image_name: str = ""
    """Column of the image's name."""
    id: str = ""
    """Column of the row's id."""
    class3: str = ""
    """Column of the tertiary harm class."""
    question_type: str = ""
    """Column of the question type: easy, hardq or hards."""


@section("data")
class DataConfig:
    """Which preference pairs are read, and how."""

    source: str
    """mini: built by this library; hub_layout: parquet files as on the Hub; original: the original
    code's JSON lists; datasets: your own data, anything the `datasets` library opens; or a source
    that another package adds (`data.sources.base`)."""
    train_rows: NonNegativeInt
    """Number of training pairs, 0 for all. A smaller number is always a subset of a larger one."""
    validation_rows: NonNegativeInt
    """Number of held-out pairs, 0 for all."""
    test_rows: NonNegativeInt
    """Number of prompts in each evaluation set, 0 for all."""
    path: str = ""
    """Folder or file of the rows, or a data set's name on the Hub; empty for mini."""
    revision: str = ""
    """Commit, tag or branch on the Hub, empty for the newest. A commit makes a run repeatable."""
    subset: str = ""
    """datasets: configuration to read, if the data set has several."""
    train_split: str = "train"
    """datasets: split to train on; slices such as train[:90%] work."""
    validation_split: str = "validation"
    """datasets: held-out split."""
    columns: ColumnsConfig = dataclasses.field(default_factory=ColumnsConfig)
    keywords: tuple[str, ...] = ()
    """original: keywords of the keyword map to read, all if empty."""
    num_workers: NonNegativeInt = 0
    """Processes that decode images and tokenise during a step; 0 does it between steps."""
    group_by_image: bool = False
    """Put the rows of an image into the same batches, so that they share one image prefix."""
    image_root: str = ""
    """original, datasets: folder that image paths start from; empty for that of `path`."""
    question_types: tuple[Literal["easy", "hardq", "hards"], ...] = ()
    """Train only on these question types, on all if empty."""
    answer_sources: tuple[str, ...] = ()
    """Train only on pairs whose two responses both come from these models, on all if empty."""
    sampling: Literal["stratified", "random"] = "stratified"
    """How a smaller number is drawn: evenly over classes and question types, or at random."""
    sampling_seed: NonNegativeInt = 0
    """Random seed of the row order. The same seed nests small sets in large ones."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """error: list every bad row and stop; skip: leave bad rows out, counted and listed."""


@section("model")
class ModelConfig:
    """Which model is loaded and which part of it trains. The vision tower is always frozen."""

    name: str
    """`embedded`, a local folder, or a model id on the Hub."""
    adapter: Literal["full", "lora", "qlora", "frozen"]
    """full: train the whole language model; lora: train adapters on its linear layers; qlora: the
    same over 4-bit weights; frozen: train only the projector."""
    revision: str = ""
    """Commit on the Hub, empty for the newest."""
    train_projector: bool = True
    """Train the multimodal projector, as SPA-VL does."""
    lora_rank: PositiveInt = 32
    """Rank of the adapters."""
    lora_alpha: PositiveInt = 64
    """Scale of the adapters; their update is multiplied by alpha / rank."""
    lora_targets: Annotated[tuple[Linear, ...], Field(min_length=1)] = LINEARS
    """Linear layers of the language model that get adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    share_prefix: Literal["auto", "require", "off"] = "auto"
    """Compute the image and question once for all rows of a batch that start with them; the numbers
    stay equal. auto: for model families that allow it; require: stop if the family does not; off:
    compute every row in full, with PEFT's own LoRA layers."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about values that cannot go together."""
        if self.adapter == "frozen" and not self.train_projector:
            yield "adapter = 'frozen' without train_projector, so nothing would be trained"

    @property
    def with_lora(self) -> bool:
        """Whether adapters train on one base model, which then also serves as the reference."""
        return self.adapter in ("lora", "qlora")


@section("reward")
class RewardConfig:
    """The Bradley-Terry reward model."""

    max_steps: NonNegativeInt
    """Optimizer steps; 0 for `num_epochs` passes."""
    per_device_batch_size: PositiveInt
    """Pairs per device and forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches summed into one optimizer step."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the training pairs, used when `max_steps` is 0."""
    center_coef: NonNegativeFloat = 0.0
    """Weight of the squared mean score, which keeps scores centred on 0."""
    sft_coef: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of the chosen responses through the base's frozen language-model
    head. It keeps the hidden states able to name what the model sees (Yang et al. 2024)."""
    shift_px: NonNegativeInt = 0
    """Move each training image by up to this many pixels in each direction, anew at each use."""
    mirror: bool = False
    """Mirror half of the training images; do not use it for images with text."""
    original_form: bool = False
    """Use the original's loss, with an epsilon inside the logarithm. Its gradient vanishes on pairs
    that the model ranks badly wrong."""
    learning_rate: NonNegativeFloat = 3e-5
    """Peak learning rate; the default is the original's."""
    lr_scheduler: Scheduler = "constant_with_warmup"
    """Name of a transformers schedule; the default is the original's."""
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

    contradictions = _nothing_to_train


@section("dpo")
class DPOConfig:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    max_steps: NonNegativeInt
    """Optimizer steps; 0 for `num_epochs` passes."""
    per_device_batch_size: PositiveInt
    """Pairs per device and forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches summed into one optimizer step."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the training pairs, used when `max_steps` is 0."""
    preset: Literal["ours", "original"] = "ours"
    """original: the original's beta, loss, learning rate and schedule replace the profile's."""
    beta: PositiveFloat = 0.1
    """KL coefficient, without unit. A higher value keeps the policy nearer the reference."""
    loss_type: tuple[DPOLoss, ...] = ("sigmoid", "sft")
    """Names of trl losses to add up. sft is the cross-entropy of the chosen responses, which keeps
    them from becoming less likely."""
    loss_weights: tuple[float, ...] = (1.0, 1.0)
    """One weight per loss."""
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
    for every later run on the same model and data. It saves memory in full fine-tuning, and time
    from the second pass or run on."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints."""
    eval_steps: NonNegativeInt = 0
    """Steps between evaluations on the held-out pairs; 0 evaluates only at the end."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about values that cannot go together."""
        yield from _nothing_to_train(self)
        if len(self.loss_type) != len(self.loss_weights):
            yield (
                f"loss_weights needs one weight per loss: there are {len(self.loss_type)} losses "
                f"{list(self.loss_type)} and {len(self.loss_weights)} weights"
            )

    @property
    def global_batch_size(self) -> int:
        """Pairs in one optimizer step on one device."""
        return self.per_device_batch_size * self.gradient_accumulation_steps


@section("ppo")
class PPOConfig:
    """Proximal policy optimisation against the reward model (Ouyang et al. 2022)."""

    max_steps: NonNegativeInt
    """Rollouts, each followed by its updates; 0 for `num_epochs` passes over the prompts."""
    rollout_batch_size: PositiveInt
    """Prompts in a rollout, over all devices."""
    per_device_batch_size: PositiveInt
    """Rows per device and forward pass, in sampling and in updates."""
    max_new_tokens: PositiveInt
    """Longest response in tokens."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the training prompts, used when `max_steps` is 0."""
    preset: Literal["ours", "original"] = "ours"
    """original: the original's method settings replace the profile's."""
    ppo_epochs: PositiveInt = 2
    """Passes over a rollout."""
    num_minibatches: PositiveInt = 2
    """Optimizer steps in each pass over a rollout."""
    learning_rate: NonNegativeFloat = 1e-5
    """Peak learning rate of the policy. A small model needs a higher one than a large model."""
    value_learning_rate: NonNegativeFloat = 0.0
    """Peak learning rate of the value model; 0 for the policy's."""
    lr_scheduler: Scheduler = "cosine"
    """Name of a transformers schedule."""
    warmup_steps: NonNegativeInt = 10
    """Optimizer steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest gradient norm, for the policy and for the value model each."""
    gamma: Share = 1.0
    """Discount of later rewards."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation. 1: no bias; lower: less variance."""
    clip_range: PositiveFloat = 0.2
    """Clip range of the probability ratio in the policy loss."""
    value_clip_range: NonNegativeFloat = 0.0
    """Clip range of the value loss, in units of reward; 0 for no clipping. Rewards of several units
    need 0, because the value model starts far from them."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    kl_coef: NonNegativeFloat = 0.5
    """KL coefficient: reward subtracted per nat of KL to the reference."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """k1: log ratio, unbiased; k3: never negative, with less variance."""
    kl_target: NonNegativeFloat = 0.0
    """Mean KL per response, in nats, that `kl_coef` adapts to reach; 0 keeps `kl_coef` fixed."""
    kl_horizon: PositiveInt = 1000
    """Responses over which `kl_coef` adapts."""
    whiten_advantages: bool = True
    """Scale the advantages of a rollout to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale the rewards of a rollout to variance 1."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Subtracted from the score of a response that did not end."""
    length_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score per token."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    sft_coef: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of the chosen responses. Without it the policy became as safe,
    but worse at naming what it sees."""
    reward_model: str = ""
    """`model/` folder of a reward model; empty for this run's own."""
    save_steps: PositiveInt = 20
    """Rollouts between checkpoints."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about values that cannot go together."""
        yield from _nothing_to_train(self)
        if self.num_minibatches > self.rollout_batch_size:
            yield (
                f"num_minibatches = {self.num_minibatches} for a rollout of "
                f"{self.rollout_batch_size} prompts: some would be empty"
            )


@section("rloo")
class RLOOConfig:
    """REINFORCE leave-one-out against the reward model (Ahmadian et al. 2024): like PPO, but with
    no value model. Every optimizer step samples new responses."""

    max_steps: NonNegativeInt
    """Optimizer steps; 0 for `num_epochs` passes over the prompts."""
    per_device_batch_size: PositiveInt
    """Responses per device and forward pass."""
    max_new_tokens: PositiveInt
    """Longest response in tokens."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches of responses in one optimizer step."""
    num_generations: Annotated[int, Field(ge=2)] = 4
    """Responses per prompt; each is compared with the mean score of the others."""
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
    beta: NonNegativeFloat = 0.05
    """KL coefficient: score subtracted per nat of KL to the reference."""
    normalize_advantages: bool = True
    """Scale the advantages of a step's responses to mean 0 and variance 1."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Subtracted from the score of a response that did not end."""
    reward_model: str = ""
    """`model/` folder of a reward model; empty for this run's own."""
    use_vllm: bool = False
    """Sample with vLLM; needs a CUDA GPU and the vllm package. Resuming is then not exact."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """colocate: on the training GPU; server: on a server started with `trl vllm-serve`."""
    vllm_server_base_url: str = ""
    """Address of that server, such as http://localhost:8000."""
    vllm_gpu_memory_utilization: PositiveFloat = 0.3
    """Share of the GPU's memory that a colocated vLLM may take."""
    save_steps: PositiveInt = 20
    """Steps between checkpoints."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about values that cannot go together."""
        yield from _nothing_to_train(self)
        if self.global_batch_size % self.num_generations:
            yield (
                f"{self.per_device_batch_size} responses x {self.gradient_accumulation_steps} "
                f"batches are not whole groups of num_generations = {self.num_generations}"
            )
        if self.use_vllm and self.vllm_mode == "server" and not self.vllm_server_base_url:
            yield "vllm_mode = 'server' needs vllm_server_base_url"

    @property
    def global_batch_size(self) -> int:
        """Responses in one optimizer step on one device."""
        return self.per_device_batch_size * self.gradient_accumulation_steps


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
    """Divides the logits when sampling."""
    top_p: PositiveShare = 1.0
    """Sample from the smallest set of tokens with this total probability."""
    cache: Literal["compact", "dynamic", "static"] = "compact"
    """Cache of keys and values. compact: finished responses leave the batch, where that is exact
    (LLaVA with greedy decoding or in PPO's rollouts; dynamic elsewhere). dynamic and static are
    those of transformers: one grows with the response, one is allocated at once."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """vllm: an optional engine, for Linux with a GPU, with the same prompts and records."""


@section("evaluation")
class EvaluationConfig:
    """What is measured, and who judges."""

    judge: str = "exact"
    """exact: knows the truth of every row of mini; phrases: looks for refusal phrases, for other
    data; guard: a guard model on this machine; endpoint: a model behind an OpenAI-compatible
    address; or the name of a judge from another package."""
    judge_phrases: Literal["phrases-v1", "gcg"] = "phrases-v1"
    """Which list of refusal phrases to use."""
    judge_model: str = ""
    """guard: model id on the Hub, or a folder; endpoint: the model's name there."""
    judge_revision: str = ""
    """guard: commit on the Hub, empty for the newest."""
    judge_url: str = ""
    """endpoint: address up to /v1. The key is read only from $SPAVL_JUDGE_KEY."""
    judge_batch_size: PositiveInt = 8
    """guard: responses per batch."""
    judge_images: bool = False
    """Show the judge the image too; the judge model must accept images."""
    judge_canaries: bool = True
    """Ask guard or endpoint first about responses with a known verdict, and stop if it errs."""
    held_out_drawings: bool = True
    """Repeat mini's evaluation sets on drawings the model never saw."""


@section("scaling")
class ScalingConfig:
    """Arms of notebook 07: trainings that differ from the profile in one setting each."""

    sizes: tuple[NonNegativeInt, ...] = ()
    """Numbers of training pairs of the data-scale arms, 0 for all pairs."""
    question_types: tuple[Literal["easy", "hardq", "hards", "mixed"], ...] = ()
    """Arms trained on one question type, or on all (mixed)."""
    answers: tuple[str, ...] = ()
    """Arms trained on the responses of some models: NAME=SOURCE+SOURCE, or NAME=all."""
    projector: tuple[Literal["trained", "frozen"], ...] = ()
    """Arms with the projector trained or frozen."""
    lora_ranks: tuple[PositiveInt, ...] = ()
    """Arms with adapters of these ranks, with alpha twice the rank."""
    lora_learning_rate: NonNegativeFloat = 0.0
    """Learning rate of the rank arms, 0 for `dpo.learning_rate`. Adapters need about ten times the
    rate of full training (Schulman et al., LoRA Without Regret, 2025)."""
    ablation_rows: NonNegativeInt = 0
    """Most pairs per arm, data-scale arms aside. All arms of a family get as many pairs as its
    smallest arm has; 0 sets no other limit."""
    seeds: tuple[NonNegativeInt, ...] = ()
    """Random seeds: every arm is trained once per seed, which also draws its rows."""
    min_steps: PositiveInt = 20
    """Fewest optimizer steps; a small arm passes over its rows more than once."""
    eval_rows: NonNegativeInt = 0
    """Harmful prompts, and as many harmless ones, to evaluate on; 0 for all."""
    workers: NonNegativeInt = 0
    """Arms trained at the same time; 0 for as many as the machine has room for."""


@section("launch")
class LaunchConfig:
    """Processes that train together. The global batch does not depend on their number."""

    num_processes: PositiveInt = 1
    """Processes on all machines together; more than one starts accelerate."""
    engine: Literal["ddp", "zero2", "zero3"] = "ddp"
    """ddp: every process holds the whole model; zero2, zero3: DeepSpeed divides it."""
    cpu_offload: bool = False
    """DeepSpeed keeps the optimizer state, and under zero3 the parameters, in main memory."""
    num_machines: PositiveInt = 1
    """Machines; all must see the disk that holds the run folder."""
    machine_rank: NonNegativeInt = 0
    """Number of this machine; machine 0 has the address that the others know."""
    main_address: str = "127.0.0.1"
    """Address of machine 0."""
    main_port: NonNegativeInt = 0
    """Port on machine 0; 0 for any free one, which works only on a single machine."""
    timeout_s: PositiveInt = 1800
    """Longest wait, in seconds, for the other machines and for a slow process."""

    def contradictions(self) -> Iterator[str]:
        """Sentences about values that cannot go together."""
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
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = dataclasses.field(default_factory=ScalingConfig)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)
    plugins: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    """Settings of trainers and other stages that other packages register, by stage name."""
    seed: NonNegativeInt = 0
    """Random seed of weights, data order and sampling."""
    run_name: str = ""
    """Folder of the run under runs/; empty for the profile's name."""
    dtype: Dtype = ""
    """Precision of matrix products; empty for `$SPAVL_DTYPE` or, if that is not set, what the
    hardware does best. A stage's config.yaml names the one it was made in."""

    def section(self, name: str) -> Any:
        """The settings of a stage: a section of this config, or of a plugin.

        Raises:
            InputError: The stage has no settings, or those of the plugin are wrong.
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


@functools.cache
def _checked(settings: type, key: str) -> type:
    """A plugin's settings class, which may be a plain dataclass, as one that checks its values."""
    return settings if is_pydantic_dataclass(settings) else section(key)(settings)
