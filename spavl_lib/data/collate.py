"""Make batches: turn rows into padded tensors with masks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ProcessorMixin

from spavl_lib.data.images import decode_images
from spavl_lib.data.templates import completion_ids, earlier_turns, encode_prompts, prefill_ids
from spavl_lib.errors import InputError


def pad_rows(rows: list[list[int]], value: int, side: str) -> Tensor:
    """Stack rows of token ids into one tensor.

    Args:
        rows: Token ids or mask values of each row.
        value: The value of padding.
        side: The side of padding: `right` or `left`.

    Returns:
        (batch, longest row), int64.
    """
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        out[i, place] = torch.tensor(row)
    return out


def stack_vision(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the image tensors of several rows into those of one batch.

    Args:
        parts: For each row: name of a tensor -> tensor of shape (images of the row, ...), or
            (images of the row, tiles, ...) if the model splits images into tiles.

    Returns:
        Name of a tensor -> tensor of shape (images of all rows, ...). If a row has fewer tiles or
        smaller images (Pixtral) than another row, its tensor is padded with zeros at the end of
        each axis, as the processors do within a batch.
    """
    stacked = {}
    for name in parts[0] if parts else ():
        tensors = [part[name] for part in parts]
        shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        stacked[name] = torch.cat([_filled(t, shape) for t in tensors])
    return stacked


def _filled(tensor: Tensor, shape: list[int]) -> Tensor:
    """A tensor (images, ...) with zeros at the end of every axis, up to (images, *shape)."""
    if list(tensor.shape[1:]) == shape:
        return tensor
    filled = tensor.new_zeros(len(tensor), *shape)
    filled[(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
    return filled


@dataclass
class PreferenceCollator:
    """Makes batches of pairs in the layout of trl's vision collator: chosen rows, then rejected."""

    processor: ProcessorMixin
    max_length: int = 0
    """Largest number of tokens of a sequence, including image tokens; 0 means no limit."""
    padding_side: str = "right"
    all_turns: bool = False
    """Whether `completion_mask` is also 1 on the assistant's earlier turns in the prompt."""

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Make a batch of preference rows.

        Returns:
            `input_ids`, `attention_mask` and `completion_mask`, each (2 * rows, length), int64, and
            the image tensors of all rows in order, twice. `completion_mask` is 1 on the tokens of
            the response and on its EOS (see `all_turns`).

        Raises:
            InputError: As in `batch_of`.
        """
        return self.batch_of(rows, "chosen", "rejected")

    def batch_of(self, rows: list[dict], *columns: str) -> dict[str, Tensor]:
        """Make a batch with the responses in some columns: those of the first column come first.

        Args:
            rows: Rows with prompt, image and responses.
            columns: Names of the columns.

        Returns:
            As `__call__`, with as many sequences for each row as there are columns.

        Raises:
            InputError: A row is longer than `max_length`, its image cannot be used, or the prompt's
                tokens change when the response follows (see `completion_ids`).
        """
        images = decode_images(rows)
        prompts = encode_prompts(self.processor, [r["prompt"] for r in rows], images)
        sequences, masks, too_long = [], [], []
        before = [
            self._mask_of_prompt(row, head, len(image))
            for row, head, image in zip(rows, prompts.ids, images, strict=True)
        ]
        for side in columns:
            for row, head, image, mask in zip(rows, prompts.ids, images, before, strict=True):
                try:
                    tail = completion_ids(
                        self.processor, row["prompt"], row[side], image=len(image)
                    )
                except InputError as error:
                    raise InputError(f"row {row.get('id')} {side}: {error}") from error
                sequences.append(head + tail)
                masks.append(mask + [1] * len(tail))
                if self.max_length and len(sequences[-1]) > self.max_length:
                    too_long.append(f"{row.get('id')} {side}: {len(sequences[-1])} tokens")
        if too_long:
            raise InputError(
                f"rows longer than {self.max_length} tokens, images included (remove these rows, "
                f"or set data.on_bad_rows to skip): {'; '.join(too_long)}"
            )
        pad = self.processor.tokenizer.pad_token_id
        attention = [[1] * len(s) for s in sequences]
        batch = {
            "input_ids": pad_rows(sequences, pad, self.padding_side),
            "attention_mask": pad_rows(attention, 0, self.padding_side),
            "completion_mask": pad_rows(masks, 0, self.padding_side),
        }
        for name, rows_of in prompts.token_types.items():  # the tokens of a response have type 0
            doubled = [*rows_of] * len(columns)
            types = [t + [0] * (len(s) - len(t)) for t, s in zip(doubled, sequences, strict=True)]
            batch[name] = pad_rows(types, 0, self.padding_side)
        return batch | {
            k: torch.cat([v] * len(columns)) if isinstance(v, Tensor) else v
            for k, v in prompts.vision.items()
        }

    def _mask_of_prompt(self, row: dict, head: list[int], images: int) -> list[int]:
        mask = [0] * len(head)
        if self.all_turns:
            try:
                spans = earlier_turns(self.processor, row["prompt"], head, image=images)
            except InputError as error:
                raise InputError(f"row {row.get('id')}: {error}") from error
            for span in spans:
                mask[span] = [1] * (span.stop - span.start)
        return mask


@dataclass
class PromptCollator:
    """Makes batches of prompts for generation, padded on the left."""

    processor: ProcessorMixin

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Make a batch of prompt rows. A row's `prefill` follows its prompt, as the response does.

        Returns:
            `input_ids` and `attention_mask`, each (rows, length), int64, and the image tensors.

        Raises:
            InputError: An image cannot be used, or see `completion_ids`.
        """
        images = decode_images(rows)
        prompts = encode_prompts(self.processor, [r["prompt"] for r in rows], images)
        given = [prefill_ids(self.processor, row) for row in rows]
        ids = [prompt + first for prompt, first in zip(prompts.ids, given, strict=True)]
        batch = {
            "input_ids": pad_rows(ids, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0, "left"),
        }
        for name, rows_of in prompts.token_types.items():  # the tokens of a response have type 0
            types = [t + [0] * len(first) for t, first in zip(rows_of, given, strict=True)]
            batch[name] = pad_rows(types, 0, "left")
        return batch | prompts.vision
