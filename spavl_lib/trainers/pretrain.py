"""The training loop of the models made here: Muon and AdamW, resumable, batches drawn ahead."""

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spavl_lib.errors import InputError
from spavl_lib.generation.generate import ahead
from spavl_lib.trainers import checkpoint as ckpt

MUON_RATE, DECAY = 0.02, 0.05  # peak learning rate of Muon; weight decay
LOWEST_RATE = 0.02  # of the peak, at the end


def _optimizers(
    module: nn.Module, rate: float, *, muon: bool, slower: Mapping[str, float]
) -> list[torch.optim.Optimizer]:
    """With `muon`, Muon for the matrices of hidden layers; AdamW for everything else.

    Args:
        module: Module to train.
        rate: Peak learning rate of AdamW.
        muon: See above.
        slower: Other learning rates of AdamW, by a part of the parameters' names.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if muon and p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in hidden}
    groups = []
    for part, own_rate in {"": rate, **slower}.items():
        of_part = [
            p for name, p in trained
            if id(p) not in chosen
            and (part in name if part else not any(other in name for other in slower))
        ]  # fmt: skip
        groups += [
            {"params": [p for p in of_part if p.ndim > 1], "weight_decay": DECAY, "lr": own_rate},
            {"params": [p for p in of_part if p.ndim <= 1], "weight_decay": 0.0, "lr": own_rate},
        ]
    others = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    return (
        [torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=DECAY), others] if hidden else [others]
    )


def pretrain(
    name: str,
    module: nn.Module,
    draw: Callable[[random.Random], Any],
    loss_of: Callable[[int, Any], tuple[Tensor, dict]],
    steps: int,
    work: Path,
    seed: int,
    *,
    rate: float,
    muon: bool = False,
    slower: Mapping[str, float] | None = None,
    save_steps: int = 100,
    settings: dict[str, Any] | None = None,
) -> list[dict]:
    """Train with warm-up and cosine decay. Resume from the last checkpoint, if there is one.

    Args:
        name: Name of the stage, and of its folder of checkpoints in `work`.
        module: Module to train; changed in place.
        draw: Draws a batch with a random generator, which is seeded with the run's seed and the
            step.
        loss_of: Function of step and batch that returns the loss and figures to log.
        steps: Number of optimizer steps.
        work: Folder for the checkpoints of all stages.
        seed: Seed of the run.
        rate: Peak learning rate of AdamW.
        muon: Whether matrices of hidden layers are trained with Muon (Jordan et al. 2024, *Muon:
            An optimizer for hidden layers in neural networks*) instead of AdamW.
        slower: Part of a parameter's name -> peak learning rate of AdamW for such parameters.
        save_steps: A checkpoint is written every so many steps.
        settings: Further settings, in JSON types, with which a training must be resumed.

    Raises:
        InputError: The checkpoint in `work` was made with other settings.

    Returns:
        The logged figures of every step, including steps before an interruption.
    """
    optimizers = _optimizers(module, rate, muon=muon, slower=slower or {})
    warmup = min(100, steps // 10)

    def part_of_peak(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        part = (step - warmup) / max(1, steps - warmup)
        return LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(part * math.pi))

    made_with = {"seed": seed, "steps": steps, "rate": rate, "muon": muon} | (settings or {})
    peaks = [[group["lr"] for group in one.param_groups] for one in optimizers]
    done, history = 0, []
    newest, _ = ckpt.latest_checkpoint(work / name)
    if newest:
        state = ckpt.load_state(newest)
        if state.get("made_with") != made_with:
            raise InputError(
                f"{newest} was made with {state.get('made_with')}, but this training has "
                f"{made_with}; choose another --work folder, or delete {work / name}"
            )
        ckpt.load_trainable(module, ckpt.load_tensors(newest, "model"), newest)
        for i, one in enumerate(optimizers):
            ckpt.load_optimizer(
                one, ckpt.load_tensors(newest, f"optimizer{i}"), state["optimizers"][i]
            )
        done, history = state["step"], state["history"]
    steps_left = range(done, steps)
    batches = ahead(lambda step: draw(random.Random(f"{seed}/{name}/{step}")), steps_left, False)
    bar = tqdm(enumerate(batches, done), initial=done, total=steps, desc=name)
    for step, batch in bar:
        for one, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(one.param_groups, rates, strict=True):
                group["lr"] = peak * part_of_peak(step)
        loss, figures = loss_of(step, batch)
        module.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for one in optimizers:
            one.step()
        history.append(figures | {"step": step, "loss": round(loss.item(), 4)})
        bar.set_postfix(history[-1])
        if (step + 1) % save_steps == 0 or step + 1 == steps:
            parts = [ckpt.optimizer_tensors(one) for one in optimizers]
            state = {"step": step + 1, "optimizers": [plain for _, plain in parts]}
            state["made_with"] = made_with
            tensors = {"model": ckpt.trainable_tensors(module)}
            tensors |= {f"optimizer{i}": found for i, (found, _) in enumerate(parts)}
            ckpt.save_checkpoint(
                work / name, step + 1, tensors, state | {"history": history}, keep=1
            )
    return history


def tail_mean(log: list[dict], key: str) -> float:
    """Mean of a logged figure over the last 20 steps.

    Args:
        log: The result of `pretrain`.
        key: Name of the figure.
    """
    last = [row[key] for row in log[-20:]]
    return round(sum(last) / len(last), 4)
