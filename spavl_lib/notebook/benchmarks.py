"""The published benchmarks of a run, which lesson 06 asks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spavl_lib.config import Config
from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmark_runs.evaluate import Options, evaluate
from spavl_lib.evaluation.benchmark_runs.subject import Subject, find_subject
from spavl_lib.evaluation.benchmarks import load_benchmark
from spavl_lib.runs.stage import has_model
from spavl_lib.runs.text import say

SHORT_SFT = Path("dpo", "variants", "sft_alone", "dpo")  # a training of lesson 04, in the run


def ask_benchmarks(config: Config, run: Path, models: Sequence[str]) -> dict[str, Any] | None:
    """Ask models of a run the rows that `evaluation.benchmarks` names, and print the rates.

    Answers are kept in `benchmarks/` of the run, so a second call asks only what is new.

    Args:
        config: The run's config.
        run: The run's folder.
        models: Names of the stages whose models are asked, besides the base and lesson 04's short
            supervised fine-tuning.

    Returns:
        As `evaluate`; None if nothing can be asked. Which benchmarks were left out, and why, is
        printed.
    """
    folders = {name: run / name for name in models} | {"sft_short": run / SHORT_SFT}
    settings, at_hand = config.evaluation, []
    for spec in settings.benchmarks:
        try:
            load_benchmark(spec, keep_missing=True)
            at_hand.append(spec)
        except InputError as error:
            say(f"{spec} is left out: {error}")
    if not at_hand:
        return None
    try:
        subjects = [Subject("base", config.model.name, "model", model=config.model)]
        subjects += [find_subject(f"{n}={path}") for n, path in folders.items() if has_model(path)]
        options = Options(
            limit=settings.benchmark_rows, generation=config.generation, set_tokens=True
        )
        return evaluate(subjects, at_hand, (), run / "benchmarks", options)
    except InputError as error:  # such as answers of a model that was trained again since
        say(str(error))
        return None
