"""The first stage of the model `laptop`: images as the embeddings of a caption's words.

The training loop of both stages is here too.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from spavl_lib.data.embedded import scenes
from spavl_lib.data.embedded.world import load_world
from spavl_lib.errors import InputError
from spavl_lib.modelling import laptop, smollm2
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.embedded_base import random_scene

TOWER_BATCH, TOWER_RATE, TOWER_DECAY = 128, 1e-3, 0.05
SAVE_STEPS = 20


# --- one training loop for both stages ------------------------------------------------------------


def train(
    name: str,
    module: nn.Module,
    groups: list[dict[str, Any]],
    loss_of: Callable[[random.Random], tuple[Tensor, dict]],
    steps: int,
    work: Path,
    seed: int,
) -> list[dict]:
    """Train with AdamW, warm-up and cosine decay. Resume from the last checkpoint, if there is one.

    A checkpoint is written every `SAVE_STEPS` steps.

    Args:
        name: Name of the stage, and of its folder of checkpoints in `work`.
        module: Module to train; changed in place.
        groups: The optimizer's groups of parameters, with peak learning rate and weight decay.
        loss_of: Draws a batch with a random generator, and returns the batch's loss and figures to
            log. The generator is seeded with the run's seed and the step.
        steps: Number of optimizer steps.
        work: Folder for the checkpoints of all stages.
        seed: Seed of the run.

    Returns:
        The logged figures of every step, including steps before an interruption.

    Raises:
        InputError: The checkpoint in `work` was made with other settings.
        DiskError: There is no space or no permission.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in groups]
    warmup = max(1, round(0.08 * steps))
    made_with = {"seed": seed, "steps": steps, "rates": peaks, "base": smollm2.PINNED.weights}
    done, history = 0, []
    newest = ckpt.newest_checkpoint(work / name)
    if newest:
        state = ckpt.load_state(newest)
        if state["made_with"] != made_with:
            raise InputError(
                f"{newest} was made with {state['made_with']}, but this training has {made_with}; "
                f"choose another --work folder, or delete {work / name}"
            )
        ckpt.load_trainable(module, ckpt.load_tensors(newest, "model"), newest)
        ckpt.load_optimizer(optimizer, ckpt.load_tensors(newest, "optimizer"), state["optimizer"])
        done, history = state["step"], state["history"]
    trained = [p for p in module.parameters() if p.requires_grad]
    bar = tqdm(range(done, steps), initial=done, total=steps, desc=name)
    for step in bar:
        part = (step + 1 - warmup) / max(1, steps - warmup)
        share = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * part))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * max(share, 0.01)
        loss, figures = loss_of(random.Random(f"{seed}/{name}/{step}"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        history.append(figures | {"step": step, "loss": round(loss.item(), 4)})
        bar.set_postfix(history[-1])
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == steps:
            tensors, plain = ckpt.optimizer_tensors(optimizer)
            state = {"step": step + 1, "made_with": made_with, "optimizer": plain}
            ckpt.save_checkpoint(
                work / name, step + 1,
                {"model": ckpt.trainable_tensors(module), "optimizer": tensors},
                state | {"history": history}, keep=1,
            )  # fmt: skip
    return history


# --- first stage: images as the embeddings of words -----------------------------------------------


def caption_ids(processor: LlavaProcessor, name: str, colour: str) -> list[int]:
    """Token ids that the image tokens of a scene shall stand for.

    The image tokens take four roles in turn: three tokens of the thing's name, and the first token
    of the background's colour. The last token of a shorter name is repeated.

    Args:
        processor: Has the tokenizer.
        name: Name of the thing.
        colour: Name of the background's colour.
    """
    encode = processor.tokenizer.encode
    named = encode(f" {name}", add_special_tokens=False)
    named = [*named, *[named[-1]] * 2][:3]
    caption = [*named, encode(f" {colour}", add_special_tokens=False)[0]]
    return (caption * laptop.IMAGE_TOKENS)[: laptop.IMAGE_TOKENS]


class Captioner(nn.Module):
    """Tower and projector, with a loss that draws image tokens to the embeddings of a caption.

    Two linear heads also predict the concept and the background colour from the mean of the
    tower's patches, as in the embedded base. They are not kept.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor):
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.processor = processor
        world = load_world()
        self.concepts, self.colours = list(world.concepts), list(scenes.COLOURS)
        size = self.tower.config.hidden_size
        self.concept_head = nn.Linear(size, len(self.concepts))
        self.colour_head = nn.Linear(size, len(self.colours))
        captions = [
            [caption_ids(processor, world.concepts[key].name, colour) for colour in self.colours]
            for key in self.concepts
        ]
        vocabulary = sorted({i for row in captions for ids in row for i in ids})
        places = {token: place for place, token in enumerate(vocabulary)}
        # (concepts, colours, image tokens): the row of each token in `words`.
        self.captions = torch.tensor(
            [[[places[i] for i in ids] for ids in row] for row in captions]
        )
        self.words = model.get_input_embeddings().weight.detach()[vocabulary]

    def loss(self, rng: random.Random) -> tuple[Tensor, dict]:
        """The loss of a batch of random scenes, and the shares that are right.

        The loss of the image tokens is a cross-entropy over the words of all captions, whose logits
        are negative squared distances to the words' embeddings, plus the squared distance to the
        right embedding relative to the words' variance.

        Args:
            rng: Source of all choices.
        """
        things = [rng.randrange(len(self.concepts)) for _ in range(TOWER_BATCH)]
        compositions = [rng.choice(scenes.compositions("pretrain")) for _ in range(TOWER_BATCH)]
        images = [
            random_scene(rng, self.concepts[i], c)
            for i, c in zip(things, compositions, strict=True)
        ]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        concepts = torch.tensor(things)
        colours = torch.tensor([self.colours.index(c.colour) for c in compositions])
        patches = self.tower(pixels).last_hidden_state[:, 1:]
        named, coloured = self.concept_head(patches.mean(1)), self.colour_head(patches.mean(1))
        projected = self.projector(patches)
        right = self.captions[concepts, colours]
        distances = torch.cdist(projected.flatten(0, 1), self.words).square()
        variance = self.words.var(0, unbiased=False).sum()
        error = (projected - self.words[right]).square().sum(-1).mean() / variance
        cross_entropy = nn.functional.cross_entropy
        loss = cross_entropy(named, concepts) + 0.3 * cross_entropy(coloured, colours)
        loss = loss + cross_entropy(-distances, right.flatten()) + error
        figures = {
            "concepts": share(named.argmax(-1) == concepts),
            "colours": share(coloured.argmax(-1) == colours),
            "tokens": share(distances.argmin(-1) == right.flatten()),
        }
        return loss, figures


def share(right: Tensor) -> float:
    """The share of true values, rounded for the log."""
    return round(right.float().mean().item(), 3)
