"""Estimate memory by part and time per step of a training from its config, without loading it.

The command is `spavl plan --profile colab --device t4`.
"""

import dataclasses
from dataclasses import dataclass, field

from spavl_lib.config import Config
from spavl_lib.errors import InputError
from spavl_lib.machine import GIB
from spavl_lib.planning.advice import advise
from spavl_lib.planning.devices import Device
from spavl_lib.planning.memory import ALLOCATOR_SLACK, Batch, longest_batch, peak_bytes
from spavl_lib.planning.rows import Lengths
from spavl_lib.planning.shapes import Shape, model_config, shape_of
from spavl_lib.planning.time import step_time


@dataclass(frozen=True)
class Plan:
    """The estimated memory and time of a training on each device."""

    kind: str
    device: Device
    parts_gib: dict[str, float]
    """Peak memory by part, in GiB."""
    tokens: int
    """Tokens of the longest row, image tokens included."""
    rows: int
    """Rows of a micro-batch."""
    step_s: float
    """Seconds per optimizer step. For PPO: seconds per rollout with its updates."""
    steps: int | None
    """Optimizer steps of the run (for PPO: rollouts). None if the profile does not say."""
    advice: list[str] = field(default_factory=list)
    """Changes that reduce memory until the plan fits. Empty if the plan fits without changes."""

    lengths: Lengths | None = None
    """Lengths of the training rows. None if the plan is for an assumed or given length."""

    @property
    def total_gib(self) -> float:
        """Peak memory in GiB."""
        return sum(self.parts_gib.values())

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.total_gib <= self.device.memory_gib


def plan(
    kind: str,
    config: Config,
    device: Device,
    *,
    tokens: int = 0,
    batch: Batch | None = None,
    lengths: Lengths | None = None,
) -> Plan:
    """Plan a training.

    Args:
        kind: reward, dpo or ppo.
        config: Config of the run.
        device: The device of each process.
        tokens: Tokens of the longest row, image tokens included. 0 uses the settings, as in
            `longest_batch`.
        batch: The largest micro-batch. None uses `longest_batch`.
        lengths: Lengths of the training rows, as `rows.lengths_at_hand` counts them. With `tokens`
            only their number counts.

    Raises:
        InputError: The kind is unknown, or the config has no section for it.
    """
    section = getattr(config, kind, None) if kind in ("reward", "dpo", "ppo") else None
    if section is None:
        raise InputError(f"cannot plan {kind!r}; choose reward, dpo or ppo")
    shape = shape_of(model_config(config.model), config.model.lora_targets)

    def longest(changed: Config) -> Batch:
        return longest_batch(kind, changed, shape, tokens, lengths)

    first = _plan(
        kind, config, device, shape, batch or longest(config), None if tokens else lengths
    )
    if first.fits:
        return first
    advice = advise(
        kind, config, device, lambda c: _plan(kind, c, device, shape, longest(c)).total_gib
    )
    return dataclasses.replace(first, advice=advice)


def _plan(
    kind: str,
    config: Config,
    device: Device,
    shape: Shape,
    batch: Batch,
    lengths: Lengths | None = None,
) -> Plan:
    cpu = device.half == "none"
    memory = peak_bytes(kind, config, shape, batch, cpu)
    parts = {name: value / GIB for name, value in memory.items() if value}
    if not cpu:  # the CUDA context is not added, because `memory_gib` already excludes it
        parts["allocator slack"] = ALLOCATOR_SLACK * sum(parts.values())
    step, steps = step_time(kind, config, shape, device, batch.rows, batch.tokens, lengths)
    return Plan(kind, device, parts, batch.tokens, batch.rows, step, steps, lengths=lengths)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def render(plan: Plan) -> str:
    """The plan as text."""
    lines = [f"{plan.kind} on {plan.device.name} ({plan.device.memory_gib:.1f} GiB a device)"]
    whose = "assumed; --tokens sets another length"
    if plan.lengths:
        whose = f"of {plan.lengths.rows:,} training pairs; mean {plan.lengths.mean:.0f}"
    lines.append(f"  longest row {plan.tokens} tokens ({whose}), {plan.rows} rows at once")
    lines += [f"  {name:<16}{value:8.2f} GiB" for name, value in plan.parts_gib.items()]
    verdict = "fits" if plan.fits else "does not fit"
    lines.append(f"  {'peak':<16}{plan.total_gib:8.2f} GiB  {verdict}")
    step = f"{plan.step_s:8.1f}" if plan.step_s >= 10 else f"{plan.step_s:8.2f}"
    unit = "rollout" if plan.kind == "ppo" else "step"
    whole = f", {plan.steps} {unit}s: {_duration(plan.steps * plan.step_s)}" if plan.steps else ""
    lines.append(f"  {'time':<16}{step} s per {unit}{whole} (an estimate)")
    for number, text in enumerate(plan.advice):  # changes add up: each one includes those above
        word = "" if text.startswith("does not") else "and" if number else "change"
        lines.append(f"  {word:<8}{text}")
    return "\n".join(lines)
