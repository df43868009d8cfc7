"""The vision tower of the embedded base, trained as a classifier of drawings.

A LLaVA of two million parameters hardly learns to use images if it is trained end to end. So its
tower first learns to tell the 116 things apart, in many styles and in changed colours and shapes.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaProcessor

from spavl_lib.data.embedded import drawings, scenes
from spavl_lib.data.embedded.distort import background_tensor, distort, drawing_tensor
from spavl_lib.data.embedded.world import load_world
from spavl_lib.trainers.pretrain import pretrain

IMAGE_SIZE, PATCH_SIZE = 64, 8  # pixels; this gives 64 image tokens
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
BATCH = 128
# How often a style is drawn. The styles of one family share their outlines, so each counts less.
WEIGHTS = {"noto": 2.0} | {f"fluent_{kind}": 0.7 for kind in ("flat", "grad", "3d")}


@dataclass(frozen=True)
class Recipe:
    """How the tower is trained. docs/log.md has the trials behind the defaults."""

    styles: tuple[str, ...] = ()
    """Styles of the drawings; empty for all but the unseen ones."""
    distorted: float = 0.5
    """Share of the images of a batch whose drawing is changed at random."""
    kept_patches: int = 20
    """Number of patches that the tower sees in most steps, chosen at random. Fewer are faster (Li
    et al. 2023, *Scaling Language-Image Pre-training via Masking*, arXiv 2212.00794)."""
    whole_images: float = 0.1
    """Share of the steps, at the end, that see every patch."""
    smoothing: float = 0.05
    """Label smoothing."""
    muon: bool = True
    """Whether hidden layers are trained with Muon instead of AdamW."""


def random_style(rng: random.Random, concept: str, styles: tuple[str, ...] = ()) -> str:
    """Draw one of the styles that have a concept.

    Args:
        rng: Source of the choice.
        concept: Key of the concept.
        styles: Styles to choose from; empty for all on which models are trained.
    """
    known = [s for s in drawings.styles_of(concept) if not styles or s in styles]
    return rng.choices(known, [WEIGHTS.get(style, 1.0) for style in known])[0]


def random_scene(
    rng: random.Random,
    concept: str,
    composition: scenes.Composition,
    styles: tuple[str, ...] = (),
) -> Image.Image:
    """Draw a pretraining image: random style, canvas, shift and mirroring.

    Args:
        rng: Source of all choices.
        concept: Key of the concept to show.
        composition: Background colour of the scene, and size and place of the drawing.
        styles: As for `random_style`.
    """
    return scenes.render(
        concept,
        composition,
        rng.choice(scenes.CANVASES),
        flip=rng.random() < 0.5,
        drawing=random_style(rng, concept, styles),
        jitter=(rng.randint(-2, 2), rng.randint(-2, 2)),
    )


def pixels_of(processor: LlavaProcessor, images: list[Image.Image]) -> Tensor:
    """Images as the tower takes them, (images, 3, 64, 64), normalised."""
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def distorted_scenes(
    rng: random.Random,
    processor: LlavaProcessor,
    concepts: list[str],
    compositions: list[scenes.Composition],
    styles: tuple[str, ...] = (),
) -> Tensor:
    """Draw pretraining images whose drawings are changed at random.

    Args:
        rng: Source of all choices.
        processor: Has the mean and deviation of the pixels.
        concepts: Keys of the concepts to show, at least one.
        compositions: Their backgrounds. Size and place are drawn anew.
        styles: As for `random_style`.

    Returns:
        Pixels (images, 3, 64, 64), normalised.
    """
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shown = torch.stack([drawing_tensor(c, random_style(rng, c, styles)) for c in concepts])
    behind = torch.stack([background_tensor(c.colour, c.pattern) for c in compositions])
    images = processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
    return (distort(shown, behind, generator) - mean) / std


def tower_batch(
    rng: random.Random, processor: LlavaProcessor, size: int, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a batch for the tower's classifier.

    Args:
        rng: Source of all choices.
        processor: Prepares the images.
        size: Images in the batch.
        recipe: Says which styles to draw, and how many images to distort.

    Returns:
        Pixels (size, 3, 64, 64), indices of concepts (size,) and of background colours (size,).
    """
    keys, colours = list(load_world().concepts), list(scenes.COLOURS)
    labels = [rng.randrange(len(keys)) for _ in range(size)]
    compositions = [rng.choice(scenes.compositions("pretrain")) for _ in range(size)]
    shown, changed = [keys[i] for i in labels], round(recipe.distorted * size)
    plain = [
        random_scene(rng, concept, composition, recipe.styles)
        for concept, composition in zip(shown[changed:], compositions[changed:], strict=True)
    ]
    parts = [pixels_of(processor, plain)] if plain else []
    if changed:
        first = shown[:changed], compositions[:changed]
        parts.insert(0, distorted_scenes(rng, processor, *first, recipe.styles))
    backgrounds = torch.tensor([colours.index(c.colour) for c in compositions])
    return torch.cat(parts), torch.tensor(labels), backgrounds


