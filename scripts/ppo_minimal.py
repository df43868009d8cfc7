"""PPO of a vision-language model in one file, to be read from top to bottom.

    spavl train reward --profile demo                      # the reward model, once
    python scripts/ppo_minimal.py --steps 10               # 10 rollouts, each with its updates

It trains policy and value model in full, as `spavl train ppo --profile demo` does: same prompts,
formulas and schedule. On the same responses its updates are those of the library's trainer (a test
compares them). The library loads rows and models; everything that PPO adds stands below.

What it leaves out: GPUs, LoRA with one base model in four roles, half precision and its loss
scaler, micro-batches, checkpoints and resuming, the cache of the vision tower, sampling that does
not depend on the batch, the settings in `NOT_HERE`, and the checks for NaN, for collapsed responses
and for a ratio that is not 1 before the first update.
"""

import argparse
import hashlib
import itertools
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from spavl_lib.config import Config, load_config
from spavl_lib.data.collate import pad_rows
from spavl_lib.data.images import decode_images
from spavl_lib.data.load import load_preferences
from spavl_lib.data.templates import completion_ids, encode_prompts
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import load_model, load_processor

NOT_HERE = {
    "entropy_coef": 0, "value_clip_range": 0, "kl_target": 0, "length_penalty": 0,
    "whiten_rewards": False, "whiten_advantages": True, "kl_estimator": "k1", "temperature": 1,
}  # fmt: skip


