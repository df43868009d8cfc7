"""Changes of settings that reduce memory, in the order in which they should be tried."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from spavl_lib.config import Config
from spavl_lib.planning.devices import Device
from spavl_lib.planning.memory import batches_per_step

if TYPE_CHECKING:
    from spavl_lib.planning.plan import Plan


class Change(NamedTuple):
    """One change of settings."""

    options: str
    """The change as options of a command, such as `--set model.adapter=lora`."""
    apply: Callable[[Config], Config | None]
    """Function that makes the change. Returns None if the change does not apply to the config."""


def advise(
    kind: str, config: Config, device: Device, peak_gib: Callable[[Config], float]
) -> list[str]:
    """List changes of settings that make the training fit, in the order in which they are tried.

    A change is left out if the later changes are enough without it.

    Args:
        kind: reward, dpo or ppo.
        config: The run's config, which does not fit.
        device: The device of each process.
        peak_gib: Function that returns the peak memory of a config, in GiB.

    Returns:
        A line for each change, with the peak after this change. If the training does not fit even
        with all changes, the last line says so.
    """

    def changed(changes: list[Change]) -> Config:
        current = config
        for change in changes:
            current = change.apply(current) or current
        return current

    def fits(changes: list[Change]) -> bool:
        return peak_gib(changed(changes)) <= device.memory_gib

    chosen: list[Change] = []
    for change in _changes(kind, config):
        if changed([*chosen, change]) == changed(chosen):
            continue
        chosen.append(change)
        if fits(chosen):
            break
    enough = fits(chosen)
    for change in chosen[:-1] if enough else ():
        fewer = [c for c in chosen if c is not change]
        if fits(fewer):
            chosen = fewer
    lines = [
        f"{change.options}: {peak_gib(changed(chosen[: n + 1])):.1f} GiB"
        for n, change in enumerate(chosen)
    ]
    if enough:
        return lines
    more = ", or more of them" if config.model.adapter == "full" and kind != "ppo" else ""
    return [*lines, f"does not fit {device.name} even so: take a larger device{more}"]


def _changes(kind: str, config: Config) -> list[Change]:
    """All changes for a training of this kind, in the order in which they are tried."""

    def section(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, **{kind: dataclasses.replace(getattr(c, kind), **values)})

    def model(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, model=dataclasses.replace(c.model, **values))

    def launch(c: Config, **values: Any) -> Config:
        return dataclasses.replace(c, launch=dataclasses.replace(c.launch, **values))

    size = getattr(config, kind).per_device_batch_size
    smaller: dict[str, Any] = {"per_device_batch_size": 1}
    if kind != "ppo":  # PPO's minibatch does not depend on per_device_batch_size
        smaller["gradient_accumulation_steps"] = size * batches_per_step(kind, config)
    full = config.model.adapter == "full"
    sharded = full and config.launch.num_processes > 1
    return [
        Change(
            "--set model.gradient_checkpointing=true",
            lambda c: None if c.model.gradient_checkpointing else model(
                c, gradient_checkpointing=True
            ),
        ),
        Change(
            " ".join(f"--set {kind}.{k}={v}" for k, v in smaller.items()),
            lambda c: None if size == 1 else section(c, **smaller),
        ),
        Change(
            "--set dpo.cache_reference=true",
            lambda c: section(c, cache_reference=True)
            if full and kind == "dpo" and c.dpo.runs_reference else None,
        ),
        *(
            Change(
                f"--set launch.engine={engine}",
                lambda c, engine=engine: launch(c, engine=engine)
                if sharded and c.launch.engine < engine else None,
            )
            for engine in ("zero2", "zero3")
        ),
        Change(
            "--set model.adapter=lora" + (" --set launch.engine=ddp" if sharded else ""),
            lambda c: launch(model(c, adapter="lora"), engine="ddp", cpu_offload=False)
            if c.model.adapter == "full" else None,
        ),
        Change(
            "--set model.adapter=qlora",
            lambda c: model(c, adapter="qlora") if c.model.adapter == "lora" else None,
        ),
        *(
            Change(
                f"--set model.lora_rank={rank} --set model.lora_alpha={alpha}",
                lambda c, rank=rank, alpha=alpha: model(c, lora_rank=rank, lora_alpha=alpha)
                if c.model.with_lora else None,
            )
            for rank, alpha in _halves(config.model.lora_rank, config.model.lora_alpha)
        ),
    ]  # fmt: skip


def _halves(rank: int, alpha: int) -> list[tuple[int, int]]:
    """Smaller LoRA ranks down to 16, each with the alpha that keeps the scale alpha / rank."""
    pairs = []
    while rank % 2 == 0 and rank >= 32:
        rank, alpha = rank // 2, max(1, alpha // 2)
        pairs.append((rank, alpha))
    return pairs


def advice_for(plan: "Plan") -> str:
    """What to do after memory ran out: the planned peak, and changes that reduce it."""
    if plan.advice:
        return f"the plan says {plan.total_gib:.1f} GiB; try " + "; ".join(plan.advice)
    return (
        f"the plan says {plan.total_gib:.1f} GiB, which should fit: is something else using the "
        f"device? To use less: --set {plan.kind}.per_device_batch_size=1"
    )
