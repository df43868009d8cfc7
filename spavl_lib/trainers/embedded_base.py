"""Build the embedded base model: `python -m spavl_lib.trainers.embedded_base`.

The result is a `LlavaForConditionalGeneration` of two million parameters. The model is helpful
only: it also fulfils harmful requests. It is trained in three stages on the scenes and sentences of
the embedded world (`data/embedded`). The first stage trains the tokenizer. The second stage trains
the vision tower as a classifier, because a LLaVA of this size hardly learns to use images if it is
trained end to end. The third stage trains the projector and the language model, while the tower is
frozen. After an interruption, the same command continues from the last checkpoint.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
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

from spavl_lib.data.embedded import language, scenes
from spavl_lib.data.embedded.world import ASSETS, load_world
from spavl_lib.data.templates import VICUNA_SYSTEM, VICUNA_V1
from spavl_lib.trainers import checkpoint as ckpt

MODEL_DIR = ASSETS / "model"
IMAGE_SIZE, PATCH_SIZE = 64, 8  # pixels; this gives 64 image tokens
VOCAB_SIZE = 1800
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
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def random_scene(rng: random.Random, concept: str, composition: scenes.Composition):
    """Draw a pretraining image: a scene with a random canvas, a random shift and random mirroring.

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
        jitter=(rng.randint(-2, 2), rng.randint(-2, 2)),
    )


def _pixels(processor: LlavaProcessor, images: list) -> Tensor:
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


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
    images = [random_scene(rng, keys[i], c) for i, c in zip(labels, compositions, strict=True)]
    backgrounds = torch.tensor([colours.index(c.colour) for c in compositions])
    return _pixels(processor, images), torch.tensor(labels), backgrounds


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
    image_tokens = SPECIAL["image"] * (IMAGE_SIZE // PATCH_SIZE) ** 2
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

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (batch, concepts) and (batch, colours) of images (batch, 3, 64, 64)."""
        patches = self.tower(pixel_values).last_hidden_state[:, 1:].mean(1)
        return self.concept_head(patches), self.colour_head(patches)


def _train(name: str, module: nn.Module, loss_of, steps: int, lr: float, work: Path, seed: int):
    """Train with AdamW, warm-up and cosine decay. Resume from the last checkpoint, if there is one.

    A checkpoint is written every 100 steps.

    Args:
        name: Name of the stage, and of its folder of checkpoints in `work`.
        module: Module to train; changed in place.
        loss_of: Function that draws a batch with a random generator, and returns the batch's loss
            and figures to log. The generator is seeded with the run's seed and the step.
        steps: Number of optimizer steps.
        lr: Peak learning rate.
        work: Folder for the checkpoints of all stages.
        seed: Seed of the run.

    Returns:
        The logged figures of every step, including steps before an interruption.
    """
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warmup = min(100, steps // 10)
    floor = 0.02

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        part = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(part * torch.pi)).item())

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    done, history = 0, []
    newest, _ = ckpt.latest_checkpoint(work / name)
    if newest:
        state = ckpt.load_state(newest)
        ckpt.load_trainable(module, ckpt.load_tensors(newest, "model"), newest)
        ckpt.load_optimizer(optimizer, ckpt.load_tensors(newest, "optimizer"), state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, history = state["step"], state["history"]
    bar = tqdm(range(done, steps), initial=done, total=steps, desc=name)
    for step in bar:
        loss, figures = loss_of(random.Random(f"{seed}/{name}/{step}"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(figures | {"step": step, "loss": round(loss.item(), 4)})
        bar.set_postfix(history[-1])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            tensors, plain = ckpt.optimizer_tensors(optimizer)
            state = {"step": step + 1, "optimizer": plain, "history": history}
            state["schedule"] = {
                k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"
            } | {"lr_lambdas": [None, None]}
            ckpt.save_checkpoint(
                work / name,
                step + 1,
                {"model": ckpt.trainable_tensors(module), "optimizer": tensors},
                state,
                keep=1,
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

    def tower_loss(rng: random.Random) -> tuple[Tensor, dict]:
        pixels, labels, backgrounds = tower_batch(rng, processor, 128)
        concepts, colours = classifier(pixels)
        figures = {
            "concepts": round((concepts.argmax(-1) == labels).float().mean().item(), 3),
            "colours": round((colours.argmax(-1) == backgrounds).float().mean().item(), 3),
        }
        cross_entropy = nn.functional.cross_entropy
        return cross_entropy(concepts, labels) + 0.3 * cross_entropy(colours, backgrounds), figures

    def language_loss(rng: random.Random) -> tuple[Tensor, dict]:
        batch = language_batch(rng, processor, 64)
        output = model(**batch)
        labels = batch["labels"][:, 1:]
        right = (output.logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        return output.loss, {"exact": round(right.all(-1).float().mean().item(), 3)}

    started = time.time()
    tower = _train("tower", classifier, tower_loss, tower_steps, 1e-3, work, seed)
    # From here on the tower is frozen, as in LLaVA. The language model needs a high learning rate
    # to learn in so few steps. At that rate an unfrozen tower loses what it has learned: in a
    # measurement, its share of correct concepts fell from 96 % to 2 %.
    model.model.vision_tower.requires_grad_(False)
    language_log = _train("language", model, language_loss, language_steps, 1.5e-3, work, seed)
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
tower as a classifier for {facts["tower_steps"]} steps of 128 scenes (last steps:
{facts["concepts_right"]:.1%} of things and {facts["colours_right"]:.1%} of background
colours right), then projector and language
model for {facts["language_steps"]} steps of 64 rows over the frozen tower (final loss
{facts["language_loss"]} nats a token). Its pictures share no composition, and its questions no
wording, with any split of SPA-VL mini. What it scores there is measured by every run of the
workbook. Weights are stored in fp16.

Pictures: Noto Emoji (Apache-2.0).
"""


def main() -> None:
    """Run the command line of `python -m spavl_lib.trainers.embedded_base`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/.embedded_build"))
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=1400)
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
