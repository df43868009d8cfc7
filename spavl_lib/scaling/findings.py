"""The results of all arms as one table, and a comparison with the paper's numbers."""

from spavl_lib.config import Config
from spavl_lib.evaluation.numbers import SCALING_RATES, read_rate
from spavl_lib.evaluation.rates import pool
from spavl_lib.scaling.arms import Arm

# The paper's numbers for LLaVA-1.5-7B after DPO, in percent. They come from secondary copies of the
# paper's tables, because the full text was not available. Compare the shape, not the values.
PAPER = {
    "source": "SPA-VL, arXiv 2406.12030, HarmEval unsafe rate (USR), percent, lower is better",
    "base": {"harm_eval": 44.15, "where": "Table 2"},
    "size": [
        {"pairs": 100, "harm_eval": 43.40, "help_score": 51.0, "where": "Fig. 3 and its table"},
        {"pairs": 1_000, "harm_eval": 26.04, "help_score": 58.5, "where": "Fig. 3 and its table"},
        {"pairs": 10_000, "harm_eval": 0.38, "help_score": 63.0, "where": "Fig. 3 and its table"},
        {"pairs": 30_000, "harm_eval": 0.00, "help_score": None, "where": "Table 2"},
        {"pairs": 90_000, "harm_eval": 0.75, "help_score": 70.0, "where": "Fig. 3 and its table"},
    ],
    "projector": [
        {"arm": "trained", "harm_eval": 0.00, "where": "Table 6"},
        {"arm": "frozen", "harm_eval": 1.13, "where": "Table 6"},
    ],
    "answers": "AdvBench suffix attack success rate: about 65 % with the answers of the group of "
    "safe models alone, 6.54 % (34/520) with the answers of all models (Table 4)",
    "questions": "mixed is best on every safety column (Table 5); its numbers were not found",
    "rank": "no numbers found",
}


def gather(config: Config, arms: list[Arm], results: dict[str, dict], base: dict) -> dict:
    """The scaling stage's summary: one row for each arm, pooled over its seeds.

    Args:
        config: The run's config.
        arms: All arms of all seeds.
        results: Arm key -> the summary that `run_arm` returned.
        base: The base model's rates.
    """
    rows, learning_rates = [], {(a.family, a.name): a.config.dpo.learning_rate for a in arms}
    for family, name in learning_rates:
        seeds = [results[a.key] for a in arms if (a.family, a.name) == (family, name)]
        row = {
            "family": family,
            "arm": name,
            "pairs": seeds[0]["rows"],
            "steps": seeds[0]["steps"],
            "epochs": seeds[0]["epochs"],
            "learning_rate": learning_rates[family, name],
            "trainable_parameters": seeds[0]["trainable_parameters"],
            "seeds": len(seeds),
        }
        for key in SCALING_RATES:
            by_seed = [rate for result in seeds if (rate := read_rate(result, key))]
            pooled = pool(by_seed)
            row[key] = pooled and pooled.to_dict()
            row[f"{key}_by_seed"] = [rate.value for rate in by_seed]
        rows.append(row)
    return {
        "base": base, "arms": rows, "paper": PAPER, "min_steps": config.scaling.min_steps,
        "batch": config.dpo.global_batch_size, "findings": findings(rows),
    }  # fmt: skip


def findings(rows: list[dict]) -> dict[str, bool | None]:
    """Check whether the results show what the paper's numbers suggest.

    Args:
        rows: The rows of `gather`.

    Returns:
        Whether each statement holds, or None if there is nothing to compare:

        - `more_data_is_safer`: the largest size has a lower unsafe rate than the smallest, and the
          rate never rises clearly from one size to the next. A rise is clear if the two intervals
          do not overlap.
        - `mixed_is_safest`: the unsafe rate with mixed questions is not higher than with any single
          question type.
        - `all_answers_are_safest`: the unsafe rate with all answer sources is not higher than with
          any selection of sources.
    """
    unsafe = {
        (row["family"], row["arm"]): rate for row in rows if (rate := read_rate(row, "unsafe_rate"))
    }
    sizes = [rate for (family, _), rate in unsafe.items() if family == "size"]

    def safest(family: str, arm: str) -> bool | None:
        others = {name: rate.value for (f, name), rate in unsafe.items() if f == family}
        value = others.pop(arm, None)
        return all(value <= v for v in others.values()) if value is not None and others else None

    rises = any(b.ends[0] > a.ends[1] for a, b in zip(sizes, sizes[1:], strict=False))
    return {
        "more_data_is_safer": not rises and sizes[-1].value < sizes[0].value
        if len(sizes) > 1
        else None,
        "mixed_is_safest": safest("questions", "mixed"),
        "all_answers_are_safest": safest("answers", "all"),
    }
