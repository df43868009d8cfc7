"""Draw the course's map, one picture for each notebook with its place marked, and the Colab badges.

    python scripts/heads.py             # writes docs/figures/course_*.svg and the notebooks' heads
    python scripts/heads.py --check     # only says whether they are current

A notebook's first cell holds the title, then the lines that this script writes. Set `REPOSITORY`
once the workbook has a public address; every notebook then gets its badge.
"""

import argparse
import sys
from pathlib import Path

import nbformat

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS, FIGURES = REPO / "notebooks", REPO / "docs/figures"
REPOSITORY = ""  # such as "owner/name" on GitHub
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
OPEN = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"
# Notebook -> lines in its box, and the box's place (left, top), in pixels.
BOXES = {
    "01_data_exploration": ("01 Data", "pairs and prompts", 8, 62),
    "02_reward_model": ("02 Reward model", "scores answers", 172, 20),
    "03_ppo": ("03 PPO", "learns from scores", 336, 20),
    "03b_ppo_in_practice": ("03b in practice", "traps, RLOO, GRPO", 336, 84),
    "04_dpo": ("04 DPO", "learns from pairs", 336, 148),
    "05_inference": ("05 Answers", "base, DPO, PPO", 500, 62),
    "06_safety_helpfulness": ("06 Judge", "safe? useful? sure?", 664, 62),
    "07_scaling_and_ablations": ("07 Scaling", "how many pairs?", 500, 148),
    "08_laboratory": ("08 Laboratory", "what withstands?", 664, 148),
}
ARROWS = (
    ("01_data_exploration", "02_reward_model"), ("02_reward_model", "03_ppo"),
    ("01_data_exploration", "04_dpo"), ("03_ppo", "05_inference"), ("04_dpo", "05_inference"),
    ("05_inference", "06_safety_helpfulness"), ("04_dpo", "07_scaling_and_ablations"),
    ("07_scaling_and_ablations", "08_laboratory"),
)  # fmt: skip
WIDE, HIGH = 140, 48
INK, HERE, PLAIN, LINE = "#1f2a37", "#0072b2", "#f4f6f9", "#5f6b7a"


def course_map(here: str) -> str:
    """The map as an SVG.

    Args:
        here: Name of the notebook that is marked.
    """
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 812 204" width="812" height="204" '
        'font-family="sans-serif" role="img">',
        f"<title>The course; you are here: {BOXES[here][0]}</title>",
        '<rect width="812" height="204" rx="8" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
    ]
    for first, second in ARROWS:
        x, y = BOXES[first][2] + WIDE, BOXES[first][3] + HIGH // 2
        to_x, to_y = BOXES[second][2], BOXES[second][3] + HIGH // 2
        bend = to_x - 12
        parts.append(
            f'<path d="M{x} {y}H{bend - 8 if y != to_y else to_x - 2}'
            f'{f"L{bend} {to_y}H{to_x - 2}" if y != to_y else ""}" fill="none" stroke="{LINE}" '
            'stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    for name, (title, line, x, y) in BOXES.items():
        fill, text = (HERE, "#ffffff") if name == here else (PLAIN, INK)
        parts += [
            f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="6" fill="{fill}" '
            f'stroke="{HERE if name == here else LINE}"/>',
            f'<text x="{x + 10}" y="{y + 20}" font-size="13" font-weight="bold" fill="{text}">'
            f"{title}</text>",
            f'<text x="{x + 10}" y="{y + 37}" font-size="11" fill="{text}">{line}</text>',
        ]
    x, y = BOXES[here][2], BOXES[here][3]
    parts.append(
        f'<text x="{x + WIDE / 2}" y="{y - 6}" font-size="11" text-anchor="middle" '
        f'fill="{HERE}">you are here</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def head_lines(name: str) -> list[str]:
    """The lines of a notebook's head that this script writes."""
    title = BOXES[name][0]
    lines = [f"![Map of the course, with {title} marked](../docs/figures/{figure_of(name)})"]
    if REPOSITORY:
        link = OPEN.format(repository=REPOSITORY, name=f"{name}.ipynb")
        lines.append(f"[![Open in Colab]({BADGE})]({link})")
    return lines


def figure_of(name: str) -> str:
    """File name of a notebook's map."""
    return f"course_{name.split('_')[0]}.svg"


def with_head(source: str, name: str) -> str:
    """A first cell's text with the lines of `head_lines` below its title."""
    title, *rest = source.split("\n")
    marks = ("![Map of the course", "[![Open in Colab")
    kept = [line for line in rest if not line.startswith(marks)]
    while kept and not kept[0]:
        kept.pop(0)
    return "\n".join([title, "", *"\n\n".join(head_lines(name)).split("\n"), "", *kept])


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what is not current")
    asked = parser.parse_args()
    outdated = []
    for name in BOXES:
        figure = FIGURES / figure_of(name)
        notebook = NOTEBOOKS / f"{name}.ipynb"
        if not figure.is_file() or figure.read_text(encoding="utf-8") != course_map(name):
            outdated.append(figure)
            if not asked.check:
                figure.parent.mkdir(parents=True, exist_ok=True)
                figure.write_text(course_map(name), encoding="utf-8")
        page = nbformat.read(notebook, 4)
        if page.cells[0].source != (wanted := with_head(page.cells[0].source, name)):
            outdated.append(notebook)
            page.cells[0].source = wanted
            if not asked.check:
                nbformat.write(page, notebook)
    if asked.check and outdated:
        sys.exit(f"not current: {', '.join(p.name for p in outdated)}; run scripts/heads.py")


if __name__ == "__main__":
    main()
