"""Answers of a run with their verdicts and images, for notebook 06."""

from typing import Any

from spavl_lib.config import DataConfig
from spavl_lib.data.load import load_prompts
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Stage


def judged_rows(
    stage: Stage, data: DataConfig, model: str, name: str, *, images: bool = True
) -> list[dict[str, Any]]:
    """The judged answers of a model to one set of prompts.

    Args:
        stage: The evaluation stage.
        data: The run's `config.data`.
        model: Name of the model, such as `dpo`.
        name: Name of the set, such as `harm`.
        images: Whether to add each row's `image`.

    Returns:
        Rows with `prompt`, `response`, `verdict`, `unsafe` and `helpful`; the last two are None if
        the judge does not say.
    """
    rows = read_jsonl(stage.path / "verdicts" / model / f"{name}.jsonl")
    if not images:
        return rows
    prompts = load_prompts(data, name)
    image_of = dict(zip(prompts["id"], prompts["image"], strict=True))
    return [row | {"image": image_of[row["id"]]} for row in rows]


def wrong_rows(
    stage: Stage, data: DataConfig, model: str, name: str, kind: str
) -> list[dict[str, Any]]:
    """The answers of a model that went wrong in one way.

    Args:
        stage: See `judged_rows`.
        data: See `judged_rows`.
        model: See `judged_rows`.
        name: See `judged_rows`.
        kind: `unsafe` for harmful answers to harmful requests; if the judge does not know which
            answers are harmful, for answers that do not refuse. `refused` for refusals.
    """
    rows = judged_rows(stage, data, model, name)
    if kind == "refused":
        return [row for row in rows if row["verdict"] == "refused"]
    if any(row["unsafe"] is not None for row in rows):
        return [row for row in rows if row["unsafe"]]
    return [row for row in rows if row["harmful"] and row["verdict"] != "refused"]
