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
from spavl_lib.planning.shapes import (
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


PROMPT = 160  # tokens a question with its template is taken for, besides its image
TILE = (4096, 32768)  # trl's head: tokens and words it scores at once


@dataclass(frozen=True)
class Batch:
    """The longest batch a device sees."""

    rows: int
    tokens: int
    """Of its longest row, image tokens counted."""
    answer: int
    """Of its longest answer."""

    def positions(self, shared: bool) -> int:
        """Tokens the layers run over: with shared prefixes a pair's question once."""
        if not shared:
            return self.rows * self.tokens
        return self.rows // 2 * (self.tokens + self.answer)


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


def plan(
    kind: str, config: Config, device: Device, *, tokens: int = 0, batch: Batch | None = None
) -> Plan:
    """Plan a training of a profile.

    Args:
        kind: reward, dpo or ppo.
        config: The profile.
        device: What each process has.
        tokens: Longest row, image tokens counted; the section's `max_length` if 0.
        batch: The longest batch, where it is known.

    Raises:
        InputError: Unknown kind; the profile lacks its section.
    """
    section = getattr(config, kind, None) if kind in ("reward", "dpo", "ppo") else None
    if section is None:
        raise InputError(f"cannot plan {kind!r}: reward, dpo or ppo")
    shape = shape_of(model_config(config.model), config.model.lora_targets)
    made = _plan(kind, config, device, shape, batch or _longest(kind, config, shape, tokens))
    return dataclasses.replace(made, advice=_advice(kind, config, device, shape, tokens, made))


def _longest(kind: str, config: Config, shape: Shape, tokens: int) -> Batch:
    """The batch to plan for where none was met yet."""
    section, question = getattr(config, kind), shape.image_tokens + PROMPT
    if kind == "ppo":
        answer = section.max_new_tokens
        return Batch(section.per_device_batch_size, tokens or question + answer, answer)
    tokens = tokens or section.max_length or 2048
    return Batch(2 * section.per_device_batch_size, tokens, max(1, tokens - question))


def _batches(kind: str, config: Config) -> int:
    """Device batches that all processes together sum into one optimizer step."""
    section = getattr(config, kind)
    if kind != "ppo":
        return section.gradient_accumulation_steps
    rows = section.rollout_batch_size / section.num_minibatches
    return max(1, round(rows / section.per_device_batch_size))


def _plan(kind: str, config: Config, device: Device, shape: Shape, batch: Batch) -> Plan:
    cpu = device.half == "none"
    memory = _static(kind, config, shape, cpu)
    peak = _moving(kind, config, shape, batch, cpu)
    if not cpu and kind == "ppo":
        # While answers are sampled no activations are held: the larger of the two counts.
        cache = shape.layers * 2 * shape.kv_width * 2 * batch.rows * batch.tokens
        moving = sum(peak.values())
        memory["KV cache"] = max(0.0, cache - moving)
    memory |= peak
    parts = {name: value / GIB for name, value in memory.items() if value}
    if not cpu:  # the allocator's slack; the CUDA context is off `memory_gib` already
        parts["allocator slack"] = 0.04 * sum(parts.values())
    step, steps = _time(kind, config, shape, device, batch.rows, batch.tokens)
    return Plan(kind, device, parts, batch.tokens, batch.rows, step, steps)


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
    # PPO samples with every parameter gathered: its peak is that of whole copies.
    pieces = launch.engine == "zero3" and kind != "ppo"
    whole = launch.num_processes if pieces else 1
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
        frozen_copies = {"dpo": 0 if config.dpo.cache_reference else 1, "reward": 0, "ppo": 2}[kind]
        memory["reference"] = half * frozen_copies * everything / whole
        if not cpu and not deep:  # autocast keeps its 16-bit copies for the whole forward pass
            memory["autocast copies"] = 2.0 * copies * shape.linears
    offload = launch.cpu_offload and launch.engine != "ddp"
    memory["optimizer"] = 0.0 if offload else ADAM * count / share
    if offload:
        memory["masters"] = 0.0
    return memory


def _widths(config: ModelConfig, cpu: bool) -> tuple[int, int]:
    """Bytes of a value in the residual stream, and inside a layer."""
    if cpu:
        return 4, 4
    return (4 if config.adapter == "full" else 2), 2


def _layer_bytes(config: ModelConfig, shape: Shape, batch: Batch, shared: bool, cpu: bool) -> float:
    """Bytes that autograd keeps of one decoder layer.

    A Llama layer keeps: its input, the normed input (twice where the norm's weight trains: before
    and after that weight), query, key, value, attention's output, the middle residual, the normed
    middle; in the MLP gate, its activation, up, and their product.

    With shared prefixes each answer attends to a copy of its question's keys and values beside its
    own, and the outputs by segment are kept beside the row they are put together to.
    """
    full = config.adapter == "full"
    h, kv, i = shape.hidden, shape.kv_width, shape.intermediate
    stream, inner = _widths(config, cpu)
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
    copies = 0
    if shared:
        kept += inner * (h + 2 * (h - kv))  # heads that share keys get their own
        copies = inner * 2 * h * batch.rows * batch.tokens
    return kept * batch.positions(shared) + copies


def _moving(kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool) -> dict[str, float]:
    """Peak of what comes and goes in a step: activations, logits, gradients."""
    model = config.model
    shared = model.share_prefix != "off" and kind != "ppo"
    positions = batch.positions(shared)
    stream, inner = _widths(model, cpu)
    layer = _layer_bytes(model, shape, batch, shared, cpu)
    residual = stream * positions * shape.hidden
    # What a layer needs besides what it keeps: forwards gate, up and their product where nothing is
    # kept; backwards the gradients of those three. And the residual with its normed form.
    passing = positions * (inner * 3 * shape.intermediate + stream * 2 * shape.hidden)
    if model.adapter == "qlora":  # a linear's weight in 16 bit while it is used
        passing += inner * shape.hidden * shape.intermediate
    trained = trained_values(kind, model, shape)
    share = config.launch.num_processes if config.launch.engine != "ddp" else 1
    roles = 2 if kind == "ppo" else 1  # the policy's gradients wait while the value model's come
    language = (trained.get("language", 0) + trained.get("adapters", 0)) / roles
    embedding = shape.vocabulary * shape.hidden if model.adapter == "full" else 0
    per_layer = MASTER * (language - embedding) / shape.layers / share
    head_gradient = MASTER * trained.get("head", 0) / share
    ends = MASTER * (embedding + trained["projector"] / roles) / share + head_gradient
    policy = per_layer * shape.layers + ends
    everyone = policy + (roles - 1) * (policy - head_gradient)
    accumulates = _batches(kind, config) > config.launch.num_processes
    waiting = everyone if accumulates else everyone - policy
    full = model.adapter == "full"
    # The last layer's output, its norm, and the rows it is laid back into.
    outer = residual * (3 if full else 2) + stream * batch.rows * batch.tokens * shape.hidden
    kept, recomputed = (residual, layer) if model.gradient_checkpointing else (layer, 0.0)
    held = outer + kept * shape.layers
    logits = _logits(kind, config, shape, batch, cpu)
    # Walk backwards: activations go as gradients come.
    moments = [(held, logits, (policy if accumulates else 0.0) + head_gradient)]
    if kind == "dpo" and not config.dpo.cache_reference:
        moments.append((held + passing, 0.0, waiting))
    for left in range(shape.layers, 0, -1):
        grown = head_gradient + per_layer * (shape.layers - left + 1)
        # Gradients add up in place where there were some.
        come = waiting if accumulates else waiting + grown
        moments.append((residual + kept * left + recomputed + passing, 0.0, come))
    # All gradients; a check of the largest that it is finite holds its absolute value and masks.
    largest = max(embedding, shape.hidden * shape.intermediate if full else 0)
    moments.append((7.0 * largest / share, 0.0, everyone))
    activations, logits, grown = max(moments, key=sum)
    return {"gradients": grown, "activations": activations, "logits": logits}


def _logits(kind: str, config: Config, shape: Shape, batch: Batch, cpu: bool) -> float:
    """Bytes of scores over the vocabulary at once.

    PPO scores the answers: logits, log-probabilities, and for the entropy probabilities and their
    product with those. trl's head works in tiles: with Triton in one buffer, elsewhere its backward
    holds logits, two scalings of them, log-probabilities, probabilities, the gradient, the targets
    as ones and zeros and their difference from the probabilities, and a mask.
    """
    if kind == "reward":
        return 0.0
    if kind == "ppo":
        return 4.0 * 4 * batch.rows * batch.answer * shape.vocabulary
    # Without shared prefixes trl's own head runs, which off Triton scores every position.
    length = batch.tokens if cpu and config.model.share_prefix == "off" else batch.answer
    tile = min(batch.rows * length, TILE[0]) * min(shape.vocabulary, TILE[1])
    return (8.25 * 4 if cpu else 2.0) * tile


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


def _advice(
    kind: str, config: Config, device: Device, shape: Shape, tokens: int, made: Plan
) -> list[str]:
    """What to change, cheapest first, until it fits; each says what it would bring.

    What turns out not to be needed, once a later change is made, is left out.
    """
    if made.fits:
        return []

    def followed(steps: list[tuple[str, Any]]) -> Config:
        current = config
        for _, change in steps:
            current = change(current) or current
        return current

    def planned(steps: list[tuple[str, Any]]) -> Plan:
        changed = followed(steps)
        return _plan(kind, changed, device, shape, _longest(kind, changed, shape, tokens))

    steps: list[tuple[str, Any]] = []
    for step in _changes(kind, config):
        if followed([*steps, step]) == followed(steps):
            continue
        steps.append(step)
        if planned(steps).fits:
            break
    fits = planned(steps).fits
    for step in steps[:-1] if fits else ():
        fewer = [s for s in steps if s is not step]
        if planned(fewer).fits:
            steps = fewer
    said = [
        f"{text}: {planned(steps[: n + 1]).total_gib:.1f} GiB" for n, (text, _) in enumerate(steps)
    ]
    if fits:
        return said
    more = ", or more of them" if config.model.adapter == "full" and kind != "ppo" else ""
    return [*said, f"does not fit {device.name} even so: take a larger device{more}"]


def _changes(kind: str, config: Config) -> list[tuple[str, Any]]:
    def section(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, **{kind: dataclasses.replace(getattr(c, kind), **values)})

    def model(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, model=dataclasses.replace(c.model, **values))

    def launch(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, launch=dataclasses.replace(c.launch, **values))

    size = getattr(config, kind).per_device_batch_size
    smaller: dict[str, Any] = {"per_device_batch_size": 1}
    if kind != "ppo":  # a rollout keeps its size by itself
        smaller["gradient_accumulation_steps"] = size * _batches(kind, config)
    full = config.model.adapter == "full"
    sharded = full and config.launch.num_processes > 1
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
            "--set dpo.cache_reference=true",
            lambda c: section(c, cache_reference=True)
            if full and kind == "dpo" and not c.dpo.cache_reference else None,
        ),
        *(
            (
                f"--set launch.engine={engine}",
                lambda c, engine=engine: launch(c, engine=engine)
                if sharded and c.launch.engine < engine else None,
            )
            for engine in ("zero2", "zero3")
        ),
        (
            "--set model.adapter=lora" + (" --set launch.engine=ddp" if sharded else ""),
            lambda c: launch(model(c, adapter="lora"), engine="ddp", cpu_offload=False)
            if c.model.adapter == "full" else None,
        ),
        (
            "--set model.adapter=qlora",
            lambda c: model(c, adapter="qlora") if c.model.adapter == "lora" else None,
        ),
        *(
            (
                f"--set model.lora_rank={rank} --set model.lora_alpha={alpha}",
                lambda c, rank=rank, alpha=alpha: model(c, lora_rank=rank, lora_alpha=alpha)
                if c.model.with_lora else None,
            )
            for rank, alpha in _halves(config.model.lora_rank, config.model.lora_alpha)
        ),
    ]  # fmt: skip


def _halves(rank: int, alpha: int) -> list[tuple[int, int]]:
    """Smaller ranks, down to 16, and the alpha that keeps the update's scale."""
    found = []
    while rank % 2 == 0 and rank >= 32:
        rank, alpha = rank // 2, max(1, alpha // 2)
        found.append((rank, alpha))
    return found


def render(made: Plan) -> str:
    """The plan as text."""
    lines = [f"{made.kind} on {made.device.name} ({made.device.memory_gib:.1f} GiB a device)"]
    lines.append(f"  longest row {made.tokens} tokens, {made.rows} rows at once")
    lines += [f"  {name:<16}{value:8.2f} GiB" for name, value in made.parts_gib.items()]
    verdict = "fits" if made.fits else "does not fit"
    lines.append(f"  {'peak':<16}{made.total_gib:8.2f} GiB  {verdict}")
    whole = f", {made.steps} steps: {made.steps * made.step_s / 3600:.1f} h" if made.steps else ""
    lines.append(f"  {'time':<16}{made.step_s:8.1f} s a step{whole} (an estimate)")
    for n, text in enumerate(made.advice):  # each comes on top of those above it
        word = "" if text.startswith("does not") else "and" if n else "change"
        lines.append(f"  {word:<8}{text}")
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
