"""Frozen configuration: dataclasses with a sentence a field, and strict profiles over them.

Scale (model, rows, steps, batch) has no default: a profile must say it. Method constants (beta,
loss, learning rate) have the default we found best; `preset: seed` gives the original's.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from spavl_lib.errors import InputError

PROFILES = Path(__file__).parent / "profiles"
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# The linears of a decoder layer in every family that loads here.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip


def _at_least(section: str, config: Any, **lowest: float) -> None:
    for name, low in lowest.items():
        value = getattr(config, name)
        if value < low:
            raise InputError(f"{section}.{name} must be at least {low}, got {value}")


def _known(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{key} = {value!r}{_nearest(value, list(known))}")


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """datasets: names of the columns in one's own data; empty for the names known layouts use."""

    prompt: str = ""
    """The question, or its turns."""
    chosen: str = ""
    """The preferred answer."""
    rejected: str = ""
    """The other answer."""
    image: str = ""
    """A picture, or its path under `image_root`."""
    image_name: str = ""
    """The picture's name."""
    id: str = ""
    """A name of the row's own."""
    class3: str = ""
    """The tertiary harm class."""
    question_type: str = ""
    """easy, hardq or hards."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which preference rows."""

    source: Literal["mini", "hub_layout", "seed_json", "datasets"]
    """mini: built here; hub_layout: parquet as on the Hub; seed_json: the original code's lists;
    datasets: one's own, anything the `datasets` library opens."""
    train_rows: int
    """Training pairs, 0 for all. A smaller number is always a subset of a larger one."""
    validation_rows: int
    """Held-out pairs, 0 for all."""
    test_rows: int
    """Prompts per evaluation set, 0 for all."""
    path: str = ""
    """Folder or file of the rows, or a data set's name on the Hub; empty for mini."""
    revision: str = ""
    """Commit, tag or branch on the Hub, empty for the newest. A commit makes a run repeatable."""
    subset: str = ""
    """datasets: the configuration, where a data set has several."""
    train_split: str = "train"
    """datasets: split to train on; slices such as train[:90%] are understood."""
    validation_split: str = "validation"
    """datasets: split held out."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    keywords: tuple[str, ...] = ()
    """seed_json: keywords of the keyword map to read, all if empty."""
    num_workers: int = 0
    """Processes that decode images and tokenise while a step runs; 0 does it in between."""
    group_by_image: bool = False
    """Put an image's rows into the same batches, so that shared prefixes reach over questions."""
    image_root: str = ""
    """seed_json, datasets: folder image paths start from; that of `path` if empty."""
    question_types: tuple[str, ...] = ()
    """Train on these types of question alone (easy, hardq, hards), on all if empty."""
    answer_sources: tuple[str, ...] = ()
    """Train only on pairs both of whose answers these models gave, on all if empty."""
    sampling: Literal["stratified", "random"] = "stratified"
    """How a smaller number is drawn: evenly over classes and question types, or not."""
    sampling_seed: int = 0
    """Of the order rows are drawn in. The same seed nests small sets in large ones."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """error: list every bad row and stop; skip: leave them out, counted and listed."""

    def __post_init__(self) -> None:
        _at_least(
            "data", self, train_rows=0, validation_rows=0, test_rows=0, sampling_seed=0,
            num_workers=0,
        )  # fmt: skip
        for name in self.question_types:
            _known("data.question_types", name, ("easy", "hardq", "hards"))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and what of it trains. The vision tower never does."""

    name: str
    """`embedded`, a local folder, or a hub id."""
    adapter: Literal["full", "lora", "qlora", "frozen"]
    """full: the whole language model; lora: adapters on its linears; qlora: the same over 4 bit;
    frozen: nothing of it, the projector alone trains."""
    revision: str = ""
    """Hub commit, empty for the newest."""
    train_projector: bool = True
    """Train the multimodal projector, as SPA-VL does."""
    lora_rank: int = 32
    """Rank of the adapters."""
    lora_alpha: int = 64
    """Scale of the adapters; the update is multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] = LINEARS
    """Which linears of the language model take adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    share_prefix: Literal["auto", "require", "off"] = "auto"
    """Run image and question once for all rows of a batch that begin with them, with equal numbers.
    auto: where the family allows it; require: stop where it does not; off: the plain path, in which
    PEFT adds LoRA's products too."""

    def __post_init__(self) -> None:
        _at_least("model", self, lora_rank=1, lora_alpha=1)
        for name in self.lora_targets:
            _known("model.lora_targets", name, LINEARS)
        if not self.lora_targets:
            raise InputError("model.lora_targets is empty: adapters would go nowhere")
        if self.adapter == "frozen" and not self.train_projector:
            raise InputError("model.adapter = 'frozen' without train_projector trains nothing")

    @property
    def with_lora(self) -> bool:
        """Whether adapters train over one base, which is then the reference too."""
        return self.adapter in ("lora", "qlora")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Bradley-Terry reward model."""

    max_steps: int
    """Optimizer steps; 0 for `num_epochs` passes."""
    per_device_batch_size: int
    """Pairs a device sees at once."""
    gradient_accumulation_steps: int = 1
    """Batches summed into one optimizer step."""
    num_epochs: float = 1.0
    """Passes over the training pairs, when `max_steps` is 0."""
    center_coef: float = 0.0
    """Weight of the squared mean score, which pins the scale's zero."""
    sft_coef: float = 0.0
    """Weight of the chosen answers' cross-entropy through the base's frozen language-model head: it
    keeps the hidden states those of a model that can name what it sees (Yang et al. 2024)."""
    shift_px: int = 0
    """Move each training picture by up to so many pixels either way, anew each time it is seen."""
    mirror: bool = False
    """Mirror half of the training pictures; not for pictures with writing."""
    seed_form: bool = False
    """The original's loss with an epsilon inside the logarithm; its gradient dies on bad pairs."""
    learning_rate: float = 3e-5
    """Peak rate, the original's."""
    lr_scheduler: str = "constant_with_warmup"
    """transformers' schedule name, the original's."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm."""
    max_length: int = 0
    """Longest answer in tokens with prompt and image; 0 for the model's context."""
    save_steps: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _at_least(
            "reward", self, max_steps=0, per_device_batch_size=1, gradient_accumulation_steps=1,
            num_epochs=0, center_coef=0, sft_coef=0, shift_px=0, learning_rate=0, warmup_steps=0,
            weight_decay=0, max_length=0, save_steps=1,
        )  # fmt: skip
        if self.max_grad_norm <= 0:
            raise InputError(f"reward.max_grad_norm must be above 0, got {self.max_grad_norm}")
        if not self.max_steps and not self.num_epochs:
            raise InputError("reward.max_steps and reward.num_epochs are both 0: nothing to train")
        _known("reward.lr_scheduler", self.lr_scheduler, SCHEDULERS)


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimisation (Rafailov et al. 2023)."""

    max_steps: int
    """Optimizer steps; 0 for `num_epochs` passes."""
    per_device_batch_size: int
    """Pairs a device sees at once."""
    gradient_accumulation_steps: int = 1
    """Batches summed into one optimizer step."""
    num_epochs: float = 1.0
    """Passes over the training pairs, when `max_steps` is 0."""
    preset: Literal["ours", "seed"] = "ours"
    """seed: the original's beta, loss, rate and schedule, over whatever the profile says."""
    beta: float = 0.1
    """Strength of the pull to the reference, no unit. Higher stays nearer."""
    loss_type: tuple[str, ...] = ("sigmoid", "sft")
    """trl's loss names, summed. sft: the chosen answer's cross-entropy, against displacement."""
    loss_weights: tuple[float, ...] = (1.0, 1.0)
    """One weight a loss."""
    learning_rate: float = 2e-5
    """Peak rate. A small model wants more than a large one."""
    lr_scheduler: str = "cosine"
    """transformers' schedule name."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm."""
    max_length: int = 0
    """Longest pair in tokens, image tokens counted; 0 for the model's context."""
    cache_reference: bool = False
    """Compute the reference's log-probabilities of every pair before the first step, keep them
    beside the run, and use them in every later run on the same model and data. One pass alone gains
    no time by it; a second run, and full fine-tuning's memory, do."""
    save_steps: int = 50
    """Steps between checkpoints."""
    eval_steps: int = 0
    """Steps between evaluations on the held-out pairs; 0 for only at the end."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"dpo.beta must be above 0, got {self.beta}")
        if len(self.loss_type) != len(self.loss_weights):
            raise InputError(
                f"dpo.loss_weights needs one weight a loss: {len(self.loss_type)} losses "
                f"{list(self.loss_type)}, {len(self.loss_weights)} weights"
            )
        _at_least(
            "dpo", self, max_steps=0, per_device_batch_size=1, gradient_accumulation_steps=1,
            num_epochs=0, learning_rate=0, warmup_steps=0, weight_decay=0, max_length=0,
            save_steps=1, eval_steps=0,
        )  # fmt: skip
        if self.max_grad_norm <= 0:
            raise InputError(f"dpo.max_grad_norm must be above 0, got {self.max_grad_norm}")
        if not self.max_steps and not self.num_epochs:
            raise InputError("dpo.max_steps and dpo.num_epochs are both 0: nothing to train")
        for name in self.loss_type:
            _known("dpo.loss_type", name, DPO_LOSSES)
        _known("dpo.lr_scheduler", self.lr_scheduler, SCHEDULERS)

    @property
    def global_batch_size(self) -> int:
        """Pairs an optimizer step sees on one device."""
        return self.per_device_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation against the reward model (Ouyang et al. 2022)."""

    max_steps: int
    """Rollouts, each with its updates; 0 for `num_epochs` passes over the prompts."""
    rollout_batch_size: int
    """Prompts a rollout, over all devices."""
    per_device_batch_size: int
    """Rows a device sees at once, in sampling and in updates."""
    max_new_tokens: int
    """Longest answer in tokens."""
    num_epochs: float = 1.0
    """Passes over the training prompts, when `max_steps` is 0."""
    preset: Literal["ours", "seed"] = "ours"
    """seed: the original's settings, over whatever the profile says."""
    ppo_epochs: int = 2
    """Inner passes over a rollout."""
    num_minibatches: int = 2
    """Optimizer steps in each inner pass."""
    learning_rate: float = 1e-5
    """Peak rate of the policy. A small model wants more than a large one."""
    value_learning_rate: float = 0.0
    """Peak rate of the value model; 0 for the policy's."""
    lr_scheduler: str = "cosine"
    """transformers' schedule name."""
    warmup_steps: int = 10
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient of policy and of value model, each to this norm."""
    gamma: float = 1.0
    """Discount of later rewards."""
    gae_lambda: float = 0.95
    """1: unbiased advantages; lower: less spread."""
    clip_range: float = 0.2
    """How far the probability ratio may profit from moving."""
    value_clip_range: float = 0.0
    """How far values may move in an update, in units of reward; 0 for no clip, which rewards of
    several units need: the value model starts far off."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    kl_coef: float = 0.5
    """Price of a nat of KL to the reference, in units of reward."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """k1: log ratio, unbiased; k3: never negative, less spread."""
    kl_target: float = 0.0
    """Mean KL of an answer, in nats, that `kl_coef` is steered to; 0 keeps it fixed."""
    kl_horizon: int = 1000
    """Answers over which the steering acts."""
    whiten_advantages: bool = True
    """Scale a rollout's advantages to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale a rollout's rewards to variance 1."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    missing_eos_penalty: float = 1.0
    """Taken from the score of an answer that did not end."""
    length_penalty: float = 0.0
    """Taken from the score for each token."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    sft_coef: float = 1.0
    """Weight of the chosen answers' cross-entropy, mixed in against forgetting: without it the
    policy became as safe, and worse at naming what it sees."""
    reward_model: str = ""
    """A reward trainer's `model/` folder; this run's own if empty."""
    save_steps: int = 20
    """Rollouts between checkpoints."""

    def __post_init__(self) -> None:
        _at_least(
            "ppo", self, max_steps=0, rollout_batch_size=1, per_device_batch_size=1,
            max_new_tokens=1, num_epochs=0, ppo_epochs=1, num_minibatches=1, learning_rate=0,
            value_learning_rate=0, warmup_steps=0, weight_decay=0, gamma=0, gae_lambda=0,
            value_clip_range=0, vf_coef=0, kl_coef=0, kl_target=0, kl_horizon=1,
            missing_eos_penalty=0, length_penalty=0, entropy_coef=0, sft_coef=0, save_steps=1,
        )  # fmt: skip
        for name in ("max_grad_norm", "clip_range", "temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"ppo.{name} must be above 0, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise InputError(f"ppo.{name} must be at most 1, got {getattr(self, name)}")
        if self.num_minibatches > self.rollout_batch_size:
            raise InputError(
                f"ppo.num_minibatches = {self.num_minibatches} of a rollout of "
                f"{self.rollout_batch_size} prompts: some would be empty"
            )
        if not self.max_steps and not self.num_epochs:
            raise InputError("ppo.max_steps and ppo.num_epochs are both 0: nothing to train")
        _known("ppo.lr_scheduler", self.lr_scheduler, SCHEDULERS)


@dataclass(frozen=True, kw_only=True)
class RLOOConfig:
    """REINFORCE leave-one-out against the reward model (Ahmadian et al. 2024): PPO's critic-free
    sibling. Every optimizer step samples anew."""

    max_steps: int
    """Optimizer steps; 0 for `num_epochs` passes over the prompts."""
    per_device_batch_size: int
    """Answers a device sees at once."""
    max_new_tokens: int
    """Longest answer in tokens."""
    gradient_accumulation_steps: int = 1
    """Batches of answers in one optimizer step."""
    num_generations: int = 4
    """Answers to a prompt; each is held against the mean score of the others."""
    num_epochs: float = 1.0
    """Passes over the training prompts, when `max_steps` is 0."""
    learning_rate: float = 1e-5
    """Peak rate. A small model wants more than a large one."""
    lr_scheduler: str = "constant_with_warmup"
    """transformers' schedule name."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm."""
    beta: float = 0.05
    """Price of a nat of KL to the reference, taken from an answer's score."""
    normalize_advantages: bool = True
    """Scale the advantages of a step's answers to mean 0 and variance 1."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    missing_eos_penalty: float = 1.0
    """Taken from the score of an answer that did not end."""
    reward_model: str = ""
    """A reward trainer's `model/` folder; this run's own if empty."""
    use_vllm: bool = False
    """Sample with vLLM; wants a CUDA GPU and the vllm package. A resumed run is then not exact."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """colocate: on the training GPU; server: one that `trl vllm-serve` started."""
    vllm_server_base_url: str = ""
    """Where that server listens, such as http://localhost:8000."""
    vllm_gpu_memory_utilization: float = 0.3
    """Part of the GPU that a colocated vLLM may take."""
    save_steps: int = 20
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _at_least(
            "rloo", self, max_steps=0, per_device_batch_size=1, max_new_tokens=1,
            gradient_accumulation_steps=1, num_generations=2, num_epochs=0, learning_rate=0,
            warmup_steps=0, weight_decay=0, beta=0, missing_eos_penalty=0, save_steps=1,
        )  # fmt: skip
        for name in ("max_grad_norm", "temperature", "vllm_gpu_memory_utilization"):
            if getattr(self, name) <= 0:
                raise InputError(f"rloo.{name} must be above 0, got {getattr(self, name)}")
        if self.global_batch_size % self.num_generations:
            raise InputError(
                f"rloo: {self.per_device_batch_size} answers x {self.gradient_accumulation_steps} "
                f"batches are not whole groups of rloo.num_generations = {self.num_generations}"
            )
        if not self.max_steps and not self.num_epochs:
            raise InputError("rloo.max_steps and rloo.num_epochs are both 0: nothing to train")
        if self.use_vllm and self.vllm_mode == "server" and not self.vllm_server_base_url:
            raise InputError("rloo.vllm_mode = 'server' wants rloo.vllm_server_base_url")
        _known("rloo.lr_scheduler", self.lr_scheduler, SCHEDULERS)

    @property
    def global_batch_size(self) -> int:
        """Answers an optimizer step sees on one device."""
        return self.per_device_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are sampled."""

    batch_size: int
    """Prompts at once."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""
    do_sample: bool = False
    """Sample; greedy if false."""
    temperature: float = 1.0
    """Divides the logits when sampling."""
    top_p: float = 1.0
    """Smallest set of tokens with this mass, when sampling."""
    cache: Literal["compact", "dynamic", "static"] = "compact"
    """Keys and values. compact: ended answers leave the batch, where it is exact (LLaVA, greedy
    answers and PPO's rollouts; else dynamic). transformers' own: dynamic grows with the answer,
    static is laid out at once."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """vllm: the optional engine, for Linux with a GPU; same prompts in, same records out."""

    def __post_init__(self) -> None:
        _at_least("generation", self, batch_size=1, max_new_tokens=1)
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                "generation.temperature must be above 0 and generation.top_p in (0, 1], got "
                f"{self.temperature} and {self.top_p}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured."""

    judge: Literal["exact", "phrases", "guard", "endpoint"] = "exact"
    """exact: knows the truth of every mini row; phrases: refusal phrases, for other data; guard: a
    guard model on this machine; endpoint: a model behind an OpenAI-compatible address."""
    judge_phrases: Literal["phrases-v1", "gcg"] = "phrases-v1"
    """Which list of refusal phrases."""
    judge_model: str = ""
    """guard: hub id or folder; endpoint: the model's name there."""
    judge_revision: str = ""
    """guard: hub commit, empty for the newest."""
    judge_url: str = ""
    """endpoint: address up to /v1. The key is read from $SPAVL_JUDGE_KEY alone."""
    judge_batch_size: int = 8
    """guard: answers judged at once."""
    judge_images: bool = False
    """Show the judge the picture too; it must be a model that takes pictures."""
    judge_canaries: bool = True
    """First ask guard or endpoint about answers whose verdict is known, and stop if it errs."""
    held_out_drawings: bool = True
    """Repeat mini's sets over drawings the model never saw."""

    def __post_init__(self) -> None:
        _at_least("evaluation", self, judge_batch_size=1)


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Arms of notebook 07, which differ from the profile in one thing each; none unless named."""

    sizes: tuple[int, ...] = ()
    """Training pairs of the data-scale arms, 0 for all there are."""
    question_types: tuple[str, ...] = ()
    """Arms trained on one type of question (easy, hardq, hards), or on all: mixed."""
    answers: tuple[str, ...] = ()
    """Arms trained on some models' answers: NAME=SOURCE+SOURCE, or NAME=all."""
    projector: tuple[str, ...] = ()
    """Arms with the projector trained, or frozen."""
    lora_ranks: tuple[int, ...] = ()
    """Arms with adapters of these ranks, alpha twice the rank."""
    lora_learning_rate: float = 0.0
    """Of the rank arms, 0 for `dpo.learning_rate`; adapters want about ten times full training's
    (Schulman et al., LoRA Without Regret, 2025)."""
    ablation_rows: int = 0
    """Pairs of every arm but the data-scale ones, at most; a family whose poorest arm has fewer
    takes that many, and so does every family if this is 0."""
    seeds: tuple[int, ...] = ()
    """Every arm once a seed, which also draws its rows."""
    min_steps: int = 20
    """Floor of optimizer steps: a small arm passes over its rows more than once."""
    eval_rows: int = 0
    """Prompts of harm and of help each; 0 for all."""
    workers: int = 0
    """Arms trained at once; 0 for as many as there is room for."""

    def __post_init__(self) -> None:
        _at_least("scaling", self, ablation_rows=0, min_steps=1, eval_rows=0, workers=0,
                  lora_learning_rate=0)  # fmt: skip
        for name in self.question_types:
            _known("scaling.question_types", name, ("easy", "hardq", "hards", "mixed"))
        for name in self.projector:
            _known("scaling.projector", name, ("trained", "frozen"))
        for number in (*self.sizes, *self.seeds):
            if number < 0:
                raise InputError(f"scaling.sizes and scaling.seeds must be at least 0: {number}")
        if any(rank < 1 for rank in self.lora_ranks):
            raise InputError("scaling.lora_ranks must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where training runs. A step keeps its size whatever the number of processes."""

    num_processes: int = 1
    """Processes on all machines together; more than one starts accelerate."""
    engine: Literal["ddp", "zero2", "zero3"] = "ddp"
    """ddp: the whole model in every process; zero2, zero3: DeepSpeed, which shares it out."""
    cpu_offload: bool = False
    """DeepSpeed keeps optimizer state, and under zero3 parameters, in the machine's memory."""
    num_machines: int = 1
    """Machines; the run folder must be on a disk that all of them see."""
    machine_rank: int = 0
    """This machine's number, 0 for the one whose address the others know."""
    main_address: str = "127.0.0.1"
    """Address of machine 0."""
    main_port: int = 0
    """Its port; 0 for any free one, which several machines cannot agree on."""
    timeout_s: int = 1800
    """Longest wait, in seconds, for the other machines and for a slow process."""

    def __post_init__(self) -> None:
        _at_least(
            "launch", self, num_processes=1, num_machines=1, machine_rank=0, main_port=0,
            timeout_s=1,
        )  # fmt: skip
        if self.num_processes % self.num_machines:
            raise InputError(
                f"launch.num_processes = {self.num_processes} must be a multiple of "
                f"launch.num_machines = {self.num_machines}"
            )
        if self.machine_rank >= self.num_machines:
            raise InputError(
                f"launch.machine_rank = {self.machine_rank}: machines are numbered from 0, and "
                f"there are {self.num_machines}"
            )
        if self.num_machines > 1 and not self.main_port:
            raise InputError("launch.main_port: several machines need one that all know")
        if self.cpu_offload and self.engine == "ddp":
            raise InputError("launch.cpu_offload needs launch.engine zero2 or zero3")


# The original's settings (seed_json's own scripts): method constants only, never scale.
SEED_PRESET = {
    "dpo": {
        "beta": 0.1,
        "loss_type": ("sigmoid",),
        "loss_weights": (1.0,),
        "lr_scheduler": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
    "ppo": {
        "ppo_epochs": 1,
        "num_minibatches": 1,
        "value_learning_rate": 0.0,
        "lr_scheduler": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "vf_coef": 0.1,
        "kl_coef": 0.1,
        "kl_estimator": "k1",
        "kl_target": 0.0,
        "whiten_advantages": False,
        "whiten_rewards": False,
        "temperature": 1.0,
        "missing_eos_penalty": 0.0,
        "length_penalty": 0.0,
        "entropy_coef": 0.0,
        "sft_coef": 0.0,
    },
}
SEED_LEARNING_RATE = {
    "dpo": {"full": 1e-6, "lora": 2e-5, "qlora": 2e-5},
    "ppo": {"full": 5e-7, "lora": 1e-6, "qlora": 1e-6},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on."""

    profile: str
    """Profile it came from."""
    data: DataConfig
    model: ModelConfig
    reward: RewardConfig
    dpo: DPOConfig
    ppo: PPOConfig
    rloo: RLOOConfig
    generation: GenerationConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    seed: int = 0
    """Of weights, data order and sampling."""
    run_name: str = ""
    """Folder under runs/; the profile's name if empty."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")

    def to_dict(self) -> dict:
        """Plain values, as written to config.yaml."""
        return _plain(dataclasses.asdict(self))


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


def load_config(
    profile: str,
    overrides: dict[str, Any] | None = None,
    *,
    seed: int | None = None,
    run_name: str = "",
) -> Config:
    """Read a profile and lay overrides over it.

    Args:
        profile: A shipped profile's name, or the path of a YAML file.
        overrides: Dotted key -> value, such as `{"dpo.beta": 0.2}`. Text is parsed by the field's
            type.
        seed: Replaces the profile's seed.
        run_name: Folder under runs/.

    Raises:
        InputError: Unknown profile or key (naming the nearest), wrong type, missing scale.
    """
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        raise InputError(f"unknown profile {profile!r}{_nearest(profile, profile_names())}")
    try:
        page = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(page, dict):
        raise InputError(f"{path}: expected a mapping, got {type(page).__name__}")
    for section, cls in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls) and not isinstance(page.get(section, {}), dict):
            raise InputError(f"{path}: {section} must be a mapping, got {page[section]!r}")
    page.setdefault("profile", path.stem)
    overrides = dict(overrides or {})
    if seed is not None:
        overrides["seed"] = seed
    if run_name:
        overrides["run_name"] = run_name
    _apply_preset(page, overrides)
    for key, value in overrides.items():
        _set_dotted(page, key, value)
    config = _build(Config, page, str(path), "")
    return dataclasses.replace(config, run_name=config.run_name or config.profile)


def from_dict(values: dict) -> Config:
    """A config from its `to_dict` form."""
    return _build(Config, values, "config.yaml", "")


def _apply_preset(page: dict, overrides: dict) -> None:
    adapter = overrides.get("model.adapter", page.get("model", {}).get("adapter"))
    for name, preset in SEED_PRESET.items():
        section = page.setdefault(name, {})
        if overrides.get(f"{name}.preset", section.get("preset")) == "seed":
            rates = SEED_LEARNING_RATE[name]
            section.update(preset, learning_rate=rates.get(adapter, rates["full"]))


def _set_dotted(page: dict, key: str, value: Any) -> None:
    target, cls = page, Config
    *parents, last = str(key).split(".")
    for part in parents:
        fields = typing.get_type_hints(cls)
        if part not in fields or not dataclasses.is_dataclass(fields[part]):
            raise InputError(f"unknown key {key!r}{_nearest(key, _all_keys())}")
        cls = fields[part]
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise InputError(f"{'.'.join(parents)} must be a mapping, got {target!r}")
    if last not in typing.get_type_hints(cls):
        raise InputError(f"unknown key {key!r}{_nearest(key, _all_keys())}")
    target[last] = value


def _all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys += _all_keys(hint, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _nearest(name: str, known: list[str]) -> str:
    by_tail = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = by_tail or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if len(known) < 12 or not close else hint


def _build(cls: type, values: Any, source: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{source}: {prefix or 'profile'} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = [k for k in values if k not in hints]
    if unknown:
        names = [f"{prefix}{k}" for k in unknown]
        hint = _nearest(names[0], _all_keys())
        raise InputError(f"{source}: unknown key {', '.join(map(repr, names))}{hint}")
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [prefix + name for name in required if name not in values]
    if missing:
        raise InputError(f"{source}: missing {', '.join(missing)} (scale has no default)")
    built = {}
    for name, value in values.items():
        hint, key = hints[name], prefix + name
        if dataclasses.is_dataclass(hint):
            built[name] = _build(hint, value, source, f"{key}.")
        else:
            built[name] = _typed(value, hint, key, source)
    return cls(**built)


def _typed(value: Any, hint: Any, key: str, source: str) -> Any:
    """The value as the field's type: text is parsed, nothing is guessed."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value in allowed:
            return value
        raise InputError(f"{source}: {key} = {value!r}{_nearest(str(value), list(allowed))}")
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise InputError(f"{source}: {key} must be a list, got {value!r}")
        return tuple(_typed(v, typing.get_args(hint)[0], key, source) for v in value)
    if origin is types.UnionType:
        raise TypeError(f"{key}: unions are not supported in a config")
    try:
        if hint is bool:
            words = {"true": True, "false": False}
            if isinstance(value, bool):
                return value
            return words[value.lower()] if isinstance(value, str) else words[value]
        if hint is int and not isinstance(value, bool):
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            return int(value)
        if hint is float and not isinstance(value, bool):
            number = float(value)
            if number != number or number in (float("inf"), float("-inf")):
                raise ValueError
            return number
        if hint is str and isinstance(value, str):
            return value
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{source}: {key} must be {hint.__name__}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
