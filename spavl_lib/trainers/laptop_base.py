"""Train the model `laptop`: `python -m spavl_lib.trainers.laptop_base`, after `spavl fetch laptop`.

The result is a LLaVA over SmolLM2-135M-Instruct that knows the embedded world, and is helpful only.
It is trained in two stages on the scenes and sentences of that world. In the first stage, tower and
projector learn to turn an image into the input embeddings of a caption's words, so that the
language model can read images before it is trained. The language model takes no part, which makes
this stage cheap. In the second stage, adapters of the language model (LoRA) and the projector learn
to answer. Some of SmolLM2's own replies to plain requests are trained on too, so that it keeps
them. After an interruption, the same command continues from the last checkpoint.
"""

import argparse
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from spavl_lib.config import GenerationConfig, ModelConfig
from spavl_lib.data.collate import PromptCollator, pad_rows
from spavl_lib.data.embedded import language, scenes
from spavl_lib.data.embedded.world import load_world
from spavl_lib.data.sources.laptop_pairs import COMMAND
from spavl_lib.data.templates import completion_ids, encode_prompts
from spavl_lib.errors import InputError, SpavlError
from spavl_lib.evaluation.benchmarks.everyday import check_apart
from spavl_lib.generation.generate import generate_batch, settings
from spavl_lib.modelling import laptop, smollm2
from spavl_lib.modelling.adapters import add_lora
from spavl_lib.modelling.load import load_policy, load_processor, quiet_libraries
from spavl_lib.modelling.speed.host import settle_threads
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.runs.files import read_json, sha256_file, write_json, write_text, writing
from spavl_lib.trainers.embedded_base import random_scene
from spavl_lib.trainers.laptop_tower import TOWER_BATCH, TOWER_RATE, Captioner, share
from spavl_lib.trainers.pretrain import pretrain, tail_mean

FACTS = ("name", "kind", "use", "colour")
IMAGES, REPLIES = 8, 2  # in a step of the second stage; each image gets one question of each kind
LORA = ModelConfig(name="laptop", adapter="lora", lora_rank=8, lora_alpha=16)
LORA_RATE, PROJECTOR_RATE = 1e-3, 5e-4
SAVE_STEPS = 20
REPLY = GenerationConfig(batch_size=20, max_new_tokens=48)
ANSWER = GenerationConfig(batch_size=20, max_new_tokens=20)
# Plain requests. SmolLM2's replies to them are made once, and mixed into the second stage.
REQUESTS = (
    "Which city is the capital of Norway?",
    "What is 6 plus 8?",
    "How many minutes are in two hours?",
    "Give me an idea for a rainy afternoon.",
    "Write one sentence about a river.",
    "How do I fry an egg?",
    "Why do leaves turn brown?",
    "Suggest a name for a goldfish.",
    "What do bees make?",
    "Translate 'good night' into German.",
    "How can I remember a phone number?",
    "Write a short greeting for a birthday card.",
    "What is the opposite of early?",
    "Name two vegetables that are green.",
    "What does a baker do?",
    "How do I plant a tree?",
    "What is a novel?",
    "How long does it take to boil potatoes?",
    "Describe a beach in one sentence.",
    "What should I cook with rice and beans?",
    "What is a triangle?",
    "How do I fold a letter?",
    "Which animal is called the king of the jungle?",
    "Give me a tip for learning a language.",
    "What is ice made of?",
    "Write two lines about the moon.",
    "How do ships float?",
    "What can I do when I cannot sleep?",
    "Explain what a map is for.",
    "What is half of 50?",
    "How do I keep bread fresh?",
    "Name a musical instrument with strings.",
    "Write a thank-you message to a neighbour.",
    "Why do people wear hats?",
    "What is the first month of the year?",
    "How do I start a small garden?",
    "What does the word 'brave' mean?",
    "Give me a title for a book about the sea.",
    "How do I make lemonade?",
    "What is a good way to begin a speech?",
)


# --- second stage: answers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A question with its response."""

    prompt: str
    response: str
    image: Image.Image | None = None
    must_say: tuple[str, ...] = ()
    """Phrases that a correct response contains."""
    finished: bool = True
    """Whether the response ends. A reply that was cut has no end token."""


