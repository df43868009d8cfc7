"""Rows in, tensors out: one way of writing a prompt, used in training and in generation.

Every sequence starts with one BOS (where the tokenizer has one), holds exactly one image slot per
image, and every completion ends in EOS, which is scored. trl's own collator leaves BOS and EOS to
the chat template, and the stock LLaVA-1.5 template has neither.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import ProcessorMixin

from spavl_lib.data.images import ImageError, decode
from spavl_lib.data.schema import TURN, batches, decoded
from spavl_lib.errors import InputError


def neutralise(text: str, processor: ProcessorMixin) -> str:
    """Text in which nothing reads as a control token: `<image>` becomes `< image>`."""
    for token in sorted(set(special_tokens(processor)), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def special_tokens(processor: ProcessorMixin) -> list[str]:
    """Control tokens longer than one character, the image token among them."""
    tokens = [*processor.tokenizer.all_special_tokens, getattr(processor, "image_token", "")]
    return [t for t in tokens if t and len(t) > 1]


def render(
    processor: ProcessorMixin, prompt: str, completion: str | None = None, *, image: bool = True
) -> str:
    """The conversation as the chat template writes it; up to the answer if none is given."""
    messages: list[dict] = []
    for number, turn in enumerate(prompt.split(TURN)):  # the picture goes with the first
        content: list[dict] = [{"type": "image"}] if image and not number else []
        content.append({"type": "text", "text": neutralise(turn, processor)})
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    if completion is not None:
        text = neutralise(completion, processor)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=completion is None
    )


def completion_ids(
    processor: ProcessorMixin, prompt: str, completion: str, *, image: bool = True
) -> list[int]:
    """Ids of an answer as it stands after its prompt, with one EOS at the end.

    Raises:
        InputError: The template does not write prompt and answer so that one begins the other.
    """
    tokenizer = processor.tokenizer
    before = render(processor, prompt, image=image).rstrip(" ")
    whole = render(processor, prompt, completion, image=image)
    if not whole.startswith(before):
        raise InputError("the chat template writes a prompt differently once it has an answer")
    head = tokenizer.encode(before, add_special_tokens=False)
    ids = tokenizer.encode(whole, add_special_tokens=False)
    if ids[: len(head)] != head:
        raise InputError(f"prompt and answer do not tokenise apart: ...{before[-20:]!r}")
    answer = ids[len(head) :]
    while answer and (
        answer[-1] == tokenizer.eos_token_id or not tokenizer.decode(answer[-1:]).strip()
    ):
        answer.pop()
    return [*answer, tokenizer.eos_token_id]


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as rows of ids without padding, and what the processor makes of the images.

    `token_types` marks, for families that want it (Qwen-VL), which ids stand for image patches.
    """

    ids: list[list[int]]
    token_types: list[list[int]] | None
    vision: dict[str, Tensor]


