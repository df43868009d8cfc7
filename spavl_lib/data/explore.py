"""The data stage: what the rows are, counted, before anything is trained on them."""

import hashlib
from collections import Counter

from datasets import Dataset

from spavl_lib.config import Config
from spavl_lib.data.images import decode
from spavl_lib.data.spavl import eval_sets, load_preferences, load_prompts, unmatched
from spavl_lib.run import Stage


def image_hashes(rows: Dataset) -> list[str]:
    """sha256 of each row's image file, empty for a text-only row."""
    from pathlib import Path

    hashes = []
    for cell in rows["image"]:
        content = b"" if cell is None else cell["bytes"] or Path(cell["path"]).read_bytes()
        hashes.append(hashlib.sha256(content).hexdigest() if content else "")
    return hashes


def data_sha256(rows: Dataset) -> str:
    """Hash of every row's text and image bytes, in order."""
    digest = hashlib.sha256()
    for row, image in zip(rows.remove_columns("image"), image_hashes(rows), strict=True):
        digest.update("\x1f".join([*(str(row[k]) for k in sorted(row)), image]).encode())
    return digest.hexdigest()


def lengths_in_words(texts: list[str]) -> dict[str, float]:
    """Mean, median and longest, in words."""
    counts = sorted(len(t.split()) for t in texts)
    return {
        "mean": round(sum(counts) / len(counts), 2),
        "median": counts[len(counts) // 2],
        "max": counts[-1],
    }


def describe(rows: Dataset) -> dict:
    """Counts and lengths of a set of preference rows."""
    sizes = Counter(decode(c).size for c in rows["image"][:200] if c is not None)
    longer = sum(
        len(c.split()) > len(r.split())
        for c, r in zip(rows["chosen"], rows["rejected"], strict=True)
    )
    return {
        "rows": len(rows),
        "images": len(set(image_hashes(rows))),
        **unmatched(rows),
        "class1": dict(Counter(rows["class1"])),
        "class3": dict(Counter(rows["class3"])),
        "question_type": dict(Counter(rows["question_type"])),
        "chosen_words": lengths_in_words(rows["chosen"]),
        "rejected_words": lengths_in_words(rows["rejected"]),
        "chosen_longer_share": round(longer / len(rows), 4),
        "image_sizes_px": {f"{w}x{h}": n for (w, h), n in sizes.most_common(8)},
        "sha256": data_sha256(rows),
    }


def leakage(sets: dict[str, Dataset]) -> dict[str, dict[str, int]]:
    """Images and prompts that the training rows share with each other set; all 0 if none leak."""
    images, prompts = set(image_hashes(sets["train"])), set(sets["train"]["prompt"])
    return {
        name: {
            "images": len(images & set(image_hashes(rows))),
            "prompts": len(prompts & set(rows["prompt"])),
        }
        for name, rows in sets.items()
        if name != "train"
    }


def make_data_stage(config: Config, stage: Stage) -> dict:
    """Load every set, describe it, and look for leaks.

    Returns:
        The summary.
    """
    if stage.done:
        stage.check_config()
        return stage.summary
    with stage.work():
        sets = {split: load_preferences(config.data, split) for split in ("train", "validation")}
        summary: dict = {name: describe(rows) for name, rows in sets.items()}
        for name in eval_sets(config.data, held_out_drawings=False):
            if name != "twins_exchanged":
                sets[name] = load_prompts(config.data, name)
        summary["evaluation_sets"] = {
            name: len(rows) for name, rows in sets.items() if name not in ("train", "validation")
        }
        summary["shared_with_train"] = leakage(sets)
    stage.finish(summary)
    return summary
