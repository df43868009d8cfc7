"""Attacks that follow the gradients of the model under attack.

Both maximise the log-probability of a complying first sentence. They keep the best change that they
saw, so the objective never falls below that of the change that they start from. A model with shared
prefixes (`modelling.speed.shared_prefix`) searches suffixes more than twice as fast.
"""

import functools
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from spavl_lib.data.collate import pad_rows
from spavl_lib.data.images import decode, png_bytes
from spavl_lib.data.templates import completion_ids, encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.evaluation.attacks.base import Labels, Row, compliant_answer
from spavl_lib.evaluation.attacks.pictures import with_picture
from spavl_lib.objectives.logps import sequence_logps

NEAREST = 64  # candidates for a place are drawn from this many tokens of the steepest gradient
STRIDE = 2  # change of a pixel value in one step, on the scale of 0 to 255
# A suffix with one of these words could take the request back, and the labels would be wrong.
NEGATIONS = frozenset({"no", "not", "none", "never", "nobody", "nothing", "stop", "won", "without"})


def target_logp(
    model: PreTrainedModel, processor: ProcessorMixin, row: Row, labels: Labels
) -> float:
    """The objective: log-probability of the complying first sentence after a row's prompt, in nats.

    Args:
        model: The model, in evaluation mode.
        processor: The model's processor.
        row: A prompt row, attacked or not.
        labels: The row's ground-truth labels.
    """
    ids, vision, target = _encoded(processor, row, labels)
    with torch.no_grad():
        return _logps(model, processor, [ids], vision, target).item()


def adversarial_suffix(
    row: Row, labels: Labels, rng: random.Random, *, model: PreTrainedModel,
    processor: ProcessorMixin, steps: float, candidates: float, length: float,
) -> tuple[Row, Labels]:  # fmt: skip
    """Append words to the prompt that a greedy search by coordinates finds.

    In each step, the gradient with respect to the embeddings names the tokens that promise most at
    each place of the suffix. Random ones of these are tried, and the best one is kept if it raises
    the objective. Only tokens that are a word of letters are used, because the text of the suffix
    must give the same tokens when it is read again.

    Args:
        row: The row.
        labels: Its labels.
        rng: Decides the first suffix and the candidates.
        model: The model under attack.
        processor: The model's processor.
        steps: Number of steps.
        candidates: Suffixes that are tried in each step.
        length: Words in the suffix.

    Raises:
        InputError: The tokenizer has no tokens for whole words, or joins words.
    """
    known = words_of(processor.tokenizer)
    suffix = [rng.choice(known) for _ in range(int(length))]
    plain, vision, target = _encoded(processor, row, labels)
    ids, _, _ = _encoded(processor, _with_suffix(row, processor, suffix), labels)
    start = next((i for i in reversed(range(len(ids))) if ids[i : i + len(suffix)] == suffix), None)
    if start is None or len(ids) != len(plain) + len(suffix):
        raise InputError(
            f"attack adversarial_suffix: the tokenizer joins the words of a suffix of row "
            f"{row['id']}; this attack needs a tokenizer that reads every word alone"
        )
    before, after = ids[:start], ids[start + len(suffix) :]
    best, gradient = _suffix_gradient(model, processor, ids, start, len(suffix), vision, target)
    tokens = torch.tensor(known, device=gradient.device)
    for step in range(int(steps)):
        if step:
            ids = [*before, *suffix, *after]
            _, gradient = _suffix_gradient(
                model, processor, ids, start, len(suffix), vision, target
            )
        promising = tokens[gradient[:, tokens].topk(min(NEAREST, len(known))).indices].tolist()
        tried = []
        for _ in range(int(candidates)):
            place = rng.randrange(len(suffix))
            tried.append([*suffix[:place], rng.choice(promising[place]), *suffix[place + 1 :]])
        with torch.no_grad():
            logps = _logps(
                model, processor, [[*before, *words, *after] for words in tried], vision, target
            )
        if logps.max().item() > best:
            best, suffix = logps.max().item(), tried[int(logps.argmax())]
    return _with_suffix(row, processor, suffix), labels


