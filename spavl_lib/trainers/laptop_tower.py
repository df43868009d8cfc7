"""The first stage of the model `laptop`: images as the embeddings of a caption's words."""

import random

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from spavl_lib.data.embedded import scenes
from spavl_lib.data.embedded.world import load_world
from spavl_lib.modelling import laptop
from spavl_lib.trainers.embedded_base import random_scene

TOWER_BATCH, TOWER_RATE = 128, 1e-3


def caption_ids(processor: LlavaProcessor, name: str, colour: str) -> list[int]:
    """The token ids whose embeddings the image tokens of a scene learn, one for each image token.

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

    Args:
        model: LLaVA. Its tower and projector are trained, and its word embeddings are the targets.
        processor: The model's processor.
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

    def draw(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Random scenes.

        Args:
            rng: Source of all choices.

        Returns:
            Pixels (batch, 3, 64, 64), and the numbers of concepts and colours (batch,).
        """
        things = [rng.randrange(len(self.concepts)) for _ in range(TOWER_BATCH)]
        compositions = [rng.choice(scenes.compositions("pretrain")) for _ in range(TOWER_BATCH)]
        images = [
            random_scene(rng, self.concepts[i], c)
            for i, c in zip(things, compositions, strict=True)
        ]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        colours = torch.tensor([self.colours.index(c.colour) for c in compositions])
        return pixels, torch.tensor(things), colours

    def loss(self, _step: int, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict]:
        """The loss of a batch, and the shares that are right.

        The loss of the image tokens is a cross-entropy over the words of all captions, whose logits
        are negative squared distances to the words' embeddings, plus the squared distance to the
        right embedding relative to the words' variance.

        Args:
            batch: What `draw` returns.
        """
        pixels, concepts, colours = batch
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
