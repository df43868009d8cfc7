"""The data stage: describe the rows before a model is trained on them."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from datasets import Dataset
from transformers import ProcessorMixin

from spavl_lib.config import Config
from spavl_lib.data.duplicates import image_hashes, looks, near_groups, plain_words, repeated
from spavl_lib.data.fingerprint import source_hashes
from spavl_lib.data.lengths import pair_lengths
from spavl_lib.data.load import eval_sets, load_prompts, read_preferences
from spavl_lib.data.problems import Loaded
from spavl_lib.data.schema import column
from spavl_lib.data.sources.join import unmatched, unmatched_rows
from spavl_lib.data.taxonomy import classes
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.stage import Stage

LISTED = 1_000  # largest number of problems that a report lists; the counts include all problems


def data_sha256(rows: Dataset) -> str:
    """Hash of every row's text and image bytes, in order."""
    digest = hashlib.sha256()
    for row, image in zip(rows.remove_columns("image"), image_hashes(rows), strict=True):
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
        sequences that are too long; and the problems.
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
        "images": len(set(hashes) - {""}),
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
        "image_in_text": len(marked),
    }
    report |= length_bias(rows)
    if processor is not None:
        report["tokens"], too_long = tokens(processor, rows, longest)
        problems += too_long
    report["problem_count"], report["problems"] = len(problems), problems[:LISTED]
    return report


def tokens(processor: ProcessorMixin, rows: Dataset, longest: int) -> tuple[dict, list[str]]:
    """Summary of the lengths of all sequences in tokens, and a line for each too long sequence.

    Args:
        processor: The model's processor.
        rows: Preference rows.
        longest: Largest number of tokens of a sequence; 0 means no limit.
    """
    lengths: list[int] = []
    too_long = []
    for name, *sizes in pair_lengths(processor, rows):
        lengths += sizes
        for side, size in zip(("chosen", "rejected"), sizes, strict=True):
            if longest and size > longest:
                too_long.append(f"{name} {side}: {size} tokens, more than {longest}")
    return summary_of(lengths) | {"over": len(too_long)}, too_long


def summary_of(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {"median": 0, "p95": 0, "max": 0}
    return {
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
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


def set_keys(rows: Dataset) -> tuple[set[str], set[str]]:
    """Hashes of a set's images, and the words of its questions."""
    return set(image_hashes(rows)) - {""}, set(map(plain_words, column(rows, "prompt")))


def shared(keys: dict[str, tuple[set[str], set[str]]]) -> dict[str, dict[str, int]]:
    """Numbers of images and questions that every other set has in common with the training rows.

    Args:
        keys: Set name -> `set_keys` of its rows.
    """
    train = keys.get("train", (set(), set()))
    return {
        name: {"images": len(images & train[0]), "prompts": len(prompts & train[1])}
        for name, (images, prompts) in keys.items()
        if name != "train"
    }


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    return source_hashes(config.data, ("train", "validation"))


@stage_maker("data", inputs=_inputs)
def make_data_stage(config: Config, stage: Stage) -> dict:
    """Describe the training and validation rows, and count what each set shares with training rows.

    Args:
        config: The run's config.
        stage: The data stage.

    Returns:
        The summary: descriptions of `train` and `validation`, sizes of the evaluation sets, and
        `shared_with_train`.
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
    summary["shared_with_train"] = shared({n: set_keys(rows) for n, rows in sets.items()})
    return summary
