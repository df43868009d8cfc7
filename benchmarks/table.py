"""The speed table of docs/results.md, written from the committed results.

python -m benchmarks.table        # rewrites the block between the markers
"""

import json
from pathlib import Path

from benchmarks.common import RESULTS

PAGE = Path(__file__).parents[1] / "docs/results.md"
START, END = "<!-- speed -->", "<!-- /speed -->"


LAYOUTS = {"pairs": "one question per image", "tree": "three questions per image"}


def result(name: str) -> dict | None:
    """What a benchmark wrote; None if it has not run yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def render() -> str:
    """The block as the page must hold it: a row for whatever was measured."""
    rows: list[str] = []
    peaks: list[str] = []

    def add(what: str, ratio: float, bound: float | None = None) -> None:
        share = "" if bound is None else f"{bound:.2f}×"
        part = "" if bound is None else f"{100 * ratio / bound:.0f} %"
        rows.append(f"| {what} | {ratio:.2f}× | {share} | {part} |")

    pages = {
        n: result(n) for n in ("dpo_step", "reward_step", "ppo_step", "ppo_memory", "generate")
    }
    found = {name: page["metrics"] for name, page in pages.items() if page}
    if dpo := found.get("dpo_step"):
        for label, part in (("", dpo), (", vocabulary 32,000", dpo["vocabulary_32000"])):
            for layout, title in LAYOUTS.items():
                for key, more in (("all", ""), ("all_cached", ", cached reference")):
                    name = f"DPO step against trl, {title}{more}{label}"
                    add(name, part[layout]["speedup"][key], part[layout]["bound"][key])
        peaks.append(
            f"DPO {dpo['peak_ratio']:.2f} of trl's, {dpo['peak_ratio_tree']:.2f} with three "
            "questions an image"
        )
    if reward := found.get("reward_step"):
        for layout, title in LAYOUTS.items():
            name = f"reward-model step against two forwards, {title}"
            add(name, reward[layout]["speedup"], reward[layout]["bound"])
        peaks.append(f"reward model {reward['peak_ratio']:.2f} of the plain one's")
    if step := found.get("ppo_step"):
        add("PPO step against the original's shape, three questions per image", step["speedup"])
        add(
            "PPO step against the original's shape, one question per image",
            step["speedup_distinct"],
        )
    if memory := found.get("ppo_memory"):
        peaks.append(f"PPO on one base {memory['peak_ratio']:.2f} of the original's four models")
    if words := found.get("generate"):
        add("265 answers against one by one", words["speedup"])
    page = next(page for page in pages.values() if page)
    lines = [
        START,
        "| what | ratio of times | FLOP bound | reached |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Peak memory above imports: {'; '.join(peaks)}. {page['device']}, fp32, LoRA, torch "
        f"{page['versions']['torch']}, trl {page['versions']['trl']}.",
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the block."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + render() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
