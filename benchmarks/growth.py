"""How a DPO step grows with the image and with the answers; several pairs a row; the collator.

    python -m benchmarks.growth

Four layers of the shape in `dpo_step`: the curves' form does not hang on depth. Writes
`results/growth.json` and draws it into `results/growth.png`.
"""

import dataclasses
import io
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from benchmarks import common
from benchmarks.dpo_step import VARIANTS, Switches, _step
from spavl_lib.config import ModelConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.modelling.load import load_processor
from spavl_lib.plotting.speed import plot_growth

GRIDS = (8, 16, 24, 34, 48)  # 64 to 2,304 image tokens
ANSWERS = (16, 64, 128, 256, 512)


def both_seconds(shape: common.Shape, pairs: int, repeats: int) -> list[float]:
    """trl's step and ours over distinct images."""
    with tempfile.TemporaryDirectory() as folder:
        policy = common.adapted(common.build_model(shape), shape)
        trainer = common.dpo_trainer(policy, shape, pairs, folder)
        switches, batch = Switches(trainer), common.build_pairs(shape, pairs, 1)
        steps = [_step(switches, VARIANTS[n], batch, {}) for n in ("trl", "all")]
        return common.median_seconds(steps, repeats=repeats)


def growth(shape: common.Shape, repeats: int) -> dict:
    """Step time of one pair against image tokens, and against answer length."""
    found: dict = {"image_tokens": [], "answer_tokens": []}
    for grid in GRIDS:
        plain, ours = both_seconds(dataclasses.replace(shape, grid=grid), 1, repeats)
        found["image_tokens"].append({"tokens": grid**2, "trl": plain, "ours": ours})
    for length in ANSWERS:
        sized = dataclasses.replace(shape, chosen=length, rejected=length)
        plain, ours = both_seconds(sized, 1, repeats)
        found["answer_tokens"].append({"tokens": length, "trl": plain, "ours": ours})
    return found


def packing(shape: common.Shape, repeats: int) -> dict:
    """Six pairs in one packed row, pair by pair, and each pair as long as the longest."""
    pairs = 6
    uneven = dataclasses.replace(shape, jitter=0.9)
    with tempfile.TemporaryDirectory() as folder:
        policy = common.adapted(common.build_model(shape), shape)
        trainer = common.dpo_trainer(policy, shape, pairs, folder)
        switches, batch = Switches(trainer), common.build_pairs(uneven, pairs, 1)
        rows = [i + half for i in range(pairs) for half in (0, pairs)]
        single = [{k: v[rows[2 * i : 2 * i + 2]] for k, v in batch.items()} for i in range(pairs)]
        longest = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
        # Padding counted as tokens: what a row a pair, padded to the longest, would run.
        longest["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
        ours = VARIANTS["all"]

        def apart() -> None:
            for part in single:
                _step(switches, ours, part, {})()

        works = [_step(switches, ours, batch, {}), apart, _step(switches, ours, longest, {})]
        seconds = common.median_seconds(works, repeats=repeats)
    return dict(zip(("one_row", "a_row_a_pair", "padded_to_longest"), seconds, strict=True))


def collating(pairs: int = 12) -> dict:
    """Milliseconds a pair for LLaVA-1.5's 336-pixel images from photo-sized JPEG files."""
    chance = np.random.default_rng(0)
    side = {"height": 336, "width": 336}
    embedded = load_processor(ModelConfig(name="embedded", adapter="full"))
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=side),
        tokenizer=embedded.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=embedded.chat_template,
    )
    rows = []
    for i in range(pairs):
        small = chance.integers(0, 255, (96, 128, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((1024, 768)).save(buffer, format="JPEG", quality=90)
        rows.append({
            "id": str(i), "prompt": "What is in this picture, and is it safe to do the same? " * 2,
            "chosen": "No, and here is why that would be a bad idea. " * 9,
            "rejected": "Yes, and here is how one would go about it. " * 7,
            "image_name": str(i), "image": {"bytes": buffer.getvalue(), "path": None},
        })  # fmt: skip
    collate = PreferenceCollator(processor)
    collate(rows[:2])
    start = time.perf_counter()
    for i in range(0, pairs, 4):
        collate(rows[i : i + 4])
    return {"ms_per_pair": 1000 * (time.perf_counter() - start) / pairs}


def main() -> None:
    """Measure, write, draw, print."""
    options = common.parser(__doc__).parse_args()
    shape = dataclasses.replace(common.Shape(), layers=4)
    metrics = growth(shape, options.repeats)
    metrics |= {"packing_seconds": packing(shape, options.repeats), "collator": collating()}
    common.finish("growth", metrics, results=options.results)
    figure = plot_growth(options.results / "growth.json")
    figure.savefig(options.results / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
