"""Lengths of rows in tokens, counted before training so that no row is too long for the model."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin

from spavl_lib.data.images import ImageError, size_of
from spavl_lib.data.problems import keep_or_refuse
from spavl_lib.data.schema import MORE, TURN, batches, decoded, image_columns
from spavl_lib.data.templates import (
    completion_ids,
    control_ids,
    conversation,
    encode_prompts,
    render,
)
from spavl_lib.errors import InputError

LISTED = 20  # largest number of rows that an error names
# Width and height in pixels of images that show whether all images get the same number of tokens.
PROBES = ((64, 64), (640, 64), (64, 640), (1280, 1280))
# Number of first characters of a response that decide whether a tokenizer joins the response with
# its prompt.
START = 2


class ImageTokens:
    """Counts the tokens that images add to the text of their rows.

    Args:
        processor: The model's processor. Many processors give every image the same number of
            tokens. With other processors, the tokens are counted once for each size of images.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor
        self.counts: dict[tuple[int, int], int] = {}
        probed = {self.of_size(size) for size in PROBES}
        self.always = probed.pop() if len(probed) == 1 else None

    def of_size(self, size: tuple[int, int]) -> int:
        """Number of tokens of an image of this size (width and height in pixels)."""
        if size not in self.counts:
            [ids] = encode_prompts(self.processor, ["a"], [Image.new("RGB", size)]).ids
            text = render(self.processor, "a").rstrip(" ")
            tokenizer = self.processor.tokenizer
            self.counts[size] = len(ids) - _length(
                tokenizer, tokenizer.encode(text, add_special_tokens=False)
            )
        return self.counts[size]

    def of_table(self, table: pa.Table) -> list[tuple[int, int]]:
        """Number of images of each row, and number of their tokens; (0, 0) for a text-only row.

        Raises:
            InputError: An image cannot be read.
        """
        firsts = table.column("image")
        tokens, counts = self.of_cells(firsts), pc.is_valid(firsts).to_pylist()
        if MORE in table.column_names:
            for row, more in enumerate(table.column(MORE)):
                if more.is_valid and len(more.values):
                    counts[row] += len(more.values)
                    tokens[row] += sum(self.of_cells(pa.chunked_array([more.values])))
        return [(int(count), size) for count, size in zip(counts, tokens, strict=True)]

    def of_cells(self, cells: pa.ChunkedArray) -> list[int]:
        """Number of tokens of each image; 0 for a missing one.

        Raises:
            InputError: An image cannot be read.
        """
        if self.always is not None:
            return [self.always * has for has in pc.is_valid(cells).to_pylist()]
        try:
            return [self.of_size(size_of(c)) if c else 0 for c in cells.to_pylist()]
        except ImageError as error:
            raise InputError(f"an image cannot be used: {error}") from error


def _length(tokenizer: Any, ids: list[int]) -> int:
    """Number of tokens of a text, including a BOS even if the chat template left it out."""
    bos = tokenizer.bos_token_id
    return len(ids) + (bos is not None and ids[:1] != [bos])


def _until_last_word(tokenizer: Any, control: Collection[int], ids: list[int]) -> list[int]:
    """Token ids without the control tokens and white space at their end."""
    while ids and (ids[-1] in control or not tokenizer.decode(ids[-1:]).strip()):
        ids = ids[:-1]
    return ids


def pair_lengths(
    processor: ProcessorMixin,
    rows: Dataset,
    skip_below: int = 0,
    sides: Sequence[str] = ("chosen", "rejected"),
    images: ImageTokens | None = None,
) -> Iterator[tuple]:
    """Lengths of the sequences of each row in tokens, including prompt, image and EOS.

    Args:
        processor: The model's processor.
        rows: Preference rows.
        skip_below: Rows that cannot have more tokens than this are left out and not encoded. A text
            cannot have more tokens than bytes, because every token has at least one byte.
        sides: Names of the responses to count.
        images: Counts the tokens of the images. None uses a new counter.

    Yields:
        Row id, and for each side the number of tokens of prompt and response together.
    """
    tokenizer, control = processor.tokenizer, control_ids(processor)
    images = images or ImageTokens(processor)
    frame = len(render(processor, "", "")) + 16
    drawn = image_columns(rows)
    for table in batches(rows.select_columns(["id", "prompt", *sides, *drawn])):
        extra = images.of_table(table)
        texts, encoded_rows = [], []
        for (row, _), (count, slots) in zip(decoded(table.drop_columns(drawn)), extra, strict=True):
            prompt, *answers = (str(row[n] or "") for n in ("prompt", *sides))
            longest = len(prompt) + max(map(len, answers), default=0) + frame + slots
            plain = all(map(str.isascii, (prompt, *answers))) and TURN not in prompt
            if longest <= skip_below and plain:
                continue
            encoded_rows.append((row["id"], slots))
            texts += [conversation(processor, prompt, a, image=count)[1] for a in answers]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        # As in `completion_ids`, one end token follows the last word, whatever the template writes.
        sizes = [
            _length(tokenizer, _until_last_word(tokenizer, control, ids)) + 1 for ids in encoded
        ]
        for number, (row_id, slots) in enumerate(encoded_rows):
            start = number * len(sides)
            yield row_id, *(size + slots for size in sizes[start : start + len(sides)])


@dataclass(frozen=True)
class Limit:
    """How long the rows of a stage may be."""

    stage: str
    """Section of the config whose settings an error names."""
    context: int = 0
    """Tokens that fit into the model's context; 0 if it is not known."""
    max_length: int = 0
    """The stage's own limit for a prompt with its response; 0 means that only `context` counts."""
    sides: tuple[str, ...] = ("chosen", "rejected")
    """The responses that must fit, together with prompt, image and EOS."""
    max_new_tokens: int = 0
    """Number of tokens that are generated, and for which a prompt must leave room. 0 if the stage
    generates nothing."""

    @property
    def longest(self) -> int:
        """Largest number of tokens of a sequence; 0 means no limit."""
        return min(filter(None, (self.max_length, self.context)), default=0)


