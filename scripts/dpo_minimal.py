"""DPO of a vision-language model in one file, to be read from top to bottom.

    python scripts/dpo_minimal.py                          # one pass over the demo's pairs
    python scripts/dpo_minimal.py --steps 20 --out out/    # 20 steps, and the model in out/

It trains all weights but the vision tower's, as `spavl train dpo --profile demo` does, with the
same rows in the same order. Its losses are those of the library's trainer (a test compares them).
The library loads rows and models; everything that DPO adds stands below.

What it leaves out: GPUs, LoRA, half precision and its loss scaler, gradient accumulation,
checkpoints and resuming, the other losses of trl, cached log-probabilities of the reference, the
shared prefix of both responses, measurements on held-out pairs, and the checks for NaN, for rows
that are too long and for a reference that moves.
"""

import argparse
import copy
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from spavl_lib.config import Config, DPOConfig, load_config
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.load import load_preferences
from spavl_lib.modelling.load import load_model, load_processor


def response_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token, given image, prompt and the tokens before it.

    Args:
        model: A vision-language model.
        batch: A batch of pairs: `input_ids`, `attention_mask`, `completion_mask` (2 * pairs,
            length), and the images. The first half of the rows holds the chosen responses, the
            second half the rejected ones.

    Returns:
        Log-probabilities in nats, 0 outside the responses, and the mask of the response tokens;
        both (2 * pairs, length - 1).
    """
    inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
    logits = model(**inputs).logits
    # The logits at position t are the prediction of token t + 1, so the last ones predict nothing,
    # and nothing predicts the first token.
    targets, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()
    logps = torch.log_softmax(logits[:, :-1], dim=-1)
    return logps.gather(-1, targets[..., None])[..., 0] * mask, mask


def dpo_loss(
    policy: nn.Module, reference: nn.Module, batch: dict[str, Tensor], dpo: DPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch of pairs: DPO's, and the cross-entropy of the chosen responses.

    Args:
        policy: The model that is trained.
        reference: The frozen model that the policy must stay near.
        batch: See `response_logps`.
        dpo: Uses `beta` and `loss_weights`.

    Returns:
        The loss (), and values to log.
    """
    logps, mask = response_logps(policy, batch)
    with torch.no_grad():
        reference_logps, _ = response_logps(reference, batch)
    # How much more likely each response became, in nats: a sum over its tokens.
    log_ratios = (logps - reference_logps).sum(-1)
    chosen, rejected = log_ratios.chunk(2)
    margins = dpo.beta * (chosen - rejected)
    preference = -logsigmoid(margins).mean()
    # DPO sees only the difference, so both responses may become less likely. This term keeps the
    # chosen ones likely: their mean cross-entropy, over all their tokens.
    pairs = len(chosen)
    imitation = -logps[:pairs].sum() / mask[:pairs].sum()
    of_preference, of_imitation = dpo.loss_weights
    loss = of_preference * preference + of_imitation * imitation
    return loss, {
        "loss": loss.item(),
        "loss/preference": preference.item(),
        "loss/imitation": imitation.item(),
        "rewards/margins": margins.mean().item(),
        "rewards/accuracies": (margins > 0).float().mean().item(),
    }


def learning_rate(step: int, steps: int, dpo: DPOConfig) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then half a cosine down to 0."""
    if step < dpo.warmup_steps:
        return dpo.learning_rate * step / dpo.warmup_steps
    done = (step - dpo.warmup_steps) / max(1, steps - dpo.warmup_steps)
    return dpo.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def batches(count: int, size: int, seed: int) -> list[list[int]]:
    """One pass over the rows: their indices in a random order, in batches."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[start : start + size] for start in range(0, count, size)]


def train(config: Config, stop_after: int = 0) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the policy.

    Args:
        config: Uses `model`, `data`, `dpo` and `seed`.
        stop_after: Steps after which to stop, without a change of the schedule; 0 for all.

    Returns:
        The policy, and the logged values of every step.
    """
    dpo = config.dpo
    if dpo.loss_type != ("sigmoid", "sft") or dpo.lr_scheduler != "cosine":
        raise SystemExit("this file knows the losses sigmoid and sft, and the schedule cosine")
    if dpo.gradient_accumulation_steps > 1 or not config.model.train_projector:
        raise SystemExit("this file accumulates no gradients, and always trains the projector")
    rows = load_preferences(config.data, "train")
    collate = PreferenceCollator(load_processor(config.model))
    reference = load_model(config.model).float().requires_grad_(False).eval()
    policy = copy.deepcopy(reference).train()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=dpo.weight_decay)

    a_pass = len(batches(len(rows), dpo.per_device_batch_size, 0))
    steps = dpo.max_steps or math.ceil(dpo.num_epochs * a_pass)
    log: list[dict[str, float]] = []
    bar = tqdm(total=stop_after or steps, desc="dpo", unit="step")
    while len(log) < (stop_after or steps):
        epoch, place = divmod(len(log), a_pass)
        if place == 0:
            order = batches(len(rows), dpo.per_device_batch_size, config.seed + epoch)
        batch = collate([rows[i] for i in order[place]])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(len(log), steps, dpo)
        loss, values = dpo_loss(policy, reference, batch, dpo)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, dpo.max_grad_norm)
        optimizer.step()
        log.append(values | {"grad_norm": norm.item()})
        bar.update(1)
        bar.set_postfix(loss=f"{values['loss']:.3f}", margin=f"{values['rewards/margins']:.2f}")
    return policy.eval(), log


def main() -> None:
    """Train, and say how far the policy came."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="demo", help="its data, model and settings of DPO")
    parser.add_argument("--steps", type=int, default=0, help="fewer steps; 0: all of the profile's")
    parser.add_argument("--out", type=Path, help="folder for the trained model")
    asked = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models and batches below are on the CPU
    sets = {"model.adapter": "full"} | ({"dpo.max_steps": asked.steps} if asked.steps else {})
    config = load_config(asked.profile, sets)
    policy, log = train(config)
    for step in sorted({0, len(log) // 2, len(log) - 1}):
        print(f"step {step + 1}:", {key: round(value, 3) for key, value in log[step].items()})
    if asked.out:
        policy.save_pretrained(asked.out)
        load_processor(config.model).save_pretrained(asked.out)
        print(f"model: {asked.out}")


if __name__ == "__main__":
    main()
