"""Lengths of rows in tokens, counted before training so that no row is too long for the model.

The first image decides the number of image tokens. If this number varies by image, the counts are
estimates. The collator still refuses a row that is too long.
"""

from collections.abc import Iterator

import pyarrow.compute as pc
from datasets import Dataset
from transformers import ProcessorMixin

from spavl_lib.data.images import decode_images
from spavl_lib.data.schema import TURN, batches, decoded
from spavl_lib.data.templates import control_ids, encode_prompts, render
from spavl_lib.errors import InputError

LISTED = 20  # rows that an error names


def image_slots(processor: ProcessorMixin, rows: Dataset) -> int:
    """Tokens that the first image adds to its row's text; 0 if no row has an image."""
    row = next((r for r in rows if r["image"] is not None), None)
    if row is None:
        return 0
    [ids] = encode_prompts(processor, [row["prompt"]], decode_images([row])).ids
    text = render(processor, row["prompt"]).rstrip(" ")
    return len(ids) - len(processor.tokenizer.encode(text, add_special_tokens=False))


def pair_lengths(
    processor: ProcessorMixin, rows: Dataset, skip_below: int = 0
) -> Iterator[tuple[str, int, int]]:
    """Lengths of both sequences of each row in tokens, including prompt, image and EOS.

    Args:
        processor: The model's processor.
        rows: Preference rows.
        skip_below: Rows that cannot have more tokens than this are left out without encoding them.
            This is possible because every token has at least one byte.

    Yields:
        Row id, tokens of prompt and chosen response, tokens of prompt and rejected response.
    """
    tokenizer, control = processor.tokenizer, control_ids(processor)
    extra = image_slots(processor, rows)
    frame = len(render(processor, "", "")) + extra + 16
    for table in batches(rows.select_columns(["id", "prompt", "chosen", "rejected", "image"])):
        has_image = pc.is_valid(table.column("image")).to_pylist()
        texts, encoded_rows = [], []
        for (row, _), image in zip(decoded(table.drop_columns(["image"])), has_image, strict=True):
            pair = [str(row[n] or "") for n in ("prompt", "chosen", "rejected")]
            longest = len(pair[0]) + max(len(pair[1]), len(pair[2])) + frame
            if longest <= skip_below and all(map(str.isascii, pair)) and TURN not in pair[0]:
                continue
            encoded_rows.append((row["id"], image))
            texts += [render(processor, pair[0], answer, image=image) for answer in pair[1:]]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        sizes = [  # the collator adds the end token that a template leaves out
            len(ids) + control.isdisjoint(ids[-2:]) for ids in encoded
        ]
        for (row_id, image), chosen, rejected in zip(
            encoded_rows, sizes[::2], sizes[1::2], strict=True
        ):
            yield row_id, chosen + extra * image, rejected + extra * image


def check_lengths(processor: ProcessorMixin, rows: Dataset, longest: int) -> None:
    """Check that no sequence is too long for the model.

    Args:
        processor: The model's processor.
        rows: Preference rows.
        longest: Largest number of tokens of a sequence, including image tokens; 0 means no limit.

    Raises:
        InputError: Rows are longer. The message names them.
    """
    if not longest:
        return
    too_long = [
        f"{row_id} {side}: {size} tokens"
        for row_id, *sizes in pair_lengths(processor, rows, skip_below=longest)
        for side, size in zip(("chosen", "rejected"), sizes, strict=True)
        if size > longest
    ]
    if too_long:
        raise InputError(
            f"{len(too_long)} answers are longer than {longest} tokens with prompt and image "
            f"(raise the trainer's max_length, or remove these rows): {_first(too_long)}"
        )


def check_prompt_lengths(
    processor: ProcessorMixin, rows: Dataset, max_new_tokens: int, longest: int, *, stage: str
) -> None:
    """Check that every prompt leaves room for a response.

    Args:
        processor: The model's processor.
        rows: Prompt or preference rows.
        max_new_tokens: Largest number of tokens of a response.
        longest: Largest number of tokens of a sequence, including image tokens; 0 means no limit.
        stage: Config section whose `max_new_tokens` the error message names.

    Raises:
        InputError: Prompts are too long. The message names their rows.
    """
    if not longest:
        return
    extra, too_long = image_slots(processor, rows), []
    for table in batches(rows.select_columns(["id", "prompt", "image"])):
        has_image = pc.is_valid(table.column("image")).to_pylist()
        prompts = [row for row, _ in decoded(table.drop_columns(["image"]))]
        texts = [
            render(processor, row["prompt"], image=image).rstrip(" ")
            for row, image in zip(prompts, has_image, strict=True)
        ]
        encoded = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, ids, image in zip(prompts, encoded, has_image, strict=True):
            size = len(ids) + extra * image
            if size + max_new_tokens > longest:
                too_long.append(f"{row['id']}: {size} tokens")
    if too_long:
        raise InputError(
            f"{len(too_long)} prompts leave no room for {max_new_tokens} new tokens in a context "
            f"of {longest} (lower {stage}.max_new_tokens, or remove these rows): "
            f"{_first(too_long)}"
        )


def _first(lines: list[str]) -> str:
    return "; ".join(lines[:LISTED]) + ("; ..." if len(lines) > LISTED else "")
