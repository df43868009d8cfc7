"""Prompts and responses as text and token ids, in the same form for training and generation.

Every sequence starts with one BOS (if the tokenizer has one) and holds one image slot per image.
Every response ends with one end token, which is scored like the other tokens of the response. The
end token is the token that the chat template writes after a response, or else the tokenizer's EOS.
The chat template decides everything else. (trl's own collator leaves BOS and EOS to the template
too, but some templates write neither.)
"""

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from spavl_lib.data.images import for_square
from spavl_lib.data.schema import TURN, image_cells
from spavl_lib.errors import InputError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def content_with_images(image: str) -> str:
    """Template code that writes a user message: images first, each with a line break, then texts.

    Args:
        image: The token that stands for an image.
    """
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '"
        + image
        + "\n' }}"
        "{% endif %}{% endfor %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}"
    )


# `vicuna_v1` of LLaVA's code, with which LLaVA-1.5 and the embedded base model were trained.
VICUNA_V1 = (
    "{{ bos_token }}" + VICUNA_SYSTEM + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ 'USER: ' }}" + content_with_images("<image>") + "{% else %}"
    "{{ ' ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


# --- control tokens -------------------------------------------------------------------------------


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor. A tokenizer is returned unchanged."""
    return getattr(processor, "tokenizer", processor)


def special_tokens(processor: Any) -> list[str]:
    """Control tokens of more than one character, longest first.

    Most tokenizers name only a few of their control tokens (BOS, EOS, padding). The others are
    special tokens that were added to the vocabulary, such as Llama 3's `<|eot_id|>`, and
    placeholders that a processor expands, such as `<image>` and `<video>`.

    Args:
        processor: A processor, or a tokenizer alone.
    """
    tokenizer = tokenizer_of(processor)
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    slots = [v for k, v in vars(processor).items() if k.endswith("_token") and isinstance(v, str)]
    tokens = {*tokenizer.all_special_tokens, *added, *slots}
    return sorted((t for t in tokens if len(t) > 1), key=lambda t: (-len(t), t))


def control_ids(processor: Any) -> frozenset[int]:
    """Ids of the control tokens. A text that was passed through `neutralise` contains none."""
    tokenizer = tokenizer_of(processor)
    ids = tokenizer.convert_tokens_to_ids(special_tokens(processor))
    named = [*ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return frozenset(i for i in named if i is not None) - {tokenizer.unk_token_id}


def end_ids(processor: ProcessorMixin, model: Any = None) -> tuple[int, ...]:
    """Ids that end a response. The first id ends the responses in training.

    Args:
        processor: The model's processor. Its chat template may end responses with another token
            than the tokenizer's EOS, such as Gemma's `<end_of_turn>`.
        model: The model, whose generation config may name more ids; None adds no ids.
    """
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    more = named if isinstance(named, list | tuple) else [named]
    trained = completion_ids(processor, "a", "a", image=False)[-1]
    ids = (trained, processor.tokenizer.eos_token_id, *more)
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def until_end(ids: list[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """Generated ids up to the first end token, which is left out, and whether there is one.

    Args:
        ids: Ids of a row, padded or not.
        ends: Ids that end a response.
    """
    place = next((n for n, token in enumerate(ids) if token in ends), None)
    return (ids, False) if place is None else (ids[:place], True)


def neutralise(text: str, processor: Any) -> str:
    """Text in which nothing reads as a control token: `<image>` becomes `< image>`.

    Args:
        text: What somebody wrote.
        processor: The processor of the model that reads it, or its tokenizer.
    """
    for token in _control_tokens(processor):
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _control_tokens(processor: Any) -> list[str]:
    """`special_tokens`, cached until the vocabulary changes. A tokenizer may have hundreds."""
    size, tokens = _KNOWN.get(processor, (None, []))
    if size != len(tokenizer_of(processor)):
        tokens = special_tokens(processor)
        _KNOWN[processor] = (len(tokenizer_of(processor)), tokens)
    return tokens


# --- prompts and responses ------------------------------------------------------------------------


def render(
    processor: ProcessorMixin, prompt: str, completion: str | None = None, *, image: int = True
) -> str:
    """The conversation as the chat template writes it.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns separated by `TURN`.
        completion: The response. None ends the text at the beginning of the response.
        image: Number of images, which all stand before the text of the first turn; True is one.
    """
    messages: list[dict] = []
    for number, turn in enumerate(prompt.split(TURN)):
        content: list[dict] = [{"type": "image"} for _ in range(0 if number else image)]
        content.append({"type": "text", "text": neutralise(turn, processor)})
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    if completion is not None:
        text = neutralise(completion, processor)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=completion is None
    )


def completion_ids(
    processor: ProcessorMixin, prompt: str, completion: str, *, image: int = True
) -> list[int]:
    """Token ids of a response as it follows its prompt, with one end token.

    White space around the response is left out. The template decides what stands before a response,
    and some tokenizers would join a line break there with the last token of the prompt.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns separated by `TURN`.
        completion: The response.
        image: Number of images of the prompt; True is one.

    Raises:
        InputError: The prompt is written or tokenised differently if a response follows.
    """
    tokenizer = processor.tokenizer
    before, whole = conversation(processor, prompt, completion, image=image)
    head = tokenizer.encode(before, add_special_tokens=False)
    ids = tokenizer.encode(whole, add_special_tokens=False)
    if ids[: len(head)] != head:
        raise InputError(
            f"the tokenizer joins the end of the prompt with the answer: ...{before[-20:]!r}"
        )
    answer, control = ids[len(head) :], control_ids(processor)
    end = tokenizer.eos_token_id
    while answer and (answer[-1] in control or not tokenizer.decode(answer[-1:]).strip()):
        token = answer.pop()
        end = token if token in control else end
    return [*answer, end]


def earlier_turns(
    processor: ProcessorMixin, prompt: str, head: list[int], *, image: int = True
) -> list[slice]:
    """Where the assistant's earlier turns stand in a prompt.

    The end token belongs to a turn if the template writes it there. LLaVA-1.5's template on the
    Hub, for example, writes none between turns.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns separated by `TURN`.
        head: The prompt's token ids, with image tokens expanded.
        image: Number of images of the prompt; True is one.

    Returns:
        A slice of `head` for each earlier turn of the assistant.

    Raises:
        InputError: The chat template writes an earlier turn differently once more turns follow, as
            templates do that drop earlier reasoning.
    """
    turns, found = prompt.split(TURN), []
    # Images stand before the first question, so distances from the end do not depend on them.
    length = len(prompt_ids(processor, prompt, image=image))
    for number in range(1, len(turns), 2):
        asked = TURN.join(turns[:number])
        ids = completion_ids(processor, asked, turns[number], image=image)
        start = len(head) - length + len(prompt_ids(processor, asked, image=image))
        end = start + len(ids) - (head[start : start + len(ids)] != ids)
        found.append(slice(start, end))
        if head[start:end] != ids[: end - start]:
            raise InputError(
                f"the chat template writes turn {number + 1} differently once more turns follow; "
                "set dpo.assistant_turns to last"
            )
    return found


def prefill_ids(processor: ProcessorMixin, row: dict) -> list[int]:
    """Token ids of the words that begin a row's response; empty if the row gives none.

    Args:
        processor: The model's processor.
        row: A prompt row. `prefill` holds the words, if there are any.

    Raises:
        InputError: See `completion_ids`.
    """
    if not row.get("prefill"):
        return []
    image = len(image_cells(row))
    return completion_ids(processor, row["prompt"], row["prefill"], image=image)[:-1]


def conversation(
    processor: ProcessorMixin, prompt: str, completion: str, *, image: int = True
) -> tuple[str, str]:
    """The text of a prompt alone, and of the prompt with its response.

    Args:
        processor: The model's processor.
        prompt: The question, or several turns separated by `TURN`.
        completion: The response. White space before it is left out.
        image: Number of images of the prompt; True is one.

    Raises:
        InputError: The chat template writes the prompt differently if a response follows.
    """
    before = render(processor, prompt, image=image).rstrip(" ")
    whole = render(processor, prompt, completion.lstrip(), image=image)
    if not whole.startswith(before):
        whole = _after(before, whole, neutralise(completion, processor).strip())
    return before, whole


def _after(prompt: str, whole: str, completion: str) -> str:
    """The conversation, with its prompt replaced by the prompt as it is written in generation.

    For example, LLaVA-OneVision's template writes `assistant` and a space before a response, but
    only `assistant` if a response is still to be generated.

    Args:
        prompt: The prompt as the template writes it in generation.
        whole: The conversation as the template writes it.
        completion: The response.

    Raises:
        InputError: The two forms of the prompt differ in more than white space.
    """
    place = whole.rfind(completion)
    if place < 0 or whole[:place].split() != prompt.split():
        raise InputError("the chat template writes a prompt differently once an answer follows it")
    space = prompt[len(prompt.rstrip()) :] or " " * whole[:place].endswith(" ")
    return prompt.rstrip() + space + whole[place:]


TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as token ids without padding, and the image tensors."""

    ids: list[list[int]]
    """Token ids of each prompt, with image tokens expanded."""
    token_types: dict[str, list[list[int]]]
    """Name of a tensor -> for each prompt, a number per token that tells image patches from text.
    Some model families use such a tensor: Qwen-VL `mm_token_type_ids`, Gemma 3 `token_type_ids`.
    Text, such as the tokens of a response, has 0."""
    vision: dict[str, Tensor]
    """The image tensors that the processor gives, such as `pixel_values`."""


