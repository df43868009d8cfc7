"""Prompts and responses as text and token ids, in the same form for training and generation.

Every sequence starts with one BOS (if the tokenizer has one) and holds one image slot per image.
Every response ends with one EOS, which counts in the completion mask. The chat template decides
everything else. (trl's collator also leaves BOS and EOS to the template, but the stock LLaVA-1.5
template writes neither.)
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from spavl_lib.data.schema import TURN
from spavl_lib.errors import InputError


def special_tokens(processor: ProcessorMixin) -> list[str]:
    """Control tokens of more than one character, including the image token."""
    tokens = [*processor.tokenizer.all_special_tokens, getattr(processor, "image_token", "")]
    return [t for t in tokens if t and len(t) > 1]


def neutralise(text: str, processor: ProcessorMixin) -> str:
    """The text with a space inserted into every control token: `<image>` becomes `< image>`."""
    for token in sorted(set(special_tokens(processor)), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def render(
    processor: ProcessorMixin, prompt: str, completion: str | None = None, *, image: bool = True
) -> str:
    """The conversation as the chat template writes it.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns separated by `TURN`.
        completion: The response. None ends the text at the beginning of the response.
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
    """Token ids of a response after its prompt, with one EOS at the end.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns separated by `TURN`.
        completion: The response.
        image: Whether the prompt has an image.

    Raises:
        InputError: The prompt is written or tokenised differently if a response follows.
    """
    tokenizer = processor.tokenizer
    before = render(processor, prompt, image=image).rstrip(" ")
    whole = render(processor, prompt, completion, image=image)
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
    """For each id whether it stands for an image patch, as Qwen-VL needs; None for other models."""
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
    """Token ids of a prompt with one BOS and one image token, which vLLM expands.

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