class TowerClassifier(nn.Module):
    """The vision tower with two linear heads, which predict the concept and the background colour.

    Both heads read the mean of the patch features.
    """

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower
        size = tower.config.hidden_size
        self.concept_head = nn.Linear(size, len(load_world().concepts))
        self.colour_head = nn.Linear(size, len(scenes.COLOURS))

    def forward(self, pixel_values: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict concepts and background colours.

        Args:
            pixel_values: Images (batch, 3, 64, 64).
            kept: Indices (batch, patches) of the patches that the tower sees; None: all.

        Returns:
            Logits (batch, concepts) and (batch, colours).
        """
        states = self.tower.embeddings(pixel_values)
        if kept is not None:
            places = kept[..., None].expand(-1, -1, states.shape[-1])
            states = torch.cat([states[:, :1], states[:, 1:].gather(1, places)], 1)
        states = self.tower.encoder(inputs_embeds=self.tower.pre_layrnorm(states))
        patches = states.last_hidden_state[:, 1:].mean(1)
        return self.concept_head(patches), self.colour_head(patches)


def train_tower(
    tower: CLIPVisionModel,
    processor: LlavaProcessor,
    steps: int,
    work: Path,
    seed: int,
    recipe: Recipe | None = None,
) -> tuple[TowerClassifier, list[dict]]:
    """Train a tower as a classifier of concepts and background colours.

    Args:
        tower: The tower; changed in place.
        processor: Prepares the images.
        steps: Optimizer steps, each with `BATCH` images.
        work: Folder for checkpoints; a training that was interrupted continues from there.
        seed: Seed of every batch, and of the patches that are left out.
        recipe: How to train; None for the default.

    Returns:
        The classifier around the tower, and the logged figures of every step.
    """
    recipe = recipe or Recipe()
    classifier = TowerClassifier(tower)

    def loss_of(step: int, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict]:
        pixels, labels, backgrounds = batch
        kept = None
        if step < (1 - recipe.whole_images) * steps and recipe.kept_patches < PATCHES:
            generator = torch.Generator().manual_seed(seed * 2**32 + step)
            order = torch.rand(len(pixels), PATCHES, generator=generator).argsort(1)
            kept = order[:, : recipe.kept_patches]
        concepts, colours = classifier(pixels, kept)
        figures = {
            "concepts": round((concepts.argmax(-1) == labels).float().mean().item(), 3),
            "colours": round((colours.argmax(-1) == backgrounds).float().mean().item(), 3),
        }
        named = nn.functional.cross_entropy(concepts, labels, label_smoothing=recipe.smoothing)
        return named + 0.3 * nn.functional.cross_entropy(colours, backgrounds), figures

    log = pretrain(
        "tower", classifier, lambda rng: tower_batch(rng, processor, BATCH, recipe), loss_of,
        steps, work, seed, rate=1e-3, muon=recipe.muon,
        settings=asdict(recipe) | {"styles": list(recipe.styles)},
    )  # fmt: skip
    return classifier, log