def encode_prompts(
    processor: ProcessorMixin, prompts: list[str], images: list[Any]
) -> EncodedPrompts:
    """Encode prompts, with one BOS each and with image tokens expanded.

    Args:
        processor: The model's processor.
        prompts: The questions.
        images: For each question its decoded images in order: a list, one image, or None.

    Raises:
        InputError: A question has several images, and the chat template or the model's processor
            takes only one.
    """
    tokenizer = processor.tokenizer
    # Some processors refuse a flat list, since a text may have several images.
    nested = [
        [before_padding(processor, i) for i in (of_row if isinstance(of_row, list) else [of_row])]
        if of_row is not None else []
        for of_row in images
    ]  # fmt: skip
    texts = [
        render(processor, p, image=len(of_row)).rstrip(" ")
        for p, of_row in zip(prompts, nested, strict=True)
    ]
    if several := max(map(len, nested), default=0) > 1:
        _check_slots(processor, texts, nested)
    encoded = processor(
        images=nested if any(nested) else None, text=texts, add_special_tokens=False, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    # LLaVA-OneVision's model assumes one image per row if it does not get this number, which trl's
    # trainers do not pass on.
    if encoded.pop("batch_num_images", None) is not None and several:
        raise InputError(f"{ONE_IMAGE}, because it prepares several images in another way")
    mask = encoded.pop("attention_mask").bool()

    def rows(name: str) -> list[list[int]]:
        return [row[keep].tolist() for row, keep in zip(encoded.pop(name), mask, strict=True)]

    ids = rows("input_ids")
    names = [n for n in TOKEN_TYPES if n in encoded and _for_model(processor, n)]
    types = {name: rows(name) for name in names}
    for name in TOKEN_TYPES:
        encoded.pop(name, None)
    bos = tokenizer.bos_token_id
    for i, row in enumerate(ids):
        if bos is not None and row[:1] != [bos]:
            ids[i] = [bos, *row]
            for marks in types.values():
                marks[i] = [0, *marks[i]]
    return EncodedPrompts(ids, types, dict(encoded))


ONE_IMAGE = "a row with several images does not work with this model family"


def _check_slots(processor: ProcessorMixin, texts: list[str], nested: list[list]) -> None:
    """Raise unless the chat template has written a slot for every image of every prompt.

    Args:
        processor: The model's processor.
        texts: The prompts as the template writes them.
        nested: The images of each prompt.

    Raises:
        InputError: A slot is missing, so a picture would be dropped.
    """
    one, none = render(processor, "a"), render(processor, "a", image=False)
    slots = [t for t in special_tokens(processor) if one.count(t) > none.count(t)]
    for text, images in zip(texts, nested, strict=True):
        if images and not any(text.count(t) == len(images) for t in slots):
            found = max((text.count(t) for t in slots), default=0)
            raise InputError(
                f"{ONE_IMAGE}: its chat template writes {found} image slots for {len(images)} "
                "images; leave one image in each row, or take another model"
            )


def before_padding(processor: ProcessorMixin, image: Any) -> Any:
    """An image, shrunk by `for_square` if the processor would pad it to a square."""
    pixels = getattr(processor, "image_processor", None)
    pads = getattr(pixels, "do_pad", False) and hasattr(pixels, "pad_to_square")
    return for_square(image) if pads else image


def _for_model(processor: ProcessorMixin, name: str) -> bool:
    """Whether the model reads a tensor of token types.

    Many tokenizers give `token_type_ids` that their model does not read. The model reads them only
    if the processor adds this name to the input names that it takes over from its tokenizer.

    Args:
        processor: The model's processor.
        name: Name of the tensor.
    """
    listed, by_tokenizer = processor.model_input_names, processor.tokenizer.model_input_names
    return name != "token_type_ids" or listed.count(name) > by_tokenizer.count(name)


def prompt_ids(processor: ProcessorMixin, prompt: str, *, image: int = True) -> list[int]:
    """Token ids of a prompt with one BOS and one token for each image, which vLLM expands.

    Args:
        processor: The model's processor.
        prompt: The question.
        image: Number of images of the prompt; True is one.
    """
    tokenizer = processor.tokenizer
    text = render(processor, prompt, image=image).rstrip(" ")
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
