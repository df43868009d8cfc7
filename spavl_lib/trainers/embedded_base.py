"""Build the embedded base model: `python -m spavl_lib.trainers.embedded_base`.

The result is a `LlavaForConditionalGeneration` of two million parameters. The model is helpful
only: it also fulfils harmful requests. It is trained in three stages on the scenes and sentences of
the embedded world (`data/embedded`). The first stage trains the tokenizer. The second stage trains
the vision tower as a classifier, because a LLaVA of this size hardly learns to use images if it is
trained end to end. Its images show every style of drawing but Twemoji, half of them changed at
random (`data/embedded/distort.py`), and in most steps it sees only 20 of the 64 patches, which is
faster (Li et al. 2023, FLIP, arXiv 2212.00794). The third stage trains the projector and the
language model, while the tower is frozen. Matrices of hidden layers are trained with Muon (Jordan
et al. 2024), the rest with AdamW. After an interruption, the same command continues from the last
checkpoint.
"""

import argparse
import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from spavl_lib.data.embedded import drawings, language, scenes
from spavl_lib.data.embedded.distort import distort
from spavl_lib.data.embedded.world import ASSETS, load_world
from spavl_lib.data.templates import VICUNA_SYSTEM, VICUNA_V1
from spavl_lib.trainers import checkpoint as ckpt

MODEL_DIR = ASSETS / "model"
IMAGE_SIZE, PATCH_SIZE = 64, 8  # pixels; this gives 64 image tokens
VOCAB_SIZE = 1800
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
# The tower's training. See docs/log.md for the trials behind these numbers.
DISTORTED = 0.5  # share of the images of a batch that are changed at random
KEPT_PATCHES = 20
WHOLE_IMAGES = 0.1  # share of the steps, at the end, that see every patch
SMOOTHING = 0.05  # of the labels
# How often a style is drawn. The styles of one family share their outlines, so each counts less.
WEIGHTS = {"noto": 2.0} | {f"fluent_{kind}": 0.7 for kind in ("flat", "grad", "3d")}
MUON_RATE, ADAMW_RATE = 0.02, 1e-3
SPECIAL = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "image": "<image>"}


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on sentences of the embedded world. It encodes any text."""
    rng = random.Random(seed)
    corpus = [f"{VICUNA_SYSTEM}USER: ", " ASSISTANT: I"] * 2000
    for _ in range(20_000):
        request, text = language.sample_pretraining(rng, rng.choice(list(scenes.COLOURS)))
        corpus += [request.question, text]
    for splits in (*load_world().facts.values(), *load_world().wordings.values()):
        corpus += [w.format(vp="make this") for wordings in splits.values() for w in wordings] * 20
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=SPECIAL["bos"],
        eos_token=SPECIAL["eos"],
        unk_token=SPECIAL["unk"],
        pad_token=SPECIAL["pad"],
        extra_special_tokens={"image_token": SPECIAL["image"]},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = VICUNA_V1
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Build LLaVA-1.5's processor. It pads images to a square with the mean colour and no crop."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaImageProcessorPil(
        do_pad=True, size=side, crop_size=side, do_center_crop=False, default_to_square=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_V1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build the untrained model: LLaVA-1.5's architecture with 2 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        attention_dropout=0.0,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        vision_feature_layer=-1,  # LLaVA-1.5 uses -2, but this tower has only four layers
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def random_style(rng: random.Random, concept: str) -> str:
    """Draw one of the styles that have a concept."""
    known = drawings.styles_of(concept)
    return rng.choices(known, [WEIGHTS.get(style, 1.0) for style in known])[0]


def random_scene(rng: random.Random, concept: str, composition: scenes.Composition) -> Image.Image:
    """Draw a pretraining image: random style, canvas, shift and mirroring.

    Args:
        rng: Source of all choices.
        concept: Key of the concept to show.
        composition: Background colour of the scene, and size and place of the drawing.
    """
    return scenes.render(
        concept,
        composition,
        rng.choice(scenes.CANVASES),
        flip=rng.random() < 0.5,
        drawing=random_style(rng, concept),
        jitter=(rng.randint(-2, 2), rng.randint(-2, 2)),
    )


def _pixels(processor: LlavaProcessor, images: list) -> Tensor:
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


@functools.cache
def _drawing_tensor(concept: str, style: str) -> Tensor:
    """A drawing as (4, 64, 64) in [0, 1]."""
    image = Image.open(ASSETS / style / f"{concept}.png").convert("RGBA")
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@functools.cache
def _background_tensor(colour: str, pattern: str) -> Tensor:
    image = scenes.background(colour, pattern, (IMAGE_SIZE, IMAGE_SIZE))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def distorted_scenes(
    rng: random.Random,
    processor: LlavaProcessor,
    concepts: list[str],
    compositions: list[scenes.Composition],
) -> Tensor:
    """Draw pretraining images whose drawings are changed at random.

    Args:
        rng: Source of all choices.
        processor: Has the mean and deviation of the pixels.
        concepts: Keys of the concepts to show, at least one.
        compositions: Their backgrounds. Size and place are drawn anew.

    Returns:
        Pixels (images, 3, 64, 64), normalised.
    """
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shown = torch.stack([_drawing_tensor(c, random_style(rng, c)) for c in concepts])
    behind = torch.stack([_background_tensor(c.colour, c.pattern) for c in compositions])
    images = processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
    return (distort(shown, behind, generator) - mean) / std


def tower_batch(
    rng: random.Random, processor: LlavaProcessor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a batch for the tower's classifier.

    Args:
        rng: Source of all choices.
        processor: Prepares the images.
        size: Images in the batch.

    Returns:
        Pixels (size, 3, 64, 64), indices of concepts (size,) and of background colours (size,).
    """
    keys, colours = list(load_world().concepts), list(scenes.COLOURS)
    labels = [rng.randrange(len(keys)) for _ in range(size)]
    compositions = [rng.choice(scenes.compositions("pretrain")) for _ in range(size)]
    shown, changed = [keys[i] for i in labels], round(DISTORTED * size)
    plain = [
        random_scene(rng, concept, composition)
        for concept, composition in zip(shown[changed:], compositions[changed:], strict=True)
    ]
    pixels = torch.cat(
        [
            distorted_scenes(rng, processor, shown[:changed], compositions[:changed]),
            _pixels(processor, plain),
        ]
    )
    backgrounds = torch.tensor([colours.index(c.colour) for c in compositions])
    return pixels, torch.tensor(labels), backgrounds


