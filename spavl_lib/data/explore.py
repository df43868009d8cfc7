"""The data stage: describe the rows before a model is trained on them."""

import hashlib
import heapq
import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from datasets import Dataset
from transformers import ProcessorMixin

from spavl_lib.config import Config
from spavl_lib.data.duplicates import image_hashes, looks, near_groups, plain_words, repeated
from spavl_lib.data.fingerprint import source_hashes
from spavl_lib.data.lengths import joined_answers, pair_lengths
from spavl_lib.data.load import eval_sets, load_prompts, prompt_origin, read_preferences
from spavl_lib.data.problems import Loaded
from spavl_lib.data.schema import column, image_columns
from spavl_lib.data.sources.join import unmatched, unmatched_rows
from spavl_lib.data.taxonomy import classes
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.stage import Stage

LISTED = 1_000  # largest number of problems that a report lists; the counts include all problems


def data_sha256(rows: Dataset) -> str:
    """Hash of every row's text and image bytes, in order."""
    digest = hashlib.sha256()
    texts = rows.remove_columns(image_columns(rows))
    for row, image in zip(texts, image_hashes(rows), strict=True):
        digest.update("\x1f".join([*(str(row[k]) for k in sorted(row)), image]).encode())
    return digest.hexdigest()


def describe(loaded: Loaded, processor: ProcessorMixin | None = None, longest: int = 0) -> dict:
    """Describe one split.

    Args:
        loaded: The good rows, and the problems of the rows that were left out.
        processor: Counts tokens. None skips this count.
        longest: Largest number of tokens of a sequence; 0 means no limit.

    Returns:
        Numbers of rows, images, classes and question types; rows without class or type; equal and
        nearly equal rows; sizes of images; lengths in words; lengths in tokens, with the number of
        sequences that are too long; the problems; and notes about the whole set.
    """
    rows = loaded.rows
    problems = list(loaded.skipped)
    hashes = image_hashes(rows)
    prompts, chosen, rejected = (column(rows, c) for c in ("prompt", "chosen", "rejected"))
    looks_of = looks(rows)
    groups = near_groups(dhash for dhash, _ in looks_of.values())
    words = list(map(plain_words, prompts))
    sizes = Counter(f"{w}x{h}" for _, (w, h) in looks_of.values())
    marked = [i for i, p in enumerate(prompts) if "<image>" in p]
    report = {
        "rows": len(rows),
        "images": len({image for key in hashes for image in key.split("+")} - {""}),
        "text_only": hashes.count(""),
        **unmatched(rows),
        "unmatched": {k: v[:LISTED] for k, v in unmatched_rows(rows).items()},
        "duplicates": repeated(zip(hashes, prompts, strict=True)),
        "duplicate_rows": repeated(zip(hashes, prompts, chosen, rejected, strict=True)),
        "near_duplicates": {
            "pictures": sum(map(len, groups)) - len(groups),
            "questions": repeated(zip(hashes, words, strict=True)),
        },
        "class1": dict(Counter(column(rows, "class1"))),
        "class2": dict(Counter(column(rows, "class2"))),
        "class3": dict(Counter(column(rows, "class3"))),
        "question_type": dict(Counter(column(rows, "question_type"))),
        "balance": balance(column(rows, "class3")),
        "image_sizes": dict(sizes.most_common(12)),
        "largest_image": _size(looks_of, key=lambda size: size[0] * size[1]),
        "narrowest_image": _size(looks_of, key=lambda size: max(size) / min(size)),
        "image_in_text": len(marked),
    }
    report |= length_bias(rows)
    if processor is not None:
        report["tokens"], too_long = tokens(processor, rows, longest)
        problems += too_long
    report["problem_count"], report["problems"] = len(problems), problems[:LISTED]
    without = ("no row has an image, so nothing about images is learnt",) if not any(hashes) else ()
    report["notes"] = [*loaded.notes, *without]
    return report


def _size(looks_of: dict, key: Callable[[tuple[int, int]], float]) -> str:
    """Width and height of the image for which `key` is largest; empty without images."""
    size = max((size for _, size in looks_of.values()), key=key, default=None)
    return f"{size[0]}x{size[1]}" if size else ""