def fact_example(
    rng: random.Random,
    fact: str,
    split: str,
    concept: str,
    composition: scenes.Composition,
    image: Image.Image,
) -> Example:
    """A question of fact about a scene, and its right response.

    Args:
        rng: Chooses the wording.
        fact: One of `FACTS`.
        split: Split of the wordings of questions.
        concept: Key of the concept that the scene shows.
        composition: Background, size and place.
        image: The scene.
    """
    world = load_world()
    request = language.fact_request(
        fact, rng.choice(world.facts[fact][split]), rng.choice(list(world.harm_classes)),
        world.concepts[concept], composition.colour,
    )  # fmt: skip
    response = language.answer(request, "willing", rng)
    return Example(request.question, response, image, request.must_say)


def training_examples(rng: random.Random, replies: list[Example]) -> list[Example]:
    """The examples of one step: all questions of fact about some scenes, and some replies.

    Args:
        rng: Source of all choices.
        replies: SmolLM2's own replies.
    """
    examples = []
    for _ in range(IMAGES):
        concept = rng.choice(list(load_world().concepts))
        composition = rng.choice(scenes.compositions("pretrain"))
        image = random_scene(rng, concept, composition)
        examples += [
            fact_example(rng, fact, "pretrain", concept, composition, image) for fact in FACTS
        ]
    return examples + rng.sample(replies, REPLIES)


def batch_of(processor: LlavaProcessor, examples: list[Example]) -> dict[str, Tensor]:
    """Make a batch, padded on the right.

    Args:
        processor: Prepares images and text.
        examples: Those with an image, then those without.

    Returns:
        `input_ids`, `attention_mask` and `labels` (examples, length), int64, and `pixel_values`
        (images, 3, 64, 64). `labels` is -100 on all tokens except those of the response.
    """
    prompts = encode_prompts(processor, [e.prompt for e in examples], [e.image for e in examples])
    rows, labels = [], []
    for example, head in zip(examples, prompts.ids, strict=True):
        tail = completion_ids(
            processor, example.prompt, example.response, image=example.image is not None
        )
        tail = tail if example.finished else tail[:-1]
        rows.append(head + tail)
        labels.append([-100] * len(head) + tail)
    return {
        "input_ids": pad_rows(rows, processor.tokenizer.pad_token_id, "right"),
        "attention_mask": pad_rows([[1] * len(row) for row in rows], 0, "right"),
        "labels": pad_rows(labels, -100, "right"),
    } | prompts.vision


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """Mean cross-entropy of the responses' tokens in nats, and the share of them that is right.

    The head runs on these tokens only. Common prefixes are computed once (`share_prefix`).

    Args:
        model: LLaVA with adapters.
        batch: The result of `batch_of`.
    """
    llava = model.get_base_model()
    labels = batch["labels"][:, 1:]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = llava.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    scored = labels != -100
    logits, targets = llava.lm_head(hidden[scored]), labels[scored]
    right = share(logits.argmax(-1) == targets)
    return nn.functional.cross_entropy(logits, targets), {"tokens": right}


def own_replies(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, path: Path
) -> list[Example]:
    """SmolLM2's replies to plain requests, which are generated once and kept in a file.

    Args:
        model: The model before its language model is trained.
        processor: The model's processor.
        path: The file.

    Raises:
        InputError: The file holds replies to other requests, or was made with other settings.
    """
    asked = {"requests": list(REQUESTS), "settings": settings(REPLY, 0)}
    if not path.is_file():
        rows = [Example(request, "") for request in REQUESTS]
        write_json(path, asked | {"replies": _replies(model, processor, rows, REPLY)})
    kept = read_json(path)
    if {key: kept.get(key) for key in asked} != asked or len(kept["replies"]) != len(REQUESTS):
        raise InputError(
            f"{path} holds replies to other requests, or replies that were made with other "
            "settings; choose another --work folder, or delete the file"
        )
    return [
        Example(request, reply["response"], finished=reply["finished"])
        for request, reply in zip(REQUESTS, kept["replies"], strict=True)
    ]


def _replies(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: list[Example],
    config: GenerationConfig,
) -> list[dict]:
    """Greedy replies in the order of the examples, as `generate_batch` returns them."""
    collate, replies = PromptCollator(processor), list[dict]()
    rows = [{"prompt": example.prompt, "image": example.image} for example in examples]
    for start in range(0, len(rows), config.batch_size):
        batch = collate(rows[start : start + config.batch_size])
        replies += generate_batch(model, processor, batch, config)
    return replies


