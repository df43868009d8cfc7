"""Memory by part and time a step, from configs alone: before anything is loaded.

    spavl plan --profile colab --device t4

The model is built on the meta device, so counts are exact; activations are counted layer by layer
from what autograd keeps. `benchmarks/planner.py` holds the plan against measured peaks.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from spavl_lib.config import Config, ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.shapes import (
    GIB,
    UTILISATION,
    Device,
    Shape,
    device_named,
    model_config,
    shape_of,
)

ADAM = 8  # bytes a trained value: two moments in fp32
MASTER = 4  # bytes of a trained value, and of its gradient
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a value: 4 bits, and scales in double quantisation


@dataclass(frozen=True)
class Plan:
    """What a training would take on one device."""

    kind: str
    device: Device
    parts_gib: dict[str, float]
    """Peak memory by part, GiB."""
    tokens: int
    """Longest row, image tokens counted."""
    rows: int
    """Rows computed at once."""
    step_s: float
    """Time of an optimizer step, seconds."""
    steps: int | None
    """Optimizer steps, where the profile says."""
    advice: list[str] = field(default_factory=list)

    @property
    def total_gib(self) -> float:
        """Peak memory."""
        return sum(self.parts_gib.values())

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.total_gib <= self.device.memory_gib


def plan(kind: str, config: Config, device: Device, *, tokens: int = 0) -> Plan:
    """Plan a training of a profile.

    Args:
        kind: reward, dpo or ppo.
        config: The profile.
        device: What each process has.
        tokens: Longest row, image tokens counted; the section's `max_length` if 0.

    Raises:
        InputError: Unknown kind; the profile lacks its section.
    """
    section = getattr(config, kind, None) if kind in ("reward", "dpo", "ppo") else None
    if section is None:
        raise InputError(f"cannot plan {kind!r}: reward, dpo or ppo")
    shape = shape_of(model_config(config.model), config.model.lora_targets)
    tokens = tokens or _longest(kind, config, shape)
    made = _plan(kind, config, device, shape, tokens)
    return dataclasses.replace(made, advice=_advice(kind, config, device, shape, made))


def _longest(kind: str, config: Config, shape: Shape) -> int:
    """Tokens of the longest row to plan for; a prompt is taken for 160 besides its image."""
    if kind == "ppo":
        return shape.image_tokens + 160 + config.ppo.max_new_tokens
    return getattr(config, kind).max_length or 2048


def _batches(kind: str, config: Config) -> int:
    """Device batches that all processes together sum into one optimizer step."""
    section = getattr(config, kind)
    if kind != "ppo":
        return section.gradient_accumulation_steps
    rows = section.rollout_batch_size / section.num_minibatches
    return max(1, round(rows / section.per_device_batch_size))


def _plan(kind: str, config: Config, device: Device, shape: Shape, tokens: int) -> Plan:
    section, cpu = getattr(config, kind), device.half == "none"
    batch = section.per_device_batch_size
    rows = batch if kind == "ppo" else 2 * batch
    memory = _static(kind, config, shape, cpu)
    peak = _moving(kind, config, shape, rows, tokens, cpu)
    if not cpu and kind == "ppo":
        # While answers are sampled no activations are held: the larger of the two counts.
        cache = shape.layers * 2 * shape.kv_width * 2 * batch * tokens
        moving = sum(peak.values())
        memory["KV cache"] = max(0.0, cache - moving)
    memory |= peak
    parts = {name: value / GIB for name, value in memory.items() if value}
    if not cpu:  # the allocator's slack; the CUDA context is off `memory_gib` already
        parts["allocator slack"] = 0.04 * sum(parts.values())
    step, steps = _time(kind, config, shape, device, rows, tokens)
    return Plan(kind, device, parts, tokens, rows, step, steps)


def trained_values(kind: str, config: ModelConfig, shape: Shape) -> dict[str, int]:
    """Values that train, by part."""
    projector = shape.parts.get("projector", 0) if config.train_projector else 0
    copies = 2 if kind == "ppo" else 1  # policy and value
    if config.with_lora:
        return {
            "adapters": copies * config.lora_rank * shape.lora_inputs,
            "projector": copies * projector,
        }
    language = shape.parts["language"] if config.adapter == "full" else 0
    head = shape.parts.get("head", 0) if config.adapter == "full" and kind != "reward" else 0
    return {"language": copies * language, "head": head, "projector": copies * projector}


def _static(kind: str, config: Config, shape: Shape, cpu: bool) -> dict[str, float]:
    """Bytes that stay: weights, adapters, the reference, optimizer state."""
    model, launch = config.model, config.launch
    half = 4 if cpu else 2
    everything = sum(shape.parts.values())
    trained = trained_values(kind, model, shape)
    count = sum(trained.values())
    share = launch.num_processes if launch.engine != "ddp" else 1
    whole = launch.num_processes if launch.engine == "zero3" else 1
    if model.with_lora:
        base = half * everything
        if model.adapter == "qlora":
            base = half * (everything - shape.linears) + NF4 * shape.linears
        if kind == "ppo":  # the reward model's own adapter and projector, frozen
            base += MASTER * (model.lora_rank * shape.lora_inputs + shape.parts.get("projector", 0))
        memory = {"weights": base / whole, "adapters": MASTER * count / whole}
    else:
        # fp32 masters; under DeepSpeed in 16 bit they are its own, beside a 16-bit model.
        deep = launch.engine != "ddp" and not cpu
        copies = 2 if kind == "ppo" else 1
        memory = {
            "weights": (half if deep else MASTER) * copies * everything / whole,
            "masters": MASTER * count / share if deep else 0.0,
        }
        frozen_copies = {"dpo": 1, "reward": 0, "ppo": 2}[kind]
        memory["reference"] = half * frozen_copies * everything / whole
        if not cpu and not deep:  # autocast keeps its 16-bit copies for the whole forward pass
            memory["autocast copies"] = 2.0 * copies * shape.linears
    offload = launch.cpu_offload and launch.engine != "ddp"
    memory["optimizer"] = 0.0 if offload else ADAM * count / share
    if offload:
        memory["masters"] = 0.0
    return memory


def _layer_bytes(config: ModelConfig, shape: Shape, cpu: bool) -> float:
    """Bytes that autograd keeps of one decoder layer, a token.

    A Llama layer keeps: its input, the normed input (twice where the norm's weight trains: before
    and after that weight), query, key, value, attention's output, the middle residual, the normed
    middle; in the MLP gate, its activation, up, and their product.
    """
    full = config.adapter == "full"
    h, kv, i = shape.hidden, shape.kv_width, shape.intermediate
    stream, inner = (4, 4) if cpu else (4 if full else 2, 2)
    kept = stream * 2 * h + inner * (2 * h + 2 * h + 2 * kv) + inner * 4 * i
    kept += 4 * shape.heads  # attention's log-sum-exp
    if full:
        kept += stream * 2 * h
    if not cpu:  # norms compute in fp32, and keep that
        kept += 4 * 2 * h
    if config.with_lora:
        kept += MASTER * config.lora_rank * len(config.lora_targets)
        if not cpu:  # adapters' inputs are cast anew for each linear under autocast
            kept += 2 * h
    return kept


def _moving(
    kind: str, config: Config, shape: Shape, rows: int, tokens: int, cpu: bool
) -> dict[str, float]:
    """Peak of what comes and goes in a step: activations, logits, gradients."""
    model = config.model
    positions = rows * tokens
    layer = positions * _layer_bytes(model, shape, cpu)
    stream = (4 if cpu or model.adapter == "full" else 2) * positions * shape.hidden
    trained = trained_values(kind, model, shape)
    share = config.launch.num_processes if config.launch.engine != "ddp" else 1
    language = trained.get("language", 0) + trained.get("adapters", 0)
    if kind == "ppo" and not model.with_lora:
        language //= 2  # one role's pass at a time
    embedding = shape.vocabulary * shape.hidden if model.adapter == "full" else 0
    per_layer = MASTER * (language - embedding) / shape.layers / share
    ends = MASTER * (embedding + trained.get("head", 0) + trained["projector"]) / share
    gradients = per_layer * shape.layers + ends
    head_gradient = MASTER * trained.get("head", 0) / share
    if model.gradient_checkpointing:
        kept, transient = stream, layer
    else:
        kept, transient = layer, 0.35 * layer  # a layer's own gradients while it runs backwards
    held = stream * 3 + kept * shape.layers  # embeddings, merged embeddings, final norm
    logits = _logits(kind, shape, rows, tokens, cpu)
    held_grads = gradients if _batches(kind, config) > config.launch.num_processes else 0.0
    # Walk backwards: activations go as gradients come.
    moments = [(held + logits, max(held_grads, head_gradient))]
    for left in range(shape.layers, 0, -1):
        done = shape.layers - left
        grown = max(held_grads, head_gradient + per_layer * (done + 1))
        moments.append((stream * 3 + kept * left + transient, grown))
    moments.append((stream * 3, gradients))
    activations, grown = max(moments, key=sum)
    named = {"gradients": grown, "activations": activations}
    if activations == held + logits:
        named = {"gradients": grown, "activations": held, "logits": logits}
    return named


def _logits(kind: str, shape: Shape, rows: int, tokens: int, cpu: bool) -> float:
    """Bytes of scores over the vocabulary at once; trl scores in tiles, PPO answers alone."""
    if kind == "reward":
        return 0.0
    tile = min(rows * tokens, 256)
    return 3.0 * 4 * tile * shape.vocabulary


# --- time ---------------------------------------------------------------------------------------


def _time(
    kind: str, config: Config, shape: Shape, device: Device, rows: int, tokens: int
) -> tuple[float, int | None]:
    """Seconds of an optimizer step, and how many there are."""
    model, launch = config.model, config.launch
    matmul = shape.linears + (shape.parts.get("head", 0) if kind != "reward" else 0)
    attention = shape.layers * 2 * tokens * shape.hidden  # multiply-adds a token, both products
    forward = 2.0 * rows * tokens * (matmul + attention)
    forward += 2.0 * rows * shape.tower_tokens * shape.parts.get("tower", 0)
    backward = (2.0 if model.adapter == "full" else 1.0) * forward
    if model.gradient_checkpointing:
        backward += forward
    passes = forward + backward + (forward if kind == "dpo" else 0.0)
    batches = max(1, _batches(kind, config) // launch.num_processes)
    rate = device.tflops * 1e12 * (0.7 if device.half == "none" else UTILISATION)
    if kind == "ppo":
        return _rollout_time(config, shape, device, forward, backward, rate), _steps(kind, config)
    return passes * batches / rate, _steps(kind, config)


def _rollout_time(
    config: Config, shape: Shape, device: Device, forward: float, backward: float, rate: float
) -> float:
    """Seconds of a PPO step: sample, measure under four roles, and every update."""
    ppo = config.ppo
    batches = ppo.rollout_batch_size / ppo.per_device_batch_size / config.launch.num_processes
    # Each inner pass trains policy and value model; sampling's prefill is a forward too.
    work = batches * (5 * forward + ppo.ppo_epochs * 2 * (forward + backward))
    # Answers come token by token, and every weight is read for each.
    weights = sum(shape.parts.values()) * (0.6 if config.model.adapter == "qlora" else 2.0)
    read = batches * ppo.max_new_tokens * weights / (device.bandwidth_gbs * 1e9 * 0.5)
    return work / rate + read


def _steps(kind: str, config: Config) -> int | None:
    """Optimizer steps, or rollouts, of the whole run, where the profile says."""
    section = getattr(config, kind)
    size = section.per_device_batch_size * _batches(kind, config)
    if kind == "ppo":
        size = section.rollout_batch_size
    if section.max_steps or not config.data.train_rows:
        return section.max_steps or None
    return max(1, round(config.data.train_rows * section.num_epochs / size))


# --- advice -------------------------------------------------------------------------------------


def _advice(kind: str, config: Config, device: Device, shape: Shape, made: Plan) -> list[str]:
    """What to change, cheapest first, until it fits; each says what it would bring."""
    if made.fits:
        return []
    said, current = [], config
    for text, change in _changes(kind, config):
        changed = change(current)
        if changed is None:
            continue
        tried = _plan(kind, changed, device, shape, made.tokens)
        said.append(f"{text}: {tried.total_gib:.1f} GiB")
        current = changed
        if tried.fits:
            return said
    return [*said, f"does not fit {device.name} even so: take a larger device, or more of them"]


def _changes(kind: str, config: Config) -> list[tuple[str, Any]]:
    def section(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, **{kind: dataclasses.replace(getattr(c, kind), **values)})

    def model(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, model=dataclasses.replace(c.model, **values))

    size = getattr(config, kind).per_device_batch_size
    smaller: dict[str, Any] = {"per_device_batch_size": 1}
    if kind != "ppo":  # a rollout keeps its size by itself
        smaller["gradient_accumulation_steps"] = size * _batches(kind, config)
    return [
        (
            "--set model.gradient_checkpointing=true",
            lambda c: None if c.model.gradient_checkpointing else model(
                c, gradient_checkpointing=True
            ),
        ),
        (
            " ".join(f"--set {kind}.{k}={v}" for k, v in smaller.items()),
            lambda c: None if size == 1 else section(c, **smaller),
        ),
        (
            "--set model.adapter=lora",
            lambda c: model(c, adapter="lora") if c.model.adapter == "full" else None,
        ),
        (
            "--set model.adapter=qlora",
            lambda c: model(c, adapter="qlora") if c.model.adapter == "lora" else None,
        ),
        (
            "--set model.lora_rank=16 --set model.lora_alpha=32",
            lambda c: model(c, lora_rank=16, lora_alpha=32)
            if c.model.with_lora and c.model.lora_rank > 16 else None,
        ),
    ]  # fmt: skip


def render(made: Plan) -> str:
    """The plan as text."""
    lines = [f"{made.kind} on {made.device.name} ({made.device.memory_gib:.1f} GiB a device)"]
    lines.append(f"  longest row {made.tokens} tokens, {made.rows} rows at once")
    lines += [f"  {name:<16}{value:8.2f} GiB" for name, value in made.parts_gib.items()]
    verdict = "fits" if made.fits else "does not fit"
    lines.append(f"  {'peak':<16}{made.total_gib:8.2f} GiB  {verdict}")
    whole = f", {made.steps} steps: {made.steps * made.step_s / 3600:.1f} h" if made.steps else ""
    lines.append(f"  {'time':<16}{made.step_s:8.1f} s a step{whole} (an estimate)")
    lines += [f"  change  {text}" for text in made.advice]
    return "\n".join(lines)


def advice_for(kind: str, config: Config, found: str) -> str:
    """What to say when memory ran out: the plan's peak, and what would bring it down.

    Args:
        kind: Trainer.
        config: Of the run.
        found: Device's name, one of `DEVICES` or cpu.
    """
    made = plan(kind, config, device_named(found))
    if made.advice:
        return f"the plan says {made.total_gib:.1f} GiB; try " + "; ".join(made.advice)
    return (
        f"the plan says {made.total_gib:.1f} GiB, which should fit: is something else using the "
        f"device? smaller: --set {kind}.per_device_batch_size=1"
    )