def encode_prompts(
    processor: ProcessorMixin, prompts: list[str], images: list[Any]
) -> EncodedPrompts:
    """Prompts with image tokens expanded and one BOS.

    Args:
        processor: Of the model.
        prompts: Questions.
        images: A decoded image a question, or None.
    """
    tokenizer = processor.tokenizer
    texts = [
        render(processor, p, image=i is not None).rstrip(" ")
        for p, i in zip(prompts, images, strict=True)
    ]
    present = [i for i in images if i is not None]
    encoded = processor(
        images=present or None, text=texts, add_special_tokens=False, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    mask = encoded.pop("attention_mask").bool()

    def rows(name: str) -> list[list[int]]:
        return [row[keep].tolist() for row, keep in zip(encoded.pop(name), mask, strict=True)]

    ids = rows("input_ids")
    types = rows("mm_token_type_ids") if "mm_token_type_ids" in encoded else None
    encoded.pop("token_type_ids", None)
    bos = tokenizer.bos_token_id
    for i, row in enumerate(ids):
        if bos is not None and row[:1] != [bos]:
            ids[i] = [bos, *row]
            if types is not None:
                types[i] = [0, *types[i]]
    return EncodedPrompts(ids, types, dict(encoded))


def prompt_ids(processor: ProcessorMixin, prompt: str, *, image: bool = True) -> list[int]:
    """Ids of a prompt with one BOS and a single image token, for an engine that expands it."""
    tokenizer = processor.tokenizer
    text = render(processor, prompt, image=image).rstrip(" ")
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def pad_rows(rows: list[list[int]], value: int, side: str) -> Tensor:
    """Stack rows of ids (batch, longest), padded on `side`."""
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        out[i, place] = torch.tensor(row)
    return out


def stack_vision(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Image tensors of several rows as of one batch; rows of fewer tiles are filled with zeros."""
    stacked = {}
    for name in parts[0] if parts else ():
        tensors = [part[name] for part in parts]
        if tensors[0].ndim > 2 and len({t.shape[1] for t in tensors}) > 1:
            tiles = max(t.shape[1] for t in tensors)
            tensors = [
                torch.cat([t, t.new_zeros(t.shape[0], tiles - t.shape[1], *t.shape[2:])], 1)
                for t in tensors
            ]
        stacked[name] = torch.cat(tensors)
    return stacked


def decode_images(rows: list[dict]) -> list[Any]:
    """The rows' images, None for a text-only row.

    Raises:
        InputError: Names each row whose image cannot be used.
    """
    images, problems = [], []
    for row in rows:
        try:
            images.append(None if row.get("image") is None else decode(row["image"]))
        except ImageError as error:
            problems.append(f"row {row.get('id')} ({row.get('image_name')}): {error}")
    if problems:
        raise InputError("; ".join(problems))
    return images


def image_slots(processor: ProcessorMixin, rows: Any) -> int:
    """Tokens an image adds to a row's text, read off the first picture; 0 without any.

    Where their number varies by picture the collator still refuses a row that is too long, only
    later.
    """
    row = next((r for r in rows if r["image"] is not None), None)
    if row is None:
        return 0
    [ids] = encode_prompts(processor, [row["prompt"]], decode_images([row])).ids
    text = render(processor, row["prompt"]).rstrip(" ")
    return len(ids) - len(processor.tokenizer.encode(text, add_special_tokens=False))


def pair_lengths(
    processor: ProcessorMixin, rows: Any, skip_below: int = 0
) -> Iterator[tuple[str, int, int]]:
    """How long each row's two sequences are, in tokens with prompt, image and EOS.

    Image tokens are counted on the first picture; where their number varies by picture the rest
    are estimates.

    Args:
        processor: Of the model.
        rows: Preference rows.
        skip_below: Rows that cannot be longer than this, as no token is shorter than a byte, are
            left out unencoded.

    Yields:
        Row id, tokens of prompt and chosen, tokens of prompt and rejected.
    """
    tokenizer = processor.tokenizer
    extra = image_slots(processor, rows)
    frame = len(render(processor, "", "")) + extra + 16
    for table in batches(rows.select_columns(["id", "prompt", "chosen", "rejected", "image"])):
        pictured = pc.is_valid(table.column("image")).to_pylist()
        texts, named = [], []
        for (row, _), image in zip(decoded(table.drop_columns(["image"])), pictured, strict=True):
            pair = [str(row[n] or "") for n in ("prompt", "chosen", "rejected")]
            longest = len(pair[0]) + max(len(pair[1]), len(pair[2])) + frame
            if longest <= skip_below and all(map(str.isascii, pair)) and TURN not in pair[0]:
                continue
            named.append((row["id"], image))
            texts += [render(processor, pair[0], answer, image=image) for answer in pair[1:]]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        sizes = [  # the collator adds the EOS that a template leaves out
            len(ids) + (tokenizer.eos_token_id not in ids[-2:]) for ids in encoded
        ]
        for (name, image), chosen, rejected in zip(named, sizes[::2], sizes[1::2], strict=True):
            yield name, chosen + extra * image, rejected + extra * image


def check_lengths(processor: ProcessorMixin, rows: Any, longest: int) -> None:
    """Find rows too long for the model before anything trains on them.

    Where the number of image tokens varies by picture the collator still refuses a row, only later.

    Args:
        processor: Of the model.
        rows: Preference rows.
        longest: Tokens a sequence may have, image tokens counted; 0 for no limit.

    Raises:
        InputError: Lists every row that is longer.
    """
    if not longest:
        return
    too_long = [
        f"{name} {side}: {size} tokens"
        for name, *sizes in pair_lengths(processor, rows, skip_below=longest)
        for side, size in zip(("chosen", "rejected"), sizes, strict=True)
        if size > longest
    ]
    if too_long:
        raise InputError(
            f"{len(too_long)} answers are longer than {longest} tokens with prompt and image "
            f"(raise dpo.max_length, or drop them): {_some(too_long)}"
        )


def check_prompt_lengths(
    processor: ProcessorMixin, rows: Any, max_new_tokens: int, longest: int, *, stage: str
) -> None:
    """Find prompts that leave no room for an answer.

    Args:
        processor: Of the model.
        rows: Prompt or preference rows.
        max_new_tokens: Room an answer may take.
        longest: Tokens a sequence may have, image tokens counted; 0 for no limit.
        stage: Whose setting the error names.

    Raises:
        InputError: Lists every such row.
    """
    if not longest:
        return
    extra, too_long = image_slots(processor, rows), []
    for table in batches(rows.select_columns(["id", "prompt", "image"])):
        pictured = pc.is_valid(table.column("image")).to_pylist()
        named = [row for row, _ in decoded(table.drop_columns(["image"]))]
        texts = [
            render(processor, row["prompt"], image=image).rstrip(" ")
            for row, image in zip(named, pictured, strict=True)
        ]
        encoded = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, ids, image in zip(named, encoded, pictured, strict=True):
            size = len(ids) + extra * image
            if size + max_new_tokens > longest:
                too_long.append(f"{row['id']}: {size} tokens")
    if too_long:
        raise InputError(
            f"{len(too_long)} prompts leave no room for {max_new_tokens} new tokens in a context "
            f"of {longest} (lower {stage}.max_new_tokens, or drop them): {_some(too_long)}"
        )


def _some(lines: list[str]) -> str:
    return "; ".join(lines[:20]) + ("; ..." if len(lines) > 20 else "")


@dataclass
class PreferenceCollator:
    """Pairs as trl's vision collator lays them out: chosen rows first, then rejected.

    Gives `input_ids`, `attention_mask` and `completion_mask` of shape (2 * batch, length), where
    completion_mask is 1 on answer and EOS, and image tensors of 2 * batch images.
    """

    processor: ProcessorMixin
    max_length: int = 0
    padding_side: str = "right"

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Collate.

        Raises:
            InputError: A row is longer than `max_length`, or its image cannot be used.
        """
        images = decode_images(rows)
        prompts = encode_prompts(self.processor, [r["prompt"] for r in rows], images)
        sequences, masks, too_long = [], [], []
        for side in ("chosen", "rejected"):
            for row, head, image in zip(rows, prompts.ids, images, strict=True):
                tail = completion_ids(
                    self.processor, row["prompt"], row[side], image=image is not None
                )
                sequences.append(head + tail)
                masks.append([0] * len(head) + [1] * len(tail))
                if self.max_length and len(sequences[-1]) > self.max_length:
                    too_long.append(f"{row.get('id')} {side}: {len(sequences[-1])} tokens")
        if too_long:
            raise InputError(
                f"rows longer than {self.max_length} tokens, image included "
                f"(set dpo.max_length or drop them): {'; '.join(too_long)}"
            )
        pad = self.processor.tokenizer.pad_token_id
        attention = [[1] * len(s) for s in sequences]
        batch = {
            "input_ids": pad_rows(sequences, pad, self.padding_side),
            "attention_mask": pad_rows(attention, 0, self.padding_side),
            "completion_mask": pad_rows(masks, 0, self.padding_side),
        }
        if prompts.token_types is not None:  # answers are text
            doubled = [*prompts.token_types, *prompts.token_types]
            types = [t + [0] * (len(s) - len(t)) for t, s in zip(doubled, sequences, strict=True)]
            batch["mm_token_type_ids"] = pad_rows(types, 0, self.padding_side)
        return batch | {
            k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in prompts.vision.items()
        }


@dataclass
class PromptCollator:
    """Left-padded prompts for generation."""

    processor: ProcessorMixin

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (batch, length), and the image tensors."""
        images = decode_images(rows)
        prompts = encode_prompts(self.processor, [r["prompt"] for r in rows], images)
        batch = {
            "input_ids": pad_rows(prompts.ids, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": pad_rows([[1] * len(p) for p in prompts.ids], 0, "left"),
        }
        if prompts.token_types is not None:
            batch["mm_token_type_ids"] = pad_rows(prompts.token_types, 0, "left")
        return batch | prompts.vision
