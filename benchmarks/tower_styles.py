"""Does a tower that trains on several drawing styles recognise a style that it never saw?

    python -m benchmarks.tower_styles

The mix leaves out the family Fluent, and the tower is measured on Fluent. Each arm has the same
number of steps and is trained from scratch with two seeds, two arms at a time with one thread each.
`noto` is the control: one style, as long. Twemoji is not read. Writes `results/tower_styles.json`;
an arm that is complete is not trained again.
"""

import argparse
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import common
from spavl_lib.data.embedded import drawings, scenes
from spavl_lib.data.embedded.world import load_world
from spavl_lib.evaluation.statistics import wilson
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.trainers.embedded_base import build_model, build_processor, build_tokenizer
from spavl_lib.trainers.embedded_tower import Recipe, TowerClassifier, pixels_of, train_tower

MIX = ("noto", "noto_v1", "fxemoji", "emojione2", "streamline")
LEFT_OUT = ("fluent_flat", "fluent_grad", "fluent_3d")
ARMS = {
    "noto": Recipe(("noto",), distorted=0),
    "noto, distorted": Recipe(("noto",)),
    "mix": Recipe(MIX, distorted=0),
    "mix, distorted": Recipe(MIX),
    "mix, distorted, AdamW": Recipe(MIX, muon=False),
}
SEEDS = (0, 1)
PER_CONCEPT = 3  # scenes of each drawing when a style is measured


@torch.no_grad()
def recognised(classifier: TowerClassifier, processor, style: str) -> dict:
    """How many drawings of a style are named correctly, in compositions of the development set."""
    rng, right, seen = random.Random(f"tower_styles/{style}"), 0, 0
    concepts = list(load_world().concepts)
    pool = scenes.compositions("development")
    for index, concept in enumerate(concepts):
        if style != "noto" and concept not in drawings.styles()[style].icons:
            continue
        images = [
            scenes.render(concept, rng.choice(pool), rng.choice(scenes.CANVASES), drawing=style)
            for _ in range(PER_CONCEPT)
        ]
        found, _ = classifier(pixels_of(processor, images))
        right += int((found.argmax(-1) == index).sum())
        seen += PER_CONCEPT
    low, high = wilson(right, seen)
    return {"k": right, "n": seen, "value": right / seen, "ci_low": low, "ci_high": high}


def train(name: str, seed: int, steps: int, work: Path) -> dict:
    """Train one arm, and measure it on all styles of the mix and on the family left out."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(0)
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    started = time.process_time()
    classifier, log = train_tower(
        model.model.vision_tower, processor, steps, work, seed, ARMS[name]
    )
    seconds = time.process_time() - started
    last = [row["concepts"] for row in log[-20:]]
    return {
        "recipe": asdict(ARMS[name]), "seed": seed, "steps": steps,
        "cpu_seconds": round(seconds), "training_accuracy": round(sum(last) / len(last), 3),
        "recognised": {s: recognised(classifier, processor, s) for s in (*MIX, *LEFT_OUT)},
    }  # fmt: skip


def main() -> None:
    """Train all arms, two at a time, and write the file."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--steps", type=int, default=800)
    options.add_argument("--work", type=Path, default=Path("runs/.tower_styles"))
    options.add_argument("--results", type=Path, default=common.RESULTS)
    options.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # an arm and a seed
    asked = options.parse_args()

    def place(name: str, seed: int) -> Path:
        return asked.work / f"{name.replace(', ', '_')}_{seed}_{asked.steps}"

    if asked.one:
        name, seed = asked.one[0], int(asked.one[1])
        place(name, seed).mkdir(parents=True, exist_ok=True)
        found = train(name, seed, asked.steps, place(name, seed))
        write_json(place(name, seed) / "found.json", found)
        return
    wanted = [(name, seed) for seed in SEEDS for name in ARMS]
    waiting = [arm for arm in wanted if not (place(*arm) / "found.json").is_file()]
    command = ["benchmarks.tower_styles", "--steps", str(asked.steps), "--work", str(asked.work)]
    common.side_by_side([[*command, "--one", name, str(seed)] for name, seed in waiting], workers=2)
    page: dict = {}
    for name, seed in wanted:
        page.setdefault(name, []).append(read_json(place(name, seed) / "found.json"))
    common.finish("tower_styles", page, results=asked.results)


if __name__ == "__main__":
    main()
