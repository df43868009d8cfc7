"""Batch inference of the embedded model: one prompt at a time, and ours.

    python -m benchmarks.generate

One by one is what the original code does: `model.generate` for a prompt, then for the next. Ours
sorts by length, runs batches, and encodes an image once for all its questions in a batch.
"""

import tempfile
import time
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from benchmarks import common
from spavl_lib.config import DataConfig, GenerationConfig, load_config
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.load import load_prompts
from spavl_lib.generation.generate import generate, generate_batch
from spavl_lib.generation.stage import load_answerer
from spavl_lib.modelling.load import load_processor

PROMPTS = 265  # of SPA-VL's harm evaluation
CACHES = ("dynamic", "static", "compact")
BATCHES = (16, 64, 265)


def prompts() -> list[dict]:
    """Rows of the embedded evaluation sets, as many as SPA-VL's harm set has."""
    data = DataConfig(source="mini", train_rows=0, validation_rows=0, test_rows=0)
    rows = [dict(r) for name in ("harm", "help") for r in load_prompts(data, name)]
    while len(rows) < PROMPTS:
        rows += rows[: PROMPTS - len(rows)]
    return rows[:PROMPTS]


def one_by_one(
    model: PreTrainedModel, processor: ProcessorMixin, rows: list[dict], config: GenerationConfig
) -> list[str]:
    """The peer."""
    collate, said = PromptCollator(processor), []
    for row in rows:
        [answer] = generate_batch(model, processor, collate([row]), config)
        said.append(answer["response"])
    return said


def batched(
    model: PreTrainedModel, processor: ProcessorMixin, rows: list[dict], config: GenerationConfig
) -> list[str]:
    """Ours, to a file."""
    with tempfile.TemporaryDirectory() as folder:
        records = generate(model, processor, rows, config, Path(folder) / "answers.jsonl")
    return [r["response"] for r in records]


def main() -> None:
    """Measure, write, print."""
    options = common.parser(__doc__).parse_args()
    config = load_config("demo")
    rows, processor = prompts(), load_processor(config.model)
    shared = load_answerer(config, None)
    plain = load_answerer(load_config("demo", {"model.share_prefix": "off"}), None)
    own, alone_config = config.generation, GenerationConfig(batch_size=1, cache="dynamic")

    def peer() -> list[str]:
        return one_by_one(plain, processor, rows, alone_config)

    def ours() -> list[str]:
        return batched(shared, processor, rows, own)

    times = common.median_seconds([peer, ours], repeats=options.repeats)
    seconds = dict(zip(("one_by_one", "ours"), times, strict=True))
    alone = peer()
    found = {"same_answers": _same(alone, ours())}
    once: dict[str, float] = {}
    for size in BATCHES:
        for cache in CACHES:
            settings = GenerationConfig(batch_size=size, cache=cache)
            batched(shared, processor, rows[:size], settings)  # warm
            start = time.perf_counter()
            together = batched(shared, processor, rows, settings)
            once[f"{cache}_{size}"] = time.perf_counter() - start
            found[f"same_answers_{cache}_{size}"] = _same(alone, together)
    start = time.perf_counter()
    batched(plain, processor, rows, own)
    once["without_sharing_images"] = time.perf_counter() - start
    metrics = {
        "speedup": seconds["one_by_one"] / seconds["ours"],
        "prompts": len(rows),
        "images": len({r["image_name"] for r in rows}),
        "ours": f"{own.cache}_{own.batch_size}",
        "seconds": seconds,
        "seconds_once": once,
        **found,
    }
    common.finish("generate", metrics, results=options.results)


def _same(one: list[str], other: list[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


if __name__ == "__main__":
    main()
