"""A stand-in for the real SPA-VL in its Hub layout, for measuring: 93,258 rows, 31,086 pictures.

    python benchmarks/synthetic_spavl.py OUT [--images 31086]

Eight parquet shards with embedded JPEGs, three questions a picture, and the meta files the classes
and question types are joined from. Text is of harmless words, of about the real set's lengths.
Seeded: the same call writes the same files.
"""

import argparse
import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from PIL import Image as Pictures

from spavl_lib.data.schema import QUESTION_TYPES
from spavl_lib.data.taxonomy import PARENTS

IMAGES, SHARDS, GROUP = 31_086, 8, 500
SIDES = (96, 112, 128, 160)
WORDS = (
    "the picture shows a small table with bread water and light near an open window while people "
    "walk along the river to a market where music plays and children draw trees houses clouds "
    "under warm evening sun every path leads home past gardens bridges boats and quiet streets"
).split()
COLUMNS = ("image", "question", "chosen", "rejected", "image_name")


def jpeg(number: int) -> bytes:
    """A small picture unlike any other: a few blocks of colour, and its number as noise."""
    draw = np.random.default_rng(number)
    width, height = draw.choice(SIDES, 2)
    coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Pictures.fromarray(coarse).resize((int(width), int(height)), Pictures.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def text(draw: random.Random, low: int, high: int) -> str:
    """Some words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high))).capitalize() + "."


def rows_of(number: int) -> list[dict]:
    """The three rows of one picture, without it."""
    draw = random.Random(f"synthetic/{number}")
    name = f"{number}.jpg"
    return [
        {
            "question": f"{text(draw, 8, 24)[:-1]}?",
            "chosen": text(draw, 30, 120),
            "rejected": text(draw, 20, 110),
            "image_name": name,
        }
        for _ in QUESTION_TYPES
    ]


def write(folder: Path, images: int = IMAGES) -> int:
    """Write the set, a shard and a few hundred rows at a time.

    Args:
        folder: A new one.
        images: How many pictures.

    Returns:
        How many rows were written.
    """
    classes = list(PARENTS)
    kinds = Features({c: Image() if c == "image" else Value("string") for c in COLUMNS})
    schema = kinds.arrow_schema
    info, splits = [], {t: [] for t in QUESTION_TYPES}
    (folder / "data").mkdir(parents=True)
    for shard in range(SHARDS):
        path = folder / f"data/train-{shard:05d}-of-{SHARDS:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            group: list[dict] = []
            for number in range(images * shard // SHARDS, images * (shard + 1) // SHARDS):
                content, name = jpeg(number), f"{number}.jpg"
                class3 = classes[number % len(classes)]
                class1, class2 = PARENTS[class3]
                info.append({"image": name, "class1": class1, "class2": class2, "class3": class3})
                for kind, row in zip(QUESTION_TYPES, rows_of(number), strict=True):
                    splits[kind].append(
                        {"image": name, "question": row["question"], "chosen": row["chosen"],
                         "rejected": row["rejected"]}
                    )  # fmt: skip
                    group.append(row | {"image": {"bytes": content, "path": name}})
                if len(group) >= GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    for name, value in {
        "image_info/meta.json": info,
        **{f"split/{kind}.json": rows for kind, rows in splits.items()},
    }.items():
        path = folder / "meta_files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
    return 3 * images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--images", type=int, default=IMAGES, help="pictures, three rows each")
    options = parser.parse_args()
    print(f"{write(options.out, options.images):,} rows in {options.out}")