def without_unfit_rows(
    processor: ProcessorMixin, rows: Dataset, limit: Limit, on_bad_rows: str
) -> Dataset:
    """Refuse rows that the model cannot take, or leave them out with a warning.

    Args:
        processor: The model's processor.
        rows: Preference or prompt rows.
        limit: How long the rows may be.
        on_bad_rows: `error` raises if there are such rows; `skip` leaves these rows out.

    Raises:
        InputError: The model cannot take some rows and `on_bad_rows` is `error`, or it cannot take
            any row. The message names up to `LISTED` rows for each reason.
    """
    unfit: set[str] = set()
    sentences = []
    for sentence, lines in unfit_rows(processor, rows, limit):
        unfit |= {row_id for row_id, _ in lines}
        shown = "; ".join(f"{row_id}{line}" for row_id, line in lines[:LISTED])
        sentences.append(f"{len(lines)} {sentence}: {shown}{'; ...' * (len(lines) > LISTED)}")
    return keep_or_refuse(rows, unfit, ". ".join(sentences), on_bad_rows)


def unfit_rows(
    processor: ProcessorMixin, rows: Dataset, limit: Limit
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Find the rows that a model cannot take.

    Args:
        processor: The model's processor.
        rows: Preference or prompt rows.
        limit: How long the rows may be.

    Yields:
        A reason, and for each row that it applies to the row's id and what is wrong.
    """
    images = ImageTokens(processor)
    if limit.longest and limit.sides:
        lengths = pair_lengths(processor, rows, limit.longest, limit.sides, images)
        too_long = [
            (row_id, f" {side}: {size} tokens")
            for row_id, *sizes in lengths
            for side, size in zip(limit.sides, sizes, strict=True)
            if size > limit.longest
        ]
        if too_long:
            is_context = ", the model's context," if limit.longest == limit.context else ""
            raising, mix = [], []
            if not is_context:
                most = f" up to the model's context of {limit.context}" if limit.context else ""
                raising = [f"raise {limit.stage}.max_length{most}"]
            if limit.max_new_tokens:  # PPO, which reads chosen responses only for its sft_coef
                mix = [f"set {limit.stage}.sft_coef to 0"]
            yield (
                f"answers are longer than {limit.longest} tokens{is_context} with prompt and image "
                f"({_options(limit, *raising, *mix)})",
                too_long,
            )
    if limit.context and limit.max_new_tokens:
        no_room = _prompts_without_room(processor, rows, limit, images)
        if no_room:
            yield (
                f"prompts leave no room for {limit.max_new_tokens} new tokens in a context of "
                f"{limit.context} ({_options(limit, f'lower {limit.stage}.max_new_tokens')})",
                no_room,
            )
    joined = joined_answers(processor, rows, limit.sides)
    if joined:
        yield f"answers cannot be tokenised after their prompts ({_options(limit)})", joined


def _options(limit: Limit, *first: str) -> str:
    # Skipping is not offered for test prompts, because fewer prompts would be another test.
    skip = ["set data.on_bad_rows to skip"] if limit.stage != "generation" else []
    return ", or ".join([*first, "remove these rows", *skip])


def prompt_lengths(
    processor: ProcessorMixin, rows: Dataset, images: ImageTokens | None = None
) -> Iterator[tuple[str, int]]:
    """Row id, and the number of tokens of its prompt with its image, for each row.

    Args:
        processor: The model's processor.
        rows: Preference or prompt rows.
        images: Counts the tokens of the images. None uses a new counter.
    """
    tokenizer, images = processor.tokenizer, images or ImageTokens(processor)
    drawn = image_columns(rows)
    for table in batches(rows.select_columns(["id", "prompt", *drawn])):
        extra = images.of_table(table)
        prompts = [row for row, _ in decoded(table.drop_columns(drawn))]
        texts = [
            render(processor, row["prompt"], image=count).rstrip(" ")
            for row, (count, _) in zip(prompts, extra, strict=True)
        ]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, ids, (_, slots) in zip(prompts, encoded, extra, strict=True):
            yield row["id"], _length(tokenizer, ids) + slots


def _prompts_without_room(
    processor: ProcessorMixin, rows: Dataset, limit: Limit, images: ImageTokens
) -> list[tuple[str, str]]:
    return [
        (row_id, f": {size} tokens")
        for row_id, size in prompt_lengths(processor, rows, images)
        if size + limit.max_new_tokens > limit.context
    ]


def joined_answers(
    processor: ProcessorMixin, rows: Dataset, sides: Sequence[str]
) -> list[tuple[str, str]]:
    """Responses whose first token the tokenizer joins with the last token of the prompt.

    Args:
        processor: The model's processor.
        rows: Preference rows.
        sides: The responses to check.

    Returns:
        For each such response, the row's id, and the side with the reason.
    """
    reasons: dict[str, str] = {}
    found = []
    for table in batches(rows.select_columns(["id", *sides])) if sides else ():
        for row, _ in decoded(table):
            for side in sides:
                answer = str(row[side] or "").lstrip()
                start = answer[:START]
                if start not in reasons:
                    try:
                        reasons[start] = ""
                        completion_ids(processor, "a", answer, image=False)
                    except InputError as error:
                        reasons[start] = str(error)
                if reasons[start]:
                    found.append((row["id"], f" {side}: {reasons[start]}"))
    return found
