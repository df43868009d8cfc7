"""A check of one's own data: `spavl data check PATH`."""

import hashlib
from collections import Counter
from pathlib import Path

from spavl_lib.config import DataConfig
from spavl_lib.data.seed_json import MAPS
from spavl_lib.data.spavl import load_preferences, unmatched
from spavl_lib.errors import InputError


def check(path: str) -> dict:
    """Read a data set as a training run would, and describe it.

    Args:
        path: `mini`, a folder in the Hub's layout, or one in the original's.

    Returns:
        Per split: rows, images, rows without class or type, class and type counts, duplicates; and
        the images and prompts that two splits share.

    Raises:
        InputError: Bad rows, all of them listed by file and row.
    """
    folder = Path(path)
    if path == "mini":
        source = "mini"
    elif (folder / MAPS["train"]).is_file():
        source = "seed_json"
    else:
        source = "hub_layout"
    config = DataConfig(
        source=source, path="" if source == "mini" else path,
        image_root=str(folder / "images") if (folder / "images").is_dir() else "",
        train_rows=0, validation_rows=0, test_rows=0,
    )  # fmt: skip
    report: dict = {"source": source, "splits": {}}
    images: dict[str, set[str]] = {}
    prompts: dict[str, set[str]] = {}
    for split in MAPS:
        try:
            rows = load_preferences(config, split)
        except InputError as error:
            if split == "validation" and (
                "missing keyword map" in str(error) or "no validation" in str(error)
            ):
                continue
            raise
        hashes = [
            hashlib.sha256(
                c["bytes"] if c and c["bytes"] else Path(c["path"]).read_bytes() if c else b""
            ).hexdigest()
            for c in rows["image"]
        ]
        images[split], prompts[split] = set(hashes), set(rows["prompt"])
        triples = Counter(zip(hashes, rows["prompt"], strict=True))
        report["splits"][split] = {
            "rows": len(rows),
            "images": len(images[split]),
            **unmatched(rows),
            "duplicates": sum(n - 1 for n in triples.values()),
            "class1": dict(Counter(rows["class1"])),
            "question_type": dict(Counter(rows["question_type"])),
        }
    if len(images) == 2:
        report["shared_images"] = len(images["train"] & images["validation"])
        report["shared_prompts"] = len(prompts["train"] & prompts["validation"])
    return report
