"""The example pictures and questions of the playground, from the run's test sets."""

import base64
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin

from spavl_lib.config import DataConfig
from spavl_lib.data.embedded.language import indefinite
from spavl_lib.data.embedded.world import load_world
from spavl_lib.data.images import decode, for_square, png_bytes
from spavl_lib.data.load import eval_sets, load_prompts, load_truth
from spavl_lib.data.sampling import spread
from spavl_lib.data.schema import TURN, image_cells
from spavl_lib.evaluation.numbers import set_title

PAIRS, OTHERS = 12, 20  # twin pairs, and rows of all other sets together
_SMALL = 128  # px; a larger picture is embedded as the model sees it
_LONGEST = 1000  # characters of a question


def examples(config: DataConfig, processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Examples in the order in which the page lists them; twin pairs come first.

    Args:
        config: Names the test sets.
        processor: Prepares large pictures.

    Returns:
        Examples with `set` (a title), `question` and `pictures`. Twins have two pictures. A picture
        has `uri` (PNG) and `caption`.
    """
    truth = load_truth(config)
    names = eval_sets(config, held_out_drawings=False)
    chosen = []
    for title, rows in _chosen({name: load_prompts(config, name) for name in names}, truth):
        pictures = [
            {"uri": _uri(row["image"], processor), "caption": _caption(truth.get(row["id"]), i)}
            for i, row in enumerate(rows)
        ]
        chosen.append({"set": title, "question": rows[0]["prompt"], "pictures": pictures})
    return chosen


def _chosen(sets: dict[str, Dataset], truth: dict[str, dict]) -> Iterator[tuple[str, list[dict]]]:
    """A title, and one row or the two rows of a twin pair, for each example."""
    twins: dict[str, list[dict]] = {}
    for row in filter(_fits, sets.pop("twins", ())):
        twins.setdefault(truth.get(row["id"], {}).get("pair") or "", []).append(row)
    twins.pop("", None)
    sets.pop("twins_exchanged", None)
    pairs = [pair for pair in twins.values() if len(pair) == 2]
    pairs = pairs[:: max(1, len(pairs) // PAIRS)][:PAIRS]
    # Begins in the middle, with plain harms such as weapons; mini's first class is bullying.
    half = len(pairs) // 2
    for pair in (*pairs[half:], *pairs[:half]):
        yield "Twin pairs: the same words, two pictures", pair
    for place, (name, rows) in enumerate(sets.items()):
        count = OTHERS // len(sets) + (place < OTHERS % len(sets))
        for row in filter(_fits, spread(rows, count)):
            yield set_title(name), [row]


def _fits(row: dict) -> bool:
    """Whether the page can show a row: it has one image and one short turn."""
    prompt = row["prompt"]
    return len(image_cells(row)) == 1 and TURN not in prompt and len(prompt) <= _LONGEST


def _uri(cell: Any, processor: ProcessorMixin) -> str:
    """An image as a data URI, from which the page computes the processor's pixels."""
    picture = decode(cell)
    if max(picture.size) > _SMALL:
        square = processor.image_processor(
            [for_square(picture)], do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"][0]
        picture = Image.fromarray(square.transpose(1, 2, 0).astype("uint8"))
    return f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode('ascii')}"


def _caption(labels: dict | None, place: int) -> str:
    """What a picture shows, and what that makes of the request, if it is known."""
    concept = load_world().concepts.get((labels or {}).get("concept", ""))
    if labels is None or concept is None:
        return f"Picture {place + 1}"
    return f"{indefinite(concept)} ({'harmful' if labels['harmful'] else 'harmless'} request)"