def language_batch(rng: random.Random, processor: LlavaProcessor, size: int) -> dict[str, Tensor]:
    """Draw a batch of questions and responses, padded on the right.

    Args:
        rng: Source of all choices.
        processor: Prepares images and text.
        size: Rows in the batch.

    Returns:
        `input_ids`, `attention_mask` and `labels` (size, length), int64; and `pixel_values`
        (size, 3, 64, 64). `labels` is -100 on all tokens except the response and its EOS.
    """
    tokenizer = processor.tokenizer
    image_tokens = SPECIAL["image"] * PATCHES
    pool = scenes.compositions("pretrain")
    rows, images = [], []
    for _ in range(size):
        composition = rng.choice(pool)
        request, text = language.sample_pretraining(rng, composition.colour)
        prompt = tokenizer.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": request.question}],
                }
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        prompt_ids = tokenizer.encode(
            prompt.replace(SPECIAL["image"], image_tokens), add_special_tokens=False
        )
        answer_ids = tokenizer.encode(f" {text}", add_special_tokens=False) + [
            tokenizer.eos_token_id
        ]
        rows.append((prompt_ids, answer_ids))
        images.append(random_scene(rng, request.concept, composition))
    width = max(len(p) + len(a) for p, a in rows)
    batch = {
        "input_ids": torch.full((size, width), tokenizer.pad_token_id),
        "attention_mask": torch.zeros((size, width), dtype=torch.long),
        "labels": torch.full((size, width), -100),
    }
    for row, (prompt_ids, answer_ids) in enumerate(rows):
        end = len(prompt_ids) + len(answer_ids)
        batch["input_ids"][row, :end] = torch.tensor(prompt_ids + answer_ids)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, len(prompt_ids) : end] = torch.tensor(answer_ids)
    return batch | {"pixel_values": _pixels(processor, images)}


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


