"""Peak memory of a LoRA PPO step: four roles on one base, and four models as the original has them.

python -m benchmarks.ppo_memory            # two cores, some minutes
python -m benchmarks.ppo_memory --full     # LLaVA-1.5-7B's shape; one large GPU

Each side in a process of its own, with the same rows, work, batch, checkpointing and 576 image
tokens: peak resident memory less what the process held after its imports. On a CPU both sides hand
freed tensors back to the system, as the library has it; `-heap` is the same without.
"""

from benchmarks import common, ppo_common
from spavl_lib.modelling.speed.host import return_freed_memory

SHAPE = common.Shape(
    hidden=1024, layers=12, heads=16, intermediate=2752, vocabulary=32_000, tower_hidden=128,
    gradient_checkpointing=True,
)  # fmt: skip
PROMPTS, NEW_TOKENS, BATCH = 4, 16, 4
HEAP = "-heap"  # glibc's own way with freed tensors, on both sides
SIDES = {"one_base": ppo_common.one_base, "four_models": ppo_common.four_models}


def peak_of(side: str, shape: common.Shape) -> int:
    """Bytes above the baseline after one step."""
    common.quiet_libraries()
    if not side.endswith(HEAP):
        return_freed_memory()  # as `load_model` does
    config = ppo_common.settings(shape, PROMPTS, NEW_TOKENS, BATCH)
    prompts = ppo_common.prompts_of(shape, PROMPTS, 1)
    before = common.baseline_bytes()

    def roles(never: tuple[int, ...]) -> object:
        return SIDES[side.removesuffix(HEAP)](ppo_common.build_base(shape), config, never)

    with ppo_common.trainer(config, roles, prompts) as trainer:
        ppo_common.step(trainer)
    return common.peak_bytes() - before


def main() -> None:
    """Measure both sides."""
    options = common.parser(__doc__).parse_args()
    shape = common.SEVEN_B if options.full else SHAPE
    if options.peak_of:
        print(peak_of(options.peak_of, shape))
        return
    extra = ["--full"] if options.full else []
    names = [*SIDES, *(f"{side}{HEAP}" for side in SIDES)]
    peaks = {name: common.peak_in_child("ppo_memory", name, *extra) for name in names}
    size = ppo_common.size_of(shape)
    metrics = {
        "peak_ratio": peaks["one_base"] / peaks["four_models"],
        "peak_ratio_heap": peaks[f"one_base{HEAP}"] / peaks[f"four_models{HEAP}"],
        "peak_bytes": peaks,
        "parameters": size,
        "weights_bytes": size * common.compute_dtype().itemsize,
        "rows": PROMPTS,
        "batch": BATCH,
        "image_tokens": shape.image_tokens,
        "new_tokens": NEW_TOKENS,
    }
    common.finish("ppo_memory", metrics, results=options.results)


if __name__ == "__main__":
    main()
