"""The files of SPA-VL mini, in the Hub's layout: rows as parquet, meta files, and the card."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import datasets
from datasets import Dataset, Features, Image, Value

from spavl_lib.data.embedded import drawings, language, mini, scenes, world
from spavl_lib.data.embedded.world import QUESTION_TYPES
from spavl_lib.data.set_names import CHOSEN_ON, UNSEEN
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.runs.paths import cache_root

CARD = world.ASSETS / "mini_card.md"  # the data set's card; `write_mini` lists the test files
TRUTH = "truth.json"  # name of the file with the ground-truth labels of every row
DEVELOPMENT = "development"  # folder of a second set of held-out rows, in the same layout


def _columns(rows: list[mini.Row], kind: str, drawing: str = "") -> Dataset:
    """Rows with the columns of the real set. `drawing` replaces the style of each scene."""
    images: dict[str, bytes] = {}
    for row in rows:
        if row.scene.image_name not in images:
            images[row.scene.image_name] = row.scene.png(drawing)
    table: dict[str, list] = {
        "image": [{"bytes": images[r.scene.image_name], "path": r.scene.image_name} for r in rows],
        "question": [r.request.question for r in rows],
    }
    if kind in ("train", "validation"):
        table["chosen"] = [r.chosen for r in rows]
        table["rejected"] = [r.rejected for r in rows]
    if kind == "train":
        table["image_name"] = [r.scene.image_name for r in rows]
    else:
        for level in (1, 2, 3):
            table[f"class{level}"] = [
                r.request.class3 if level == 3 else PARENTS[r.request.class3][level - 1]
                for r in rows
            ]
    kinds = {k: Image() if k == "image" else Value("string") for k in table}
    return Dataset.from_dict(table, features=Features(kinds))


def _key() -> str:
    """A hash of everything that the built files depend on."""
    digest = hashlib.sha256()
    code = [
        *(str(module.__file__) for module in (scenes, drawings, language, mini, world)),
        __file__,
    ]
    pictures = sorted(world.ASSETS.glob("*/*.png"))
    for path in (world.ASSETS / "world.yaml", drawings.PAGE, CARD, *map(Path, code), *pictures):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def mini_folder() -> Path:
    """The data set's folder, in the Hub's layout. It is built on first use, in a few seconds."""
    target = cache_root() / f"spa-vl-mini-{_key()}"
    if not target.is_dir():
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_mini(unfinished)
        try:
            unfinished.rename(target)
        except OSError:  # another process built it first
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def write_mini(folder: Path) -> None:
    """Write the parquet files, the meta files and the data set's card into `folder`."""
    datasets.disable_progress_bars()
    rows = mini.mini_rows()
    files = {
        "data/train": ("train", rows["train"], ""),
        "validation/validation": ("validation", rows["validation"], ""),
        "validation/twins": ("validation", rows["twins"], ""),
    }
    for name in mini.TEST_SETS:
        files[f"test/{name}"] = ("test", rows[name], "")
        files[f"test_{UNSEEN}/{name}"] = ("test", rows[name], UNSEEN)
    chosen_on = mini.development_rows()
    for name in ("validation", "twins"):
        files[f"{DEVELOPMENT}/validation/{name}"] = ("validation", chosen_on[name], "")
    for name in mini.TEST_SETS:
        files[f"{DEVELOPMENT}/test/{name}"] = ("test", chosen_on[name], "")
        unseen = f"{DEVELOPMENT}/test_{CHOSEN_ON}/{name}"
        files[unseen] = ("test", chosen_on[name], CHOSEN_ON)
    for stem, (kind, part, drawing) in files.items():
        path = folder / f"{stem}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        _columns(part, kind, drawing).to_parquet(path)
    _write_meta(folder / "meta_files", rows)
    labels = json.dumps(_truth(chosen_on), ensure_ascii=False)
    (folder / DEVELOPMENT / "meta_files").mkdir()
    (folder / DEVELOPMENT / "meta_files" / TRUTH).write_text(labels, encoding="utf-8")
    files_of = "".join(f"  - {{split: {name}, path: FOLDER/{name}-*}}\n" for name in mini.TEST_SETS)
    card = CARD.read_text(encoding="utf-8").replace(
        "TEST_FILES", files_of.replace("FOLDER", "test")
    )
    card = card.replace("TWEMOJI_FILES", files_of.replace("FOLDER", "test_twemoji"))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_meta(folder: Path, rows: dict[str, list[mini.Row]]) -> None:
    def write(name: str, value: object) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    info = {}
    for row in rows["train"]:
        width, height = row.scene.canvas
        class1, class2 = PARENTS[row.request.class3]
        info[row.scene.image_name] = {
            "image": row.scene.image_name, "width": width, "height": height,
            "class1": class1, "class2": class2, "class3": row.request.class3,
        }  # fmt: skip
    write("image_info/meta.json", list(info.values()))
    for question_type in QUESTION_TYPES:
        part = [r for r in rows["train"] if r.request.question_type == question_type]
        write(
            f"split/{question_type}.json",
            [
                {"image": r.scene.image_name, "question": r.request.question,
                 "chosen": r.chosen, "rejected": r.rejected}
                for r in part
            ],
        )  # fmt: skip
    for style in mini.ANSWERERS:
        rng = random.Random(f"{mini.SEED}/{style}")
        answers = [(r, text) for r in rows["train"] if (text := _answer_of(style, r, rng))]
        write(
            f"model_answer/{style}.json",
            [
                {"image": r.scene.image_name, "question": r.request.question, "answer": a}
                for r, a in answers
            ],
        )
        unsafe = [r.request.harmful and language.verdict(a) == "complied" for r, a in answers]
        write(f"safety/{style}.json", ["unsafe" if u else "safe" for u in unsafe])
    write(TRUTH, _truth(rows))


def _truth(rows: dict[str, list[mini.Row]]) -> dict[str, dict]:
    """mini.Row id -> the request's labels, its pair of twins, and how the image was drawn."""
    return {
        f"{name}/{i}": row.request.to_dict()
        | {
            "pair": row.pair,
            "drawing": row.scene.drawing,
            "new_pair": row.scene.drawing in drawings.only_in_test(row.scene.concept),
        }
        for name, part in rows.items()
        for i, row in enumerate(part)
    }


def _answer_of(style: str, row: mini.Row, rng: random.Random) -> str:
    """The response of one of `mini.ANSWERERS` to a row's question; empty if there is none.

    If `style` gave the row's chosen or rejected response, the result is that response. `blind`,
    `naive` and `wrong` have no other responses.
    """
    if style == "careful":
        return row.chosen
    if style == row.rejected_by:
        return row.rejected
    return language.answer(row.request, style, rng) if style in language.STYLES else ""