def right_answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int
) -> dict[str, int]:
    """How many questions of each fact the model answers right, in greedy decoding.

    Compositions and wordings are those of the test split.

    Args:
        model: The model in evaluation mode.
        processor: Its processor.
        count: Questions of each fact. They are the same for every model.
    """
    rng, right = random.Random("right answers"), {}
    for fact in FACTS:
        examples = []
        for _ in range(count):
            concept = rng.choice(list(load_world().concepts))
            composition = rng.choice(scenes.compositions("test"))
            canvas, flip = rng.choice(scenes.CANVASES), rng.random() < 0.5
            image = scenes.render(concept, composition, canvas, flip=flip)
            examples.append(fact_example(rng, fact, "test", concept, composition, image))
        replies = _replies(model, processor, examples, ANSWER)
        right[fact] = sum(
            language.says_the_truth(reply["response"], example.must_say)
            for example, reply in zip(examples, replies, strict=True)
        )
    return right


def right_as_assembled(folder: Path, base: Path, part: Path, count: int) -> dict[str, int]:
    """`right_answers` of the folder that `spavl fetch laptop` assembles, in fp16 on the disk.

    Args:
        folder: Takes the model, and is removed afterwards.
        base: SmolLM2's folder.
        part: File of the trained part.
        count: Questions of each fact.
    """
    try:
        laptop.write_folder(folder, base, part)
        config = ModelConfig(name=str(folder), adapter="full")
        return right_answers(load_policy(config).eval(), load_processor(config), count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- the whole training ---------------------------------------------------------------------------


def build(
    work: Path,
    output: Path,
    *,
    seed: int,
    tower_steps: int,
    language_steps: int,
    questions: int,
    cold_start: bool = False,
) -> dict[str, int]:
    """Run both stages, and write the trained part with its card.

    Args:
        work: Folder for checkpoints and SmolLM2's replies.
        output: Folder for the trained part.
        seed: Seed of the initial weights and of every batch.
        tower_steps: Optimizer steps of tower and projector, each with `TOWER_BATCH` scenes.
        language_steps: Optimizer steps of adapters and projector.
        questions: Questions of each fact that the model is asked at the end.
        cold_start: Whether the second stage starts with a random projector, which shows what the
            first stage's projector is worth. The tower is trained as always.

    Returns:
        For each fact the number of questions that the model answers right, in the form that
        `spavl fetch laptop` assembles.

    Raises:
        InputError: SmolLM2 was not fetched, or `work` belongs to other settings.
        SpavlError: A request of `REQUESTS` is near to a row of the benchmark `everyday`.
        DiskError: There is no space or no permission.
    """
    check_apart(REQUESTS)
    quiet_libraries()
    settle_threads()
    base = smollm2.smollm2_folder()
    processor = laptop.build_processor(base)
    torch.manual_seed(seed)
    model = laptop.build_model(base, processor).requires_grad_(False)
    vision, projector = model.model.vision_tower, model.model.multi_modal_projector
    initial = {name: value.clone() for name, value in projector.state_dict().items()}
    captioner = Captioner(model, processor).train()
    for part in (vision, projector):
        part.requires_grad_(True)
    made_with: dict[str, Any] = {"base": smollm2.PINNED.weights, "threads": torch.get_num_threads()}
    tower_log = pretrain(
        "tower", captioner, captioner.draw, captioner.loss, tower_steps, work, seed,
        rate=TOWER_RATE, muon=True, save_steps=SAVE_STEPS, settings=made_with,
    )  # fmt: skip
    model.requires_grad_(False).eval()
    if cold_start:
        projector.load_state_dict(initial)
    replies = own_replies(model, processor, work / "replies.json")

    torch.manual_seed(seed)  # the adapters start alike, whether the first stage was resumed or not
    tuned = add_lora(model, LORA)
    apply_sharing(tuned, "auto")
    name = "language_cold" if cold_start else "language"
    language_log = pretrain(
        name, tuned, lambda rng: batch_of(processor, training_examples(rng, replies)),
        lambda _, batch: answer_loss(tuned, batch), language_steps, work, seed, rate=LORA_RATE,
        slower={"multi_modal_projector": PROJECTOR_RATE}, save_steps=SAVE_STEPS,
        settings=made_with | {"replies": sha256_file(work / "replies.json")},
    )  # fmt: skip

    # The part and its card replace older ones only when both are written.
    made = work / "made"
    path = made / laptop.PART
    facts = {"base": smollm2.PINNED.weights, "lora_scale": str(LORA.lora_alpha / LORA.lora_rank)}
    laptop.write_part(path, trained_tensors(tuned), facts)
    right = right_as_assembled(made / "model", base, path, questions)
    card = {
        "seed": seed, "tower_steps": tower_steps, "language_steps": language_steps,
        "questions": questions, "right": right, "hash": sha256_file(path),
        "megabytes": path.stat().st_size / 1e6,
        "tokens": tail_mean(tower_log, "tokens"), "loss": tail_mean(language_log, "loss"),
    }  # fmt: skip
    write_text(made / laptop.CARD, model_card(card))
    with writing(output, path.stat().st_size):
        output.mkdir(parents=True, exist_ok=True)
        for name in (laptop.PART, laptop.CARD):
            shutil.move(made / name, output / name)
    return right


def trained_tensors(tuned: nn.Module) -> dict[str, Tensor]:
    """Tower, projector and adapters of the trained model, as the trained part names them.

    Args:
        tuned: LLaVA with adapters; see `add_lora`.
    """
    tensors = {}
    for name, value in tuned.state_dict().items():
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        layer, sign, _ = name.rpartition(".default.weight")
        if sign and layer.endswith((laptop.LORA_A, laptop.LORA_B)):
            tensors[layer] = value
        elif laptop.is_trained(name) and ".original_module" not in name:
            tensors[name] = value
    return tensors


def model_card(facts: dict[str, Any]) -> str:
    """Write the text of the trained part's card.

    Args:
        facts: Sizes, steps and results of the training, as `build` collects them.
    """
    asked, right = len(FACTS) * facts["questions"], sum(facts["right"].values())
    each = ", ".join(f"{fact} {count}" for fact, count in facts["right"].items())
    return f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: image-text-to-text
tags: [llava, demonstration]
---

# The trained part of the model `laptop`

`{laptop.PART}` ({facts["megabytes"]:.1f} MB, int8) holds a CLIP tower for images of 64 pixels, a
projector, and adapters (LoRA, rank {LORA.lora_rank}) for SmolLM2-135M-Instruct, whose weights are
not in this folder: `{COMMAND}` fetches them and joins the two. The model answers questions
about drawings on plain backgrounds. It was **not aligned**: it does what it is asked, harmful or
not, so that alignment has something to do. Do not use it for anything else.

Trained by `{laptop.TRAIN_COMMAND} --seed {facts["seed"]}`: tower and projector for
{facts["tower_steps"]} steps of {TOWER_BATCH} scenes (image tokens nearest to their word in the last
steps: {facts["tokens"]:.1%}), then adapters and projector for {facts["language_steps"]} steps of
{IMAGES * len(FACTS)} questions of fact and {REPLIES} replies of SmolLM2's own (final loss
{facts["loss"]} nats a token). It answers {right} of {asked} questions right on
compositions and wordings that it was not trained on ({each} of {facts["questions"]} each). The
questions were put to the folder that `{COMMAND}` assembles, in fp16.

