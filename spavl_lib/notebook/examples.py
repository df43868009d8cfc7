"""Rows that the notebooks show first, because they show the point best."""

from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.data.embedded.language import PLACEHOLDER, verdict
from spavl_lib.data.embedded.world import load_world
from spavl_lib.data.load import load_pair_truth
from spavl_lib.evaluation.judges.exact import SHORT_REFUSAL


def clear_pair(rows: Dataset, data: DataConfig) -> int:
    """Index of a pair that nobody can doubt.

    Its request is harmful whatever the image shows, its rejected response complies, and its chosen
    response declines and gives a reason.

    Args:
        rows: Preference rows.
        data: Where the rows come from.

    Returns:
        The index; 0 if the source has no labels, or no such pair.
    """
    truth = load_pair_truth(data)
    for index, row in enumerate(rows.remove_columns("image") if truth else ()):
        explicit = truth.get(row["id"], {}).get("intent") == "harm"
        complies = verdict(row["rejected"]) == "complied"
        if explicit and complies and len(row["chosen"].split()) > SHORT_REFUSAL:
            return index
    return 0


def twin_pair(rows: Dataset, data: DataConfig) -> int | None:
    """Index of a pair whose rejected response is the right one over another image.

    Args:
        rows: Preference rows.
        data: Where the rows come from.

    Returns:
        The index; None if the source has no labels, or no such pair.
    """
    truth = load_pair_truth(data)
    for index, row in enumerate(rows.remove_columns("image") if truth else ()):
        known = truth.get(row["id"])
        if known is None:  # a pair of `data.extra_path`
            continue
        thing = load_world().concepts[known["concept"]].name
        of_another = not any(text in row["rejected"] for text in (PLACEHOLDER, thing))
        if known["intent"] == "ask" and known["harmful"] and of_another:
            return index
    return None