@dataclass
class Batch:
    """Prompts with responses. The responses begin in the same column.

        ids    pad pad P1 P2 | R1 R2 EOS pad
        seen    0   0  1  1  | 1  1   1   0

    `ids`, `seen` (rows, length), `vision` has the image tensors, and `mask` (rows, width), with
    `width` the length of the longest response, is True on response tokens, EOS included.
    """

    ids: Tensor
    seen: Tensor
    vision: dict[str, Tensor]
    mask: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What a model takes."""
        return {"input_ids": self.ids, "attention_mask": self.seen, **self.vision}

    def rows(self, chosen: list[int]) -> "Batch":
        """Some of the rows. Every row of the embedded data has one image."""
        vision = {name: value[chosen] for name, value in self.vision.items()}
        return Batch(self.ids[chosen], self.seen[chosen], vision, self.mask[chosen])


def join(prompts: Batch, responses: list[list[int]], pad: int) -> Batch:
    """Put responses after prompts."""
    ones = [[1] * len(response) for response in responses]
    seen = pad_rows(ones, 0, "right")
    ids = torch.cat([prompts.ids, pad_rows(responses, pad, "right")], 1)
    return Batch(ids, torch.cat([prompts.seen, seen], 1), prompts.vision, seen.bool())


class PPO:
    """Four models and one optimizer.

    Args:
        config: Uses `model`, `data`, `ppo` and `seed`.
        reward_folder: The `model/` that the reward trainer wrote.
    """

    def __init__(self, config: Config, reward_folder: Path):
        self.config, self.ppo = config, config.ppo
        if self.ppo.max_steps == 0:
            raise SystemExit("this file needs the number of rollouts: ppo.max_steps, or --steps")
        if other := [name for name, value in NOT_HERE.items() if getattr(self.ppo, name) != value]:
            raise SystemExit(f"this file does not know ppo.{', ppo.'.join(other)}")
        self.processor = load_processor(config.model)
        tokenizer = self.processor.tokenizer
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.never = [self.pad, tokenizer.bos_token_id, self.processor.image_token_id]
        self.rows = load_preferences(config.data, "train")
        self.policy, self.reference = load_model(config.model), load_model(config.model)
        # The value model begins as the reward model: both predict a score.
        self.reward = load_reward_model(config.model, reward_folder)
        self.value = load_reward_model(config.model, reward_folder)
        self.reference.requires_grad_(False)
        self.reward.requires_grad_(False)
        for name, parameter in itertools.chain(
            self.policy.named_parameters(), self.value.named_parameters()
        ):
            parameter.requires_grad_("vision_tower" not in name)
        self.value.vlm.get_output_embeddings().requires_grad_(False)  # it predicts no tokens
        self.trained = {
            name: [p for p in getattr(self, name).parameters() if p.requires_grad]
            for name in ("policy", "value")
        }
        rates = (self.ppo.learning_rate, self.ppo.value_learning_rate or self.ppo.learning_rate)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": lr} for p, lr in zip(self.trained.values(), rates, strict=True)],
            weight_decay=self.ppo.weight_decay,
        )
        self.scheduler = get_scheduler(
            self.ppo.lr_scheduler, self.optimizer, self.ppo.warmup_steps,
            self.ppo.max_steps * self.ppo.ppo_epochs * self.ppo.num_minibatches,
        )  # fmt: skip

    # --- what each model says of a batch ----------------------------------------------------------

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probability of every response token, in nats, 0 outside responses: (rows, width)."""
        width = batch.mask.shape[1]
        # The logits at a position are the prediction of the next token: one column to the left.
        logits = model(**batch.inputs()).logits[:, -width - 1 : -1]
        logits[..., self.never] = -1e9
        logps = torch.log_softmax(logits, -1).gather(-1, batch.ids[:, -width:, None])[..., 0]
        return logps * batch.mask

    def values(self, batch: Batch) -> Tensor:
        """What score the value model expects before every response token: (rows, width)."""
        states = self.value.hidden_states(**batch.inputs())
        width = batch.mask.shape[1]
        return self.value.score(states[:, -width - 1 : -1])[..., 0] * batch.mask

    # --- a rollout --------------------------------------------------------------------------------

    def prompts_of(self, step: int) -> tuple[list[dict], Batch]:
        """The rows of a step, and their encoded prompts, padded on the left."""
        size, count = self.ppo.rollout_batch_size, len(self.rows)
        rows = []
        for place in range(step * size, (step + 1) * size):
            epoch, offset = divmod(place, count)
            rows.append(self.rows[shuffled(count, f"{self.config.seed}/prompts/{epoch}")[offset]])
        encoded = encode_prompts(self.processor, [r["prompt"] for r in rows], decode_images(rows))
        seen = pad_rows([[1] * len(ids) for ids in encoded.ids], 0, "left")
        ids = pad_rows(encoded.ids, self.pad, "left")
        return rows, Batch(ids, seen, encoded.vision, torch.zeros(len(rows), 0, dtype=torch.bool))

    @torch.no_grad()
    def sample(self, prompts: Batch) -> list[list[int]]:
        """Sample a response to each prompt. Tokens after EOS are cut off."""
        self.policy.eval()
        out = self.policy.generate(
            **prompts.inputs(), do_sample=True, temperature=1.0, top_k=0,
            suppress_tokens=self.never, max_new_tokens=self.ppo.max_new_tokens,
            eos_token_id=self.end, pad_token_id=self.pad,
        )[:, prompts.ids.shape[1] :].tolist()  # fmt: skip
        return [row[: row.index(self.end) + 1] if self.end in row else row for row in out]

    @torch.no_grad()
    def measure(self, batch: Batch, responses: list[list[int]]) -> dict[str, Tensor]:
        """What the updates need: log-probabilities, advantages and returns, all (rows, width)."""
        for model in (self.policy, self.reference, self.value, self.reward):
            model.eval()
        old, reference = self.logps(self.policy, batch), self.logps(self.reference, batch)
        values, scores = self.values(batch), self.reward(**batch.inputs())
        unfinished = torch.tensor([response[-1] != self.end for response in responses])
        # The reward of a token is minus its KL penalty. The last token also gets the score of the
        # whole response.
        kl = old - reference
        rewards = -self.ppo.kl_coef * kl
        last = batch.mask.sum(1) - 1
        rewards[range(len(last)), last] += scores - self.ppo.missing_eos_penalty * unfinished
        # Generalised advantage estimation, from the last token to the first.
        advantages, advantage, after = torch.zeros_like(values), torch.zeros(len(values)), 0.0
        for t in reversed(range(values.shape[1])):
            td_error = rewards[:, t] + self.ppo.gamma * after - values[:, t]
            advantage = td_error + self.ppo.gamma * self.ppo.gae_lambda * advantage
            advantage = advantage * batch.mask[:, t]
            advantages[:, t], after = advantage, values[:, t]
        returns = (advantages + values) * batch.mask
        mean = mean_over(advantages, batch.mask)
        spread = mean_over((advantages - mean) ** 2, batch.mask)
        advantages = (advantages - mean) * torch.rsqrt(spread + 1e-8) * batch.mask
        return {
            "old": old, "advantages": advantages, "returns": returns, "scores": scores,
            "kl": kl.sum(1),
        }  # fmt: skip

    # --- the updates ------------------------------------------------------------------------------

    def update(
        self, step: int, rows: list[dict], prompts: Batch, responses: list[list[int]]
    ) -> dict[str, float]:
        """Take all optimizer steps of a rollout.

        Args:
            step: Number of the rollout, from 0.
            rows: The rows of the prompts, for their chosen responses.
            prompts: The encoded prompts.
            responses: Token ids of the sampled responses.

        Returns:
            Means over the responses or over the updates.
        """
        whole = join(prompts, responses, self.pad)
        rollout, sums = self.measure(whole, responses), {}
        chosen = [completion_ids(self.processor, r["prompt"], r["chosen"]) for r in rows]
        imitated = join(prompts, chosen, self.pad)
        self.policy.train()
        self.value.train()
        for epoch in range(self.ppo.ppo_epochs):
            order = shuffled(len(rows), seed_from(f"{self.config.seed}/update/{step}/{epoch}"))
            for n in range(self.ppo.num_minibatches):
                part = order[n :: self.ppo.num_minibatches]
                values = self.minibatch(part, whole, imitated, rollout)
                for name, value in values.items():
                    sums.setdefault(name, []).append(value)
        logged = {name: sum(values) / len(values) for name, values in sums.items()}
        logged["objective/scores"] = rollout["scores"].mean().item()
        logged["objective/kl"] = rollout["kl"].mean().item()
        return logged

    def minibatch(
        self, part: list[int], whole: Batch, imitated: Batch, rollout: dict[str, Tensor]
    ) -> dict[str, float]:
        """Take one optimizer step on the rows `part` of a rollout, and return values to log."""
        batch, ppo = whole.rows(part), self.ppo
        old, advantages, returns = (rollout[k][part] for k in ("old", "advantages", "returns"))
        # The policy: raise what was better than expected, but no further than the clip allows.
        ratio = torch.exp(self.logps(self.policy, batch) - old)
        clipped = ratio.clamp(1 - ppo.clip_range, 1 + ppo.clip_range)
        policy = mean_over(-torch.minimum(ratio * advantages, clipped * advantages), batch.mask)
        # The chosen responses' cross-entropy, so that the policy does not forget what it knows.
        other = imitated.rows(part)
        imitation = -self.logps(self.policy, other).sum() / other.mask.sum()
        # The value model: half the squared error of its expectation.
        value = 0.5 * mean_over((self.values(batch) - returns) ** 2, batch.mask)
        self.optimizer.zero_grad()
        (policy + ppo.sft_coef * imitation + ppo.vf_coef * value).backward()
        norms = {
            f"grad_norm/{name}": nn.utils.clip_grad_norm_(parameters, ppo.max_grad_norm).item()
            for name, parameters in self.trained.items()
        }
        self.optimizer.step()
        self.scheduler.step()
        losses = {"policy": policy, "sft": imitation, "value": value}
        return norms | {f"loss/{name}_avg": loss.item() for name, loss in losses.items()}


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the response tokens of a batch."""
    return (values * mask).sum() / mask.sum()


def shuffled(count: int, seed: int | str) -> list[int]:
    """The numbers below `count` in a random order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def seed_from(text: str) -> int:
    """A seed that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def main() -> None:
    """Train, and print the mean score and KL of every rollout."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="demo", help="its data, model and settings of PPO")
    parser.add_argument("--steps", type=int, default=0, help="rollouts; 0: as many as the profile")
    parser.add_argument("--reward-model", type=Path, default=Path("runs/demo/reward/model"))
    parser.add_argument("--out", type=Path, help="folder for the trained model")
    asked = parser.parse_args()
    if not (asked.reward_model / "reward_config.json").is_file():
        parser.error(f"no reward model in {asked.reward_model}: spavl train reward --profile demo")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models and batches below are on the CPU
    sets = {"model.adapter": "full"} | ({"ppo.max_steps": asked.steps} if asked.steps else {})
    config = load_config(asked.profile, sets)
    torch.manual_seed(config.seed)
    trainer = PPO(config, asked.reward_model)
    for step in tqdm(range(config.ppo.max_steps), desc="ppo", unit="step"):
        rows, prompts = trainer.prompts_of(step)
        logged = trainer.update(step, rows, prompts, trainer.sample(prompts))
        score, kl = logged["objective/scores"], logged["objective/kl"]
        tqdm.write(f"rollout {step + 1}: score {score:.2f}, KL {kl:.2f} nats")
    if asked.out:
        trainer.policy.save_pretrained(asked.out)
        trainer.processor.save_pretrained(asked.out)
        print(f"model: {asked.out}")


if __name__ == "__main__":
    main()