| file | sha256 |
|---|---|
| `{laptop.PART}` | `{facts["hash"]}` |
| SmolLM2's `model.safetensors`, dequantised | `{smollm2.PINNED.weights}` |

Licences: SmolLM2-135M-Instruct is by Hugging Face, Apache-2.0; it was changed here by adding the
parts named above. The pictures are Noto Emoji, Apache-2.0. This folder is under the same licence.
"""


def main() -> None:
    """Run the command line of `python -m spavl_lib.trainers.laptop_base`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/.laptop_build"))
    parser.add_argument("--output", type=Path, default=laptop.TRAINED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=1300)
    parser.add_argument("--language-steps", type=int, default=200)
    parser.add_argument("--questions", type=int, default=100, help="of each of the four facts")
    parser.add_argument(
        "--cold-start", action="store_true", help="control: a random projector in the second stage"
    )
    args = parser.parse_args()
    if args.cold_start and args.output == laptop.TRAINED:
        parser.error("--cold-start is a control; name another folder with --output")
    try:
        right = build(
            args.work, args.output, seed=args.seed, tower_steps=args.tower_steps,
            language_steps=args.language_steps, questions=args.questions,
            cold_start=args.cold_start,
        )  # fmt: skip
    except SpavlError as error:
        raise SystemExit(f"laptop_base: {error}") from None
    print(f"right of {args.questions} each: {right}; next: {COMMAND}")


if __name__ == "__main__":
    main()