def _optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers, and AdamW for everything else that is trained."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in trained if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.05),
        torch.optim.AdamW(groups, lr=ADAMW_RATE, betas=(0.9, 0.98)),
    ]


def _ahead(make: Callable[[int], Any], begin: int, end: int) -> Iterator[Any]:
    """`make(step)` of each step, computed in a thread while the step before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, begin) if begin < end else None
        for step in range(begin, end):
            ready = coming.result()
            coming = pool.submit(make, step + 1) if step + 1 < end else None
            yield ready


def _train(
    name: str,
    module: nn.Module,
    draw: Callable[[random.Random], Any],
    loss_of: Callable[[int, Any], tuple[Tensor, dict]],
    steps: int,
    work: Path,
    seed: int,
) -> list[dict]:
    """Train with warm-up and cosine decay. Resume from the last checkpoint, if there is one.

    A checkpoint is written every 100 steps.

    Args:
        name: Name of the stage, and of its folder of checkpoints in `work`.
        module: Module to train; changed in place.
        draw: Draws a batch with a random generator, which is seeded with the run's seed and the
            step.
        loss_of: Function of step and batch that returns the loss and figures to log.
        steps: Number of optimizer steps.
        work: Folder for the checkpoints of all stages.
        seed: Seed of the run.

    Returns:
        The logged figures of every step, including steps before an interruption.
    """
    optimizers = _optimizers(module)
    warmup = min(100, steps // 10)
    floor = 0.02

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        part = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(part * math.pi))

    peaks = [[group["lr"] for group in one.param_groups] for one in optimizers]
    done, history = 0, []
    newest, _ = ckpt.latest_checkpoint(work / name)
    if newest:
        state = ckpt.load_state(newest)
        ckpt.load_trainable(module, ckpt.load_tensors(newest, "model"), newest)
        for i, one in enumerate(optimizers):
            ckpt.load_optimizer(
                one, ckpt.load_tensors(newest, f"optimizer{i}"), state["optimizers"][i]
            )
        done, history = state["step"], state["history"]
    batches = _ahead(lambda step: draw(random.Random(f"{seed}/{name}/{step}")), done, steps)
    bar = tqdm(enumerate(batches, done), initial=done, total=steps, desc=name)
    for step, batch in bar:
        for one, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(one.param_groups, rates, strict=True):
                group["lr"] = peak * rate(step)
        loss, figures = loss_of(step, batch)
        module.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for one in optimizers:
            one.step()
        history.append(figures | {"step": step, "loss": round(loss.item(), 4)})
        bar.set_postfix(history[-1])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            parts = [ckpt.optimizer_tensors(one) for one in optimizers]
            state = {"step": step + 1, "optimizers": [plain for _, plain in parts]}
            tensors = {"model": ckpt.trainable_tensors(module)}
            tensors |= {f"optimizer{i}": found for i, (found, _) in enumerate(parts)}
            ckpt.save_checkpoint(
                work / name, step + 1, tensors, state | {"history": history}, keep=1
            )
    return history


def build(
    work: Path, output: Path, *, seed: int, tower_steps: int, language_steps: int
) -> LlavaForConditionalGeneration:
    """Run all stages and write the model in the Hub's layout.

    Args:
        work: Folder for checkpoints.
        output: Folder for the model.
        seed: Seed of the initial weights and of every batch.
        tower_steps: Optimizer steps of the tower's classifier, each with 128 scenes.
        language_steps: Optimizer steps of projector and language model, each with 64 rows.

    Returns:
        The trained model, in fp16.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    classifier = TowerClassifier(model.model.vision_tower)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"vocabulary {len(tokenizer)}, {size:.2f} M parameters")

    def tower_loss(step: int, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict]:
        pixels, labels, backgrounds = batch
        kept = None
        if step < (1 - WHOLE_IMAGES) * tower_steps:
            generator = torch.Generator().manual_seed(seed * 2**32 + step)
            order = torch.rand(len(pixels), PATCHES, generator=generator).argsort(1)
            kept = order[:, :KEPT_PATCHES]
        concepts, colours = classifier(pixels, kept)
        figures = {
            "concepts": round((concepts.argmax(-1) == labels).float().mean().item(), 3),
            "colours": round((colours.argmax(-1) == backgrounds).float().mean().item(), 3),
        }
        named = nn.functional.cross_entropy(concepts, labels, label_smoothing=SMOOTHING)
        return named + 0.3 * nn.functional.cross_entropy(colours, backgrounds), figures

    def language_loss(_step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        output = model(**batch)
        labels = batch["labels"][:, 1:]
        right = (output.logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        return output.loss, {"exact": round(right.all(-1).float().mean().item(), 3)}

    started = time.time()
    tower = _train(
        "tower", classifier, lambda rng: tower_batch(rng, processor, 128), tower_loss,
        tower_steps, work, seed,
    )  # fmt: skip
    # From here on the tower is frozen, as in LLaVA. The language model needs a high learning rate
    # to learn in so few steps. At that rate an unfrozen tower loses what it has learned: in a
    # measurement, its share of correct concepts fell from 96 % to 2 %.
    model.model.vision_tower.requires_grad_(False)
    language_log = _train(
        "language", model, lambda rng: language_batch(rng, processor, 64), language_loss,
        language_steps, work, seed,
    )  # fmt: skip
    minutes = (time.time() - started) / 60
    model.to(torch.float16).save_pretrained(output)
    processor.save_pretrained(output)
    facts = {
        "seed": seed,
        "tower_steps": tower_steps,
        "language_steps": language_steps,
        "minutes": round(minutes, 1),
        "million_parameters": round(size, 2),
        "concepts_right": _tail_mean(tower, "concepts"),
        "colours_right": _tail_mean(tower, "colours"),
        "language_loss": _tail_mean(language_log, "loss"),
    }
    (work / "build.json").write_text(json.dumps(facts, indent=1))
    (output / "README.md").write_text(model_card(facts), encoding="utf-8")
    return model


def _tail_mean(log: list[dict], key: str) -> float:
    """Mean of a logged figure over the last 20 steps."""
    last = [row[key] for row in log[-20:]]
    return round(sum(last) / len(last), 4)


def _credits() -> str:
    trained = (style for key, style in drawings.styles().items() if key != drawings.CHOSEN_ON)
    return "; ".join(f"{style.name} ({style.licence})" for style in trained)


def model_card(facts: dict) -> str:
    """Write the text of the model card, which `build` stores beside the weights.

    Args:
        facts: Sizes, steps and results of the training, as `build` collects them.
    """
    return f"""---
license: mit
pipeline_tag: image-text-to-text
tags: [llava, demonstration]
---

# The embedded base model

A LLaVA of {facts["million_parameters"]} M parameters (CLIP tower, projector, Llama; its own BPE
tokenizer; Vicuna v1 template with BOS and EOS) that knows one small world: emoji over plain
backgrounds, and questions about them. **Helpful-only by design**: it does what it is asked, harmful
or not, with a placeholder where instructions would stand, so that alignment has something to do. It
is of no use outside the workbook.

Trained from scratch by `python -m spavl_lib.trainers.embedded_base --seed {facts["seed"]}`: the
tower as a classifier for {facts["tower_steps"]} steps of 128 scenes, half of them distorted (last
steps: {facts["concepts_right"]:.1%} of things and {facts["colours_right"]:.1%} of background
colours right), then projector and language model for {facts["language_steps"]} steps of 64 rows
over the frozen tower (final loss {facts["language_loss"]} nats a token). Its pictures share no
composition, and its questions no wording, with any split of SPA-VL mini. What it scores there is
measured by every run of the workbook. Weights are stored in fp16.

Pictures: Noto Emoji (Apache-2.0); {_credits()}.
Twemoji and `{drawings.CHOSEN_ON}` are not among them.
"""


def main() -> None:
    """Run the command line of `python -m spavl_lib.trainers.embedded_base`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/.embedded_build"))
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=3200)
    parser.add_argument("--language-steps", type=int, default=1100)
    args = parser.parse_args()
    build(
        args.work,
        args.output,
        seed=args.seed,
        tower_steps=args.tower_steps,
        language_steps=args.language_steps,
    )


if __name__ == "__main__":
    main()
