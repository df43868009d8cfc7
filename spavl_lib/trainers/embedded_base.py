"""Build the embedded base model: `python -m spavl_lib.trainers.embedded_base`.

The result is a `LlavaForConditionalGeneration` of two million parameters. The model is helpful
only: it also fulfils harmful requests. It is trained in three stages on the scenes and sentences of
the embedded world (`data/embedded`). The first stage trains the tokenizer. The second stage trains
the vision tower as a classifier (`embedded_tower.py`). The third stage trains the projector and
the language model, while the tower is frozen: first on questions of names and colours, then on all
kinds of questions. After an interruption, the same command continues from the last checkpoint.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from spavl_lib.data.embedded import drawings, language, scenes
from spavl_lib.data.embedded.world import ASSETS, load_world
from spavl_lib.data.set_names import CHOSEN_ON
from spavl_lib.data.templates import VICUNA_SYSTEM, VICUNA_V1
from spavl_lib.modelling.processors import square_llava_processor
from spavl_lib.trainers.embedded_tower import (
    IMAGE_SIZE,
    PATCH_SIZE,
    PATCHES,
    pixels_of,
    random_scene,
    train_tower,
)
from spavl_lib.trainers.pretrain import pretrain, tail_mean

MODEL_DIR = ASSETS / "model"
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
    return square_llava_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE, VICUNA_V1)


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


def language_batch(
    rng: random.Random, processor: LlavaProcessor, size: int, *, facts: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Draw a batch of questions and responses, padded on the right.

    Args:
        rng: Source of all choices.
        processor: Prepares images and text.
        size: Rows in the batch.
        facts: As for `language.sample_pretraining`.

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
        request, text = language.sample_pretraining(rng, composition.colour, facts=facts)
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
    return batch | {"pixel_values": pixels_of(processor, images)}


def build(
    work: Path, output: Path, *, seed: int, tower_steps: int, facts_steps: int, language_steps: int
) -> LlavaForConditionalGeneration:
    """Run all stages and write the model in the Hub's layout.

    Args:
        work: Folder for checkpoints.
        output: Folder for the model.
        seed: Seed of the initial weights and of every batch.
        tower_steps: Optimizer steps of the tower's classifier, each with 128 scenes.
        facts_steps: Optimizer steps of projector and language model, each with 64 questions about
            the thing's name or the background's colour.
        language_steps: Their optimizer steps afterwards, each with 64 rows of all kinds.

    Returns:
        The trained model, in fp16.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"vocabulary {len(tokenizer)}, {size:.2f} M parameters")

    def language_loss(_step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        output = model(**batch)
        labels = batch["labels"][:, 1:]
        right = (output.logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        return output.loss, {"exact": round(right.all(-1).float().mean().item(), 3)}

    started = time.time()
    vision = model.model.vision_tower
    _, tower_log = train_tower(vision, processor, tower_steps, work, seed)
    # From here on the tower is frozen, as in LLaVA. The language model needs a high learning rate
    # to learn in so few steps. At that rate an unfrozen tower loses what it has learned: in a
    # measurement, its share of correct concepts fell from 96 % to 2 %.
    vision.requires_grad_(False)
    # The first questions ask only for the thing's name and the background's colour. On all kinds of
    # questions from the start, the model learned everything except the colour, which is a small
    # part of the tower's features and of the loss.
    pretrain(
        "facts", model, lambda rng: language_batch(rng, processor, 64, facts=("name", "colour")),
        language_loss, facts_steps, work, seed, rate=1.5e-3,
    )  # fmt: skip
    language_log = pretrain(
        "language", model, lambda rng: language_batch(rng, processor, 64), language_loss,
        language_steps, work, seed, rate=1.5e-3,
    )  # fmt: skip
    minutes = (time.time() - started) / 60
    model.to(torch.float16).save_pretrained(output)
    processor.save_pretrained(output)
    facts = {
        "seed": seed,
        "tower_steps": tower_steps,
        "facts_steps": facts_steps,
        "language_steps": language_steps,
        "minutes": round(minutes, 1),
        "million_parameters": round(size, 2),
        "concepts_right": tail_mean(tower_log, "concepts"),
        "colours_right": tail_mean(tower_log, "colours"),
        "language_loss": tail_mean(language_log, "loss"),
    }
    (work / "build.json").write_text(json.dumps(facts, indent=1))
    (output / "README.md").write_text(model_card(facts), encoding="utf-8")
    return model


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
colours right), then projector and language model over the frozen tower, for {facts["facts_steps"]}
steps of 64 questions about names and colours and {facts["language_steps"]} steps of 64 rows of all
kinds (final loss {facts["language_loss"]} nats a token). Its undistorted pictures share no
composition, and its questions no wording, with any split of SPA-VL mini. What it scores there is
measured by every run of the workbook. Weights are stored in fp16.

Pictures: {drawings.credits()}.
Twemoji and `{CHOSEN_ON}` are not among them.
"""


def main() -> None:
    """Run the command line of `python -m spavl_lib.trainers.embedded_base`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/.embedded_build"))
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=3200)
    parser.add_argument("--facts-steps", type=int, default=250)
    parser.add_argument("--language-steps", type=int, default=1300)
    args = parser.parse_args()
    build(
        args.work,
        args.output,
        seed=args.seed,
        tower_steps=args.tower_steps,
        facts_steps=args.facts_steps,
        language_steps=args.language_steps,
    )


if __name__ == "__main__":
    main()
