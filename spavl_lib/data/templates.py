"""Prompts and answers as text and token ids, written in one way for training and generation.

Every sequence starts with one BOS (if the tokenizer has one) and holds one image slot per image.
Every answer ends with one EOS, which is scored. The chat template decides everything else; trl's
own collator leaves BOS and EOS to the template too, and the stock LLaVA-1.5 template has neither.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from spavl_lib.data.images import for_square
from spavl_lib.data.schema import TURN
from spavl_lib.errors import InputError


def special_tokens(processor: ProcessorMixin) -> list[str]:
    """Control tokens of more than one character, with the image token."""
    tokens = [*processor.tokenizer.all_special_tokens, getattr(processor, "image_token", "")]
    return [t for t in tokens if t and len(t) > 1]


def neutralise(text: str, processor: ProcessorMixin) -> str:
    """Text in which nothing reads as a control token: `<image>` becomes `< image>`."""
    for token in sorted(set(special_tokens(processor)), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def render(
    processor: ProcessorMixin, prompt: str, completion: str | None = None, *, image: bool = True
) -> str:
    """The conversation as the chat template writes it.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns with `TURN` between.
        completion: The answer; None to end the text where the answer starts.
        image: Whether the first turn has an image.
    """
    messages: list[dict] = []
    for number, turn in enumerate(prompt.split(TURN)):
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
    """Token ids of an answer as it follows its prompt, with one EOS at the end.

    White space around the answer is left out: the template writes what stands before one, and some
    tokenizers would join a line break there with the prompt's last token.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns with `TURN` between.
        completion: The answer.
        image: Whether the prompt has an image.

    Raises:
        InputError: The prompt is written or tokenised differently once an answer follows.
    """
    tokenizer = processor.tokenizer
    before = render(processor, prompt, image=image).rstrip(" ")
    whole = render(processor, prompt, completion.lstrip(), image=image)
    if not whole.startswith(before):
        raise InputError("the chat template writes a prompt differently once an answer follows it")
    head = tokenizer.encode(before, add_special_tokens=False)
    ids = tokenizer.encode(whole, add_special_tokens=False)
    if ids[: len(head)] != head:
        raise InputError(
            f"the tokenizer joins the end of the prompt with the answer: ...{before[-20:]!r}"
        )
    answer = ids[len(head) :]
    while answer and (
        answer[-1] == tokenizer.eos_token_id or not tokenizer.decode(answer[-1:]).strip()
    ):
        answer.pop()
    return [*answer, tokenizer.eos_token_id]


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as token ids without padding, and the image tensors."""

    ids: list[list[int]]
    """Token ids of each prompt, with image tokens expanded."""
    token_types: list[list[int]] | None
    """For families that use it (Qwen-VL): which ids stand for image patches."""
    vision: dict[str, Tensor]
    """The image tensors that the processor gives, such as `pixel_values`."""


def encode_prompts(
    processor: ProcessorMixin, prompts: list[str], images: list[Any]
) -> EncodedPrompts:
    """Prompts with one BOS and with image tokens expanded.

    Args:
        processor: The model's processor.
        prompts: The questions.
        images: For each question a decoded image, or None.
    """
    tokenizer = processor.tokenizer
    texts = [
        render(processor, p, image=i is not None).rstrip(" ")
        for p, i in zip(prompts, images, strict=True)
    ]
    present = [i for i in images if i is not None]
    pixels = getattr(processor, "image_processor", None)
    if getattr(pixels, "do_pad", False) and hasattr(pixels, "pad_to_square"):
        present = [for_square(i) for i in present]
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
    """Token ids of a prompt with one BOS and one image token, for an engine that expands it.

    Args:
        processor: The model's processor.
        prompt: The question.
        image: Whether the prompt has an image.
    """
    tokenizer = processor.tokenizer
    text = render(processor, prompt, image=image).rstrip(" ")
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