def tokens(processor: ProcessorMixin, rows: Dataset, longest: int) -> tuple[dict, list[str]]:
    """Summary of the lengths of all sequences in tokens, and a line for each unfit sequence.

    Args:
        processor: The model's processor.
        rows: Preference rows.
        longest: Largest number of tokens of a sequence; 0 means no limit.
    """
    sides = ("chosen", "rejected")
    lengths = [
        (size, f"{name} {side}")
        for name, *sizes in pair_lengths(processor, rows)
        for side, size in zip(sides, sizes, strict=True)
    ]
    too_long = [
        f"{where}: {size} tokens, more than {longest}"
        for size, where in lengths
        if longest and size > longest
    ]
    joined = [f"{name}{line}" for name, line in joined_answers(processor, rows, sides)]
    summary: dict = summary_of([size for size, _ in lengths]) | {"over": len(too_long)}
    summary["longest_rows"] = {where: size for size, where in heapq.nlargest(5, lengths)}
    return summary, [*too_long, *joined]


def summary_of(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum.

    The 95th percentile is the smallest value that at least 95 % of the values do not exceed.
    """
    ordered = sorted(values)
    if not ordered:
        return {"median": 0, "p95": 0, "max": 0}
    return {
        "median": statistics.median(ordered),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],
        "max": ordered[-1],
    }


def balance(class3: Sequence[str]) -> dict:
    """How evenly the rows are spread over the tertiary classes.

    Args:
        class3: The class of every row; empty if unknown.

    Returns:
        `present` and `absent`: numbers of classes. `smallest` and `largest`: a class and its number
        of rows. `evenness`: the entropy of the present classes divided by its largest possible
        value, which is 1 if all of them have equally many rows.
    """
    counts = Counter(c for c in class3 if c)
    if not counts:
        return {"present": 0, "absent": len(classes(3))}
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    ordered = counts.most_common()
    return {
        "present": len(counts),
        "absent": len(set(classes(3)) - counts.keys()),
        "smallest": list(ordered[-1]),
        "largest": list(ordered[0]),
        "evenness": round(entropy / math.log(len(counts)), 4) if len(counts) > 1 else 1.0,
    }


def length_bias(rows: Dataset) -> dict:
    """Lengths in words of chosen and rejected responses, overall, by class and by question type.

    Returns:
        - `chosen_words` and `rejected_words`: mean, median, 95th percentile and maximum.
        - `chosen_longer_share`: share of pairs whose chosen response is longer.
        - `lengths`: column -> value -> number of rows, both medians, and the share of pairs whose
          chosen response is longer.
    """
    lengths = [[len((t or "").split()) for t in column(rows, c)] for c in ("chosen", "rejected")]
    pairs = list(zip(*lengths, strict=True))
    by: dict[str, dict] = {}
    for name in ("class1", "question_type"):
        groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for value, pair in zip(column(rows, name), pairs, strict=True):
            groups[value or "unknown"].append(pair)
        by[name] = {value: _lengths_of(group) for value, group in sorted(groups.items())}
    whole = _lengths_of(pairs)
    return {
        "chosen_words": _words(lengths[0]),
        "rejected_words": _words(lengths[1]),
        "chosen_longer_share": whole["chosen_longer_share"],
        "lengths": by,
    }


def _lengths_of(pairs: list[tuple[int, int]]) -> dict:
    longer = sum(c > r for c, r in pairs)
    return {
        "rows": len(pairs),
        "chosen_median": _words([c for c, _ in pairs])["median"],
        "rejected_median": _words([r for _, r in pairs])["median"],
        "chosen_longer_share": round(longer / len(pairs), 4) if pairs else None,
    }


def _words(counts: list[int]) -> dict[str, float]:
    mean = round(sum(counts) / len(counts), 2) if counts else 0.0
    return {"mean": mean} | summary_of(counts)


class SetKeys(NamedTuple):
    """What rows of two sets can have in common."""

    images: set[str]
    """Hashes of the images."""
    prompts: set[str]
    """Words of the questions."""
    rows: dict[str, tuple[str, str]]
    """Row id -> its image's hash and its question's words, which together make a row a copy."""


NO_KEYS = SetKeys(set(), set(), {})


def set_keys(rows: Dataset) -> SetKeys:
    """The keys of a set's images, questions and rows."""
    hashes, words = image_hashes(rows), list(map(plain_words, column(rows, "prompt")))
    ids = column(rows, "id")
    pairs = zip(hashes, words, strict=True)
    images = {image for key in hashes for image in key.split("+")} - {""}
    return SetKeys(images, set(words), dict(zip(ids, pairs, strict=True)))


def copies(keys: Mapping[str, SetKeys]) -> dict[str, list[str]]:
    """Set -> ids of its rows that repeat image and question of a training row; without empty lists.

    Such rows measure what a model has learnt by heart.

    Args:
        keys: Set name -> `set_keys` of its rows.
    """
    trained = set(keys.get("train", NO_KEYS).rows.values())
    found = {
        name: [row_id for row_id, key in of_set.rows.items() if key in trained]
        for name, of_set in keys.items()
        if name != "train"
    }
    return {name: ids for name, ids in found.items() if ids}


def copies_sentence(name: str, ids: Sequence[str]) -> str:
    """The problem of a set some of whose rows are copies of training rows.

    Args:
        name: The set.
        ids: Ids of these rows.
    """
    listed = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
    return (
        f"{name}: {len(ids)} row{'s' if len(ids) > 1 else ''} with image and question of a "
        f"training row ({listed}); remove them from one of the two sets, or the result says "
        "nothing about new rows"
    )


def shared(keys: Mapping[str, SetKeys]) -> dict[str, dict[str, int]]:
    """Numbers of images and questions that each other set has in common with the training rows.

    Args:
        keys: Set name -> `set_keys` of its rows.
    """
    train = keys.get("train", NO_KEYS)
    return {
        name: {
            "images": len(of_set.images & train.images),
            "prompts": len(of_set.prompts & train.prompts),
        }
        for name, of_set in keys.items()
        if name != "train"
    }


def shared_between(keys: Mapping[str, SetKeys]) -> dict[str, dict[str, int]]:
    """As `shared`, for every pair of the other sets, under names such as `validation and harm`.

    Args:
        keys: Set name -> `set_keys` of its rows.
    """
    names = [name for name in keys if name != "train"]
    return {
        f"{one} and {other}": {
            "images": len(keys[one].images & keys[other].images),
            "prompts": len(keys[one].prompts & keys[other].prompts),
        }
        for one, other in itertools.combinations(names, 2)
    }


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    names = eval_sets(config.data, held_out_drawings=False)
    return source_hashes(config.data, ("train", "validation", *names))


@stage_maker("data", inputs=_inputs)
def make_data_stage(config: Config, stage: Stage) -> dict:
    """Describe the training and validation rows, and count what each set shares with training rows.

    Args:
        config: The run's config.
        stage: The data stage.

    Returns:
        The summary: descriptions of `train` and `validation`, sizes of the evaluation sets, the
        origin of their prompts, `shared_with_train` and `shared_between`; and `copies_of_train`,
        the number of copies of training rows in each set, if there are any.
    """
    loaded = {split: read_preferences(config.data, split) for split in ("train", "validation")}
    summary: dict = {
        name: describe(part) | {"sha256": data_sha256(part.rows)} for name, part in loaded.items()
    }
    sets = {name: part.rows for name, part in loaded.items()}
    for name in eval_sets(config.data, held_out_drawings=False):
        if name != "twins_exchanged":
            sets[name] = load_prompts(config.data, name)
    summary["evaluation_sets"] = {
        name: len(rows) for name, rows in sets.items() if name not in ("train", "validation")
    }
    summary["prompts"] = prompt_origin(config.data)
    keys = {name: set_keys(rows) for name, rows in sets.items()}
    summary["shared_with_train"], summary["shared_between"] = shared(keys), shared_between(keys)
    if copied := copies(keys):
        summary["copies_of_train"] = {name: len(ids) for name, ids in copied.items()}
    return summary
