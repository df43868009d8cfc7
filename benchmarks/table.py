"""The README's speed table, written from the committed results.

python -m benchmarks.table        # rewrites the block between the markers
"""

import json
from pathlib import Path

from benchmarks.common import RESULTS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- speed -->", "<!-- /speed -->"


def result(name: str) -> dict:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def render() -> str:
    """The block as the README must hold it."""
    dpo, reward, words = (result(n) for n in ("dpo_step", "reward_step", "generate"))
    step, memory = result("ppo_step")["metrics"], result("ppo_memory")["metrics"]
    small, large = dpo["metrics"], dpo["metrics"]["vocabulary_32000"]
    rows = []

    def add(what: str, ratio: float, bound: float | None = None) -> None:
        share = "" if bound is None else f"{bound:.2f}×"
        part = "" if bound is None else f"{100 * ratio / bound:.0f} %"
        rows.append(f"| {what} | {ratio:.2f}× | {share} | {part} |")

    for label, part in (("", small), (", vocabulary 32,000", large)):
        for layout, title in (("pairs", "a pair an image"), ("tree", "three questions an image")):
            found = part[layout]
            for key, more in (("both", ""), ("both_cached", ", cached reference")):
                name = f"DPO step against trl, {title}{more}{label}"
                add(name, found["speedup"][key], found["bound"][key])
    for layout, title in (("pairs", "a pair an image"), ("tree", "three questions an image")):
        found = reward["metrics"][layout]
        name = f"reward-model step against two forwards, {title}"
        add(name, found["speedup"], found["bound"])
    add("PPO step against the original's, three questions an image", step["speedup"])
    add("PPO step against the original's, a question an image", step["speedup_distinct"])
    add("265 answers against one by one", words["metrics"]["speedup"])
    lines = [
        START,
        "| what | ratio of times | FLOP bound | reached |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Peak memory of the whole process: DPO {small['peak_ratio']:.2f} of trl's "
        f"({small['peak_ratio_tree']:.2f} with three questions an image), reward model "
        f"{reward['metrics']['peak_ratio']:.2f} of the plain one's; above its imports, PPO on one "
        f"base {memory['peak_ratio']:.2f} of the original's four models. Gradients differ by "
        f"{max(small['grad_rel_err'], reward['metrics']['grad_rel_err']):.0e} of their norm. "
        f"{dpo['device']}, fp32, LoRA, torch {dpo['versions']['torch']}, "
        f"trl {dpo['versions']['trl']}.",
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the block."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(before + render() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
