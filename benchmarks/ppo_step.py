"""A PPO step, rollout and update: the library's, and the original's shape over the same weights.

python -m benchmarks.ppo_step            # two cores, some minutes
python -m benchmarks.ppo_step --full     # LLaVA-1.5-7B's shape; one large GPU

The original samples and scores row by row, through four models with the vocabulary's logits at
every position, and runs the tower anew in every pass. Both sides answer the same prompts with the
same sampled tokens. Prompts come three to a picture, as in SPA-VL; `speedup_distinct` is the same
with a picture to each.
"""

import dataclasses
import time
from collections.abc import Callable

import torch

from benchmarks import common, ppo_common
from spavl_lib.modelling.roles import ROLES
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.trainers.ppo import Rollout

# Widths are small and depth is not, so that tower and vocabulary weigh what they do at 7B.
SHAPE = common.Shape(
    hidden=192, layers=6, heads=6, intermediate=512, tower_hidden=64, tower_layers=4,
    tower_heads=2, tower_intermediate=256,
)  # fmt: skip
PROMPTS, NEW_TOKENS, BATCH = 16, 48, 8


@dataclasses.dataclass(frozen=True)
class Variant:
    """Which techniques are on."""

    batched: bool = False
    """Rows sampled, scored and updated `BATCH` at a time, not one by one."""
    cached: bool = False
    """The tower's output once a rollout."""
    one_base: bool = False
    """One base for four roles, log-probabilities at answer positions alone."""
    shared: bool = False
    """What rows have in common once a batch, in sampling and in every pass; LoRA in place."""
    compact: bool = False
    """Answers that have ended leave the batch; else transformers' `generate` samples."""


ORIGINAL = Variant()
VARIANTS = {
    "original": ORIGINAL,
    "batched": Variant(batched=True),
    "cached": Variant(cached=True),
    "one_base": Variant(one_base=True),
    "batched_shared": Variant(batched=True, shared=True),
    "batched_compact": Variant(batched=True, compact=True),
    "without_shared": Variant(batched=True, cached=True, one_base=True, compact=True),
    "all": Variant(batched=True, cached=True, one_base=True, shared=True, compact=True),
}


def run(variant: Variant, shape: common.Shape, questions: int) -> tuple[float, Rollout]:
    """Seconds of one step, after one short step that does not count; and its rollout."""
    prompts = ppo_common.prompts_of(shape, PROMPTS, questions)
    config = ppo_common.settings(shape, PROMPTS, NEW_TOKENS, BATCH if variant.batched else 1)
    cache = "compact" if variant.compact else "dynamic"
    generation = dataclasses.replace(config.generation, cache=cache)
    config = dataclasses.replace(config, generation=generation)
    build = ppo_common.one_base if variant.one_base else ppo_common.four_models

    def roles(never: tuple[int, ...]) -> object:
        found = build(ppo_common.build_base(shape), config, never)
        if variant.shared:
            for vlm in {id(v): v for v in map(found.vlm_of, ROLES)}.values():
                apply_sharing(vlm, "require")
        return found

    with ppo_common.trainer(config, roles, prompts) as trainer:
        with torch.no_grad():  # threads and buffers
            trainer.model("reward", **trainer._batch(prompts[:1], [[5]], [0]))
        common.synchronise()
        started = time.perf_counter()
        rollout = ppo_common.step(trainer, cached=variant.cached)
        common.synchronise()
        return time.perf_counter() - started, rollout


def compare(rollout: Rollout, original: Rollout) -> dict[str, float]:
    """How far a variant is from the original: answers, and figures of the rows answered alike."""
    same = [a == b for a, b in zip(rollout.responses, original.responses, strict=True)]
    if not any(same):
        raise AssertionError("no row was answered alike: the sides do not do the same work")
    differences = {
        name: float((rollout.columns[name][same] - original.columns[name][same]).abs().max())
        for name in ("logps", "ref_logps", "values", "scores")
    }
    return {"rows_alike": sum(same), "largest_difference": max(differences.values())}


def measure(
    names: tuple[str, ...], shape: common.Shape, questions: int, say: Callable[[str], None]
) -> dict:
    """Seconds, speedup over the original and agreement with it, by variant."""
    seconds, agreement, original = {}, {}, None
    for name in names:
        seconds[name], rollout = run(VARIANTS[name], shape, questions)
        original = original or rollout
        agreement[name] = compare(rollout, original)
        say(f"{name:<16}{seconds[name]:7.1f} s  {seconds[names[0]] / seconds[name]:5.2f} x")
    return {
        "seconds": seconds,
        "speedup": {n: seconds[names[0]] / s for n, s in seconds.items()},
        "agreement": agreement,
    }


def main() -> None:
    """Measure every variant."""
    options = common.parser(__doc__).parse_args()
    shape = common.SEVEN_B if options.full else SHAPE
    common.quiet_libraries()
    print("three prompts to a picture")
    three = measure(tuple(VARIANTS), shape, 3, print)
    print("a picture to each prompt")
    one = measure(("original", "all"), shape, 1, print)
    metrics = {
        "speedup": three["speedup"]["all"],
        "speedup_distinct": one["speedup"]["all"],
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "batch": BATCH,
        "image_tokens": shape.image_tokens,
        "parameters": ppo_common.size_of(shape),
        "three_to_a_picture": three,
        "one_to_a_picture": one,
    }
    common.finish("ppo_step", metrics, results=options.results)


if __name__ == "__main__":
    main()
