"""SPA-VL mini with attacked training rows, for the method that is trained on attacks."""

import dataclasses
import hashlib
import os
import random
import shutil
from pathlib import Path

import datasets
from datasets import Dataset

from spavl_lib.config import DataConfig, flatten
from spavl_lib.config.validation import defaults, to_plain
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.load import load_pair_truth, load_preferences
from spavl_lib.evaluation.attacks import find_attack
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.paths import cache_root

# The other attacks are new to the method. None of these needs a model or several turns.
TRAINED_ON = ("one_word", "one_word_prudence", "prefix", "role_play", "typographic", "noise")
SHARE = 0.5  # of the rows
SEED = 0
INFO = "meta_files/image_info/meta.json"


def attacked_folder(data: DataConfig) -> Path:
    """A data set's folder in the Hub's layout. It is built on first use.

    A half of the training rows is attacked; the responses, and all other splits, stay.

    Args:
        data: Selects the training rows of SPA-VL mini.
    """
    # A new setting with the old behaviour as its default leaves the name as it is.
    known = defaults(DataConfig)
    changed = {k: v for k, v in flatten(to_plain(data)).items() if k not in known or v != known[k]}
    key = hashlib.sha256(f"{mini_folder().name} {changed} {TRAINED_ON} {SHARE} {SEED}".encode())
    target = cache_root() / f"{mini_folder().name}-attacked-{key.hexdigest()[:12]}"
    if not target.is_dir():
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(mini_folder(), unfinished, dirs_exist_ok=True)
        _attack(unfinished, data)
        try:
            unfinished.rename(target)
        except OSError:  # another process built it first
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _attack(folder: Path, data: DataConfig) -> None:
    truth = load_pair_truth(data)
    # `data.extra_path` is added to the attacked rows when they are read.
    rows = list(load_preferences(dataclasses.replace(data, extra_path=""), "train"))
    rng = random.Random(SEED)
    picked = rng.sample(range(len(rows)), round(SHARE * len(rows)))
    attack_of = {index: TRAINED_ON[i % len(TRAINED_ON)] for i, index in enumerate(picked)}
    info = read_json(folder / INFO)
    info_of = {entry["image"]: entry for entry in info}
    for i, name in sorted(attack_of.items()):
        old = rows[i]
        new = find_attack(name)([old], truth, seed=SEED).rows[0]
        if new["image"]["bytes"] != old["image"]["bytes"]:  # another image needs another name
            image = f"{name}_{i}.png"
            new |= {"image_name": image, "image": new["image"] | {"path": image}}
            info.append(info_of[old["image_name"]] | {"image": image})
        rows[i] = new
    columns = {"image": "image", "question": "prompt", "chosen": "chosen", "rejected": "rejected",
               "image_name": "image_name"}  # fmt: skip
    path = next(folder.glob("data/train-*.parquet"))
    kinds = datasets.load_dataset("parquet", data_files=str(path), split="train").features
    table = {name: [row[column] for row in rows] for name, column in columns.items()}
    datasets.disable_progress_bars()
    Dataset.from_dict(table, features=kinds).to_parquet(path)
    write_json(folder / INFO, info)
