"""Estimate the time of a training from its floating-point operations and bytes read."""

from spavl_lib.config import Config
from spavl_lib.planning.devices import Device
from spavl_lib.planning.memory import PROMPT, batches_per_step
from spavl_lib.planning.rows import Lengths
from spavl_lib.planning.shapes import Shape

# Shares of the device's rates that a step is assumed to reach. They were not measured.
GPU_UTILISATION = 0.35  # share of the matrix-product rate in the data sheet
CPU_UTILISATION = 0.7  # share of the matrix-product rate that was measured on this machine
BANDWIDTH_UTILISATION = 0.5  # share of the memory bandwidth
# Bytes that sampling reads of each weight, for every token: of a 16-bit and of an NF4 weight.
HALF_BYTES, NF4_BYTES = 2.0, 0.6


def step_time(
    kind: str,
    config: Config,
    shape: Shape,
    device: Device,
    rows: int,
    tokens: int,
    lengths: Lengths | None = None,
) -> tuple[float, int | None]:
    """Estimate the time of an optimizer step, and the number of steps.

    If the lengths of the rows are known, the time is that of rows of mean length, with the prompt
    of a pair computed once where prefixes are shared. Otherwise it is an upper limit: every row is
    as long as the longest.

    Args:
        kind: reward, dpo or ppo.
        config: The run's config.
        shape: Sizes of the model.
        device: The device of each process.
        rows: Rows of a micro-batch.
        tokens: Tokens of the longest row, image tokens included.
        lengths: Lengths of the training rows; None if they are not known.

    Returns:
        Seconds per step, and the number of steps of the run (None if the config does not say). For
        PPO a step is a rollout with its updates.
    """
    model, launch = config.model, config.launch
    shared = bool(lengths) and model.share_prefix != "off" and kind != "ppo"
    matmul = shape.linears + (shape.parts.get("head", 0) if kind != "reward" else 0)
    full, recomputes = model.adapter == "full", model.gradient_checkpointing

    def passes_of(length: float) -> tuple[float, float]:
        """FLOPs of a micro-batch's forward pass, and of its backward pass."""
        # Multiply-adds per token of attention's two matrix products.
        attention = shape.layers * 2 * length * shape.hidden
        positions, images = rows * length, float(rows)
        if shared and lengths:
            positions, images = rows / 2 * (length + lengths.mean_answer), rows / 2
        text = 2.0 * positions * (matmul + attention)
        tower = 2.0 * images * shape.tower_tokens * shape.parts.get("tower", 0)
        # The tower is frozen. The upper limit nevertheless counts a backward pass through it.
        trained = text if lengths else text + tower
        forward = text + tower
        return forward, (2.0 if full else 1.0) * trained + (forward if recomputes else 0.0)

    rate = device.tflops * 1e12 * (CPU_UTILISATION if device.half == "none" else GPU_UTILISATION)
    if kind == "ppo":
        sampled = shape.image_tokens + PROMPT + config.ppo.max_new_tokens
        typical: float = min(tokens, sampled)
        if lengths:  # a response is assumed to be as long as those of the data
            typical, tokens = lengths.mean, round(lengths.mean)
        chosen = sum(passes_of(tokens)) if config.ppo.sft_coef else 0.0
        new = min(config.ppo.max_new_tokens, lengths.mean_answer) if lengths else None
        seconds = _rollout_time(config, shape, device, *passes_of(typical), chosen, rate, new)
        return seconds, _steps(kind, config, lengths)
    forward, backward = passes_of(lengths.mean if lengths else tokens)
    passes = forward + backward + (forward if kind == "dpo" and config.dpo.with_reference else 0.0)
    batches = max(1, batches_per_step(kind, config) // launch.num_processes)
    return passes * batches / rate, _steps(kind, config, lengths)


def _rollout_time(
    config: Config,
    shape: Shape,
    device: Device,
    forward: float,
    backward: float,
    chosen: float,
    rate: float,
    new_tokens: float | None = None,
) -> float:
    """Seconds of a PPO step: sampling, a forward pass of each of the four roles, and all updates.

    Args:
        config: The run's config.
        shape: Sizes of the model.
        device: The device of each process.
        forward: FLOPs of a micro-batch's forward pass.
        backward: FLOPs of a micro-batch's backward pass.
        chosen: FLOPs of both passes over a micro-batch of chosen responses; 0 if they are not used.
        rate: FLOPs per second.
        new_tokens: Tokens of a typical response. None uses the largest number.
    """
    ppo = config.ppo
    batches = ppo.rollout_batch_size / ppo.per_device_batch_size / config.launch.num_processes
    # Five forward passes: the prefill of sampling, and one of each role. Each inner epoch trains
    # policy and value model.
    work = batches * (5 * forward + ppo.ppo_epochs * (2 * (forward + backward) + chosen))
    # Sampling reads every weight for each token.
    bytes_per_weight = NF4_BYTES if config.model.adapter == "qlora" else HALF_BYTES
    weights = sum(shape.parts.values()) * bytes_per_weight
    read = batches * (new_tokens or ppo.max_new_tokens) * weights
    return work / rate + read / (device.bandwidth_gbs * 1e9 * BANDWIDTH_UTILISATION)


def _steps(kind: str, config: Config, lengths: Lengths | None = None) -> int | None:
    """Optimizer steps of the whole run (for PPO: rollouts). None if the config does not say."""
    section = getattr(config, kind)
    size = section.per_device_batch_size * batches_per_step(kind, config)
    if kind == "ppo":
        size = section.rollout_batch_size
    pairs = lengths.rows if lengths else config.data.train_rows
    if section.max_steps or not pairs:
        return section.max_steps or None
    return max(1, round(pairs * section.num_epochs / size))