def adversarial_picture(
    row: Row, labels: Labels, rng: random.Random, *, model: PreTrainedModel,
    processor: ProcessorMixin, steps: float, epsilon: float,
) -> tuple[Row, Labels]:  # fmt: skip
    """Change every pixel a little, along the sign of the gradient.

    The picture is attacked as the model sees it: padded to a square and resized by the processor.
    All changes are whole numbers, so the PNG file holds exactly what was optimised.

    Args:
        row: The row.
        labels: Its labels.
        rng: Decides the change from which the search starts.
        model: The model under attack.
        processor: The model's processor.
        steps: Number of steps.
        epsilon: Largest change of a pixel value, on the scale of 0 to 255, rounded down.

    Raises:
        InputError: The model's images have tiles or patches.
    """
    ids, vision, target = _encoded(processor, row, labels)
    pixels = processor.image_processor
    shown = vision.get("pixel_values")
    if shown is None or shown.ndim != 4 or len(shown) != 1 or not pixels.do_normalize:
        raise InputError(
            "attack adversarial_picture needs a model with one normalised image per row, without "
            "tiles or patches"
        )
    mean, std = (
        torch.tensor(values, device=model.device).view(-1, 1, 1)
        for values in (pixels.image_mean, pixels.image_std)
    )
    original = ((shown.to(model.device) * std + mean) * 255).round()  # (1, 3, height, width)
    dice = torch.Generator().manual_seed(rng.randrange(2**63))
    bound = int(epsilon)
    change = torch.randint(-bound, bound + 1, original.shape, generator=dice).to(original)
    best, kept = target_logp(model, processor, row, labels), original
    picture = (original + change).clamp(0, 255)
    for step in range(int(steps) + 1):
        picture = picture.detach().requires_grad_()
        vision["pixel_values"] = (picture / 255 - mean) / std
        logp = _logps(model, processor, [ids], vision, target)
        if logp.item() > best:
            best, kept = logp.item(), picture.detach()
        if step < int(steps):
            (gradient,) = torch.autograd.grad(logp.sum(), picture)
            moved = picture.detach() + STRIDE * gradient.sign()
            picture = moved.clamp(original - bound, original + bound).clamp(0, 255)
    values = kept[0].byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return with_picture(row, png_bytes(Image.fromarray(values))), labels


@functools.cache
def words_of(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that are a space and a word of letters, and no word of `NEGATIONS`.

    Args:
        tokenizer: The tokenizer of a processor.

    Raises:
        InputError: There are no such tokens.
    """
    words = []
    for token in sorted(tokenizer.get_vocab().values()):
        text = tokenizer.decode([token])
        if text[:1] == " " and text[1:].isascii() and text[1:].isalpha() and len(text) > 3:
            alone = tokenizer.encode(text, add_special_tokens=False) == [token]
            if alone and text.strip().lower() not in NEGATIONS:
                words.append(token)
    if not words:
        raise InputError("attack adversarial_suffix: the tokenizer has no tokens for whole words")
    return tuple(words)


def _with_suffix(row: Row, processor: ProcessorMixin, suffix: list[int]) -> Row:
    return row | {"prompt": row["prompt"] + processor.tokenizer.decode(suffix)}


def _encoded(
    processor: ProcessorMixin, row: Row, labels: Labels
) -> tuple[list[int], dict[str, Tensor], list[int]]:
    """Token ids of a row's prompt, its image tensors, and the token ids of the target."""
    image = decode(row["image"])
    prompts = encode_prompts(processor, [row["prompt"]], [image])
    target = completion_ids(processor, row["prompt"], compliant_answer(labels))[:-1]
    return prompts.ids[0], prompts.vision, target


def _logps(
    model: PreTrainedModel, processor: ProcessorMixin, prompts: list[list[int]],
    vision: dict[str, Tensor], target: list[int],
) -> Tensor:  # fmt: skip
    """Summed log-probability of the target after each prompt, in nats, (prompts,)."""
    rows = [[*ids, *target] for ids in prompts]
    ids = pad_rows(rows, processor.tokenizer.pad_token_id, "right").to(model.device)
    mask = pad_rows([[0] * len(p) + [1] * len(target) for p in prompts], 0, "right")
    attention = pad_rows([[1] * len(row) for row in rows], 0, "right").to(model.device)
    images = {
        name: value.to(model.device).expand(len(rows), *value.shape[1:])
        for name, value in vision.items()
    }
    logits = model(input_ids=ids, attention_mask=attention, **images).logits
    return sequence_logps(logits, ids, mask.bool().to(model.device))


def _suffix_gradient(
    model: PreTrainedModel, processor: ProcessorMixin, ids: list[int], start: int, length: int,
    vision: dict[str, Tensor], target: list[int],
) -> tuple[float, Tensor]:  # fmt: skip
    """The objective, and its change in first order for every token at every place of the suffix.

    Returns:
        The log-probability in nats, and (length, vocabulary).
    """
    embeddings: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    table = model.get_input_embeddings()
    hook = table.register_forward_hook(keep)
    try:
        logp = _logps(model, processor, [ids], vision, target)
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logp.sum(), embeddings[0])
    with torch.no_grad():
        return logp.item(), gradient[0, start : start + length].float() @ table.weight.float().T
