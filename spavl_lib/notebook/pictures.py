"""Rows as images with captions."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from transformers import ProcessorMixin

from spavl_lib.data.images import picture_of
from spavl_lib.notebook.session import caption, safe_image
from spavl_lib.plotting import plot_image_grid

HIDDEN = "a pair of data.extra_path, not shown"


def plot_rows(
    rows: Iterable[Mapping[str, Any]],
    fields: Sequence[str],
    *,
    reveal: bool,
    hidden: Collection[str] = (),
    columns: int = 4,
    titles: Sequence[str] = (),
) -> Figure:
    """The images of rows, each with some of its row's fields below it.

    Args:
        rows: Rows of a data set, with `image`. A text-only row gets an empty tile.
        fields: Names of the fields to show; a field without a value is left out.
        reveal: Whether to show images unblurred and texts whole.
        hidden: Ids of rows of which nothing is shown; see `session.hidden_ids`.
        columns: Number of images in a line.
        titles: First line below each image; empty for none.
    """
    shown = [dict(row) for row in rows]
    withheld = [row.get("id") in hidden for row in shown]
    captions = [
        HIDDEN if hide else caption(row, tuple(fields), reveal=reveal)
        for row, hide in zip(shown, withheld, strict=True)
    ]
    if titles:
        captions = [f"{title}\n{text}" for title, text in zip(titles, captions, strict=True)]
    pictures = [
        None if hide else picture_of(row) for row, hide in zip(shown, withheld, strict=True)
    ]
    images = [None if p is None else safe_image(p, reveal=reveal) for p in pictures]
    return plot_image_grid(images, captions, columns=columns)


def pixels_of(processor: ProcessorMixin, image: Image.Image) -> tuple[np.ndarray | None, int]:
    """An image as the vision tower reads it.

    Args:
        processor: The model's processor.
        image: The image.

    Returns:
        The first image tensor, (3, height, width), scaled back to 0..1, or None if the processor
        returns patches instead of images, as Qwen-VL's does; and the side of a patch, or 0 if the
        processor does not know it.
    """
    images = processor.image_processor
    pixels = images([image], return_tensors="np")["pixel_values"]
    patch = getattr(processor, "patch_size", None) or getattr(images, "patch_size", None) or 0
    if np.ndim(pixels) < 4:
        return None, patch
    pixels = np.asarray(pixels).reshape(-1, *np.shape(pixels)[-3:])[0]
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (images.image_mean, images.image_std))
    return pixels * std + mean, patch


def tokens_of(
    processor: ProcessorMixin, ids: Sequence[int], scored: Sequence[bool], *, reveal: bool
) -> tuple[list[str], list[str]]:
    """The text and the kind of each token of a sequence.

    Args:
        processor: The model's processor.
        ids: Token ids.
        scored: Whether the loss counts each token.
        reveal: Whether to show the response's text.

    Returns:
        Texts, and kinds as in `plotting.plot_sequence`.
    """
    tokenizer = processor.tokenizer
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    # In Gemma 3 the processor's token only begins an image; the tokenizer has the image's own.
    image_ids = {processor.image_token_id, getattr(tokenizer, "image_token_id", None)}
    texts, kinds = [], []
    for token, counts in zip(ids, scored, strict=True):
        kind = "response" if counts else "prompt"
        if token in image_ids:
            kind = "image"
        elif token in ends:
            kind = "special"
        kinds.append(kind)
        texts.append(tokenizer.decode([token]) if reveal or kind != "response" else "·")
    return texts, kinds
