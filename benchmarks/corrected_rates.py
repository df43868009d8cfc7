"""Coverage and width of corrected rates on MSTS, where people labelled all 4,000 answers.

    SPAVL_BENCHMARKS=FOLDER python -m benchmarks.corrected_rates --cache FOLDER

Each draw labels a sample and asks: does the interval hold the rate of all 4,000 labels? `ratio` is
the mean width divided by that of Wilson's interval of the labels alone (of a simple random sample
of the same size). The target is `answers`, the rate of exactly these answers; `ratio_prompts` is
the same ratio for the target `prompts` without groups, whose interval is longer and which this
truth cannot test. Needs the extra `judge-head`. Writes `results/corrected_rates.json`.
"""

import argparse
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import common, msts
from spavl_lib.evaluation.corrected import corrected_rate, draw_sample, rogan_gladen
from spavl_lib.evaluation.head import Encoder, cross_fit, embed_answers
from spavl_lib.evaluation.judges.phrases import refuses

Draw = Callable[[int], np.ndarray]
Proxy = Callable[[list[bool | None], int], np.ndarray]


def simple_sample(total: int, n: int) -> Draw:
    """Samples of `n` of `total` answers, by seed."""
    return lambda seed: np.random.default_rng(seed).choice(total, n, replace=False)


def measure(
    truth: np.ndarray,
    proxy: Proxy,
    draw: Draw,
    draws: int,
    strata: Sequence[Hashable] | None = None,
    *,
    gladen: bool = False,
) -> dict[str, float]:
    """Coverage and mean width over draws, with the seeds 0 to draws - 1."""
    rate, n, start = float(truth.mean()), 0, time.process_time()
    names = ("people", "corrected", "rogan_gladen")
    covered: dict[str, list[bool]] = {name: [] for name in names}
    widths: dict[str, list[float]] = {name: [] for name in (*names, "prompts")}
    values, halves = [], []
    for seed in range(draws):
        labels: list[bool | None] = [None] * len(truth)
        rows = draw(seed)
        n = len(rows)
        for row in rows:
            labels[row] = bool(truth[row])
        f = proxy(labels, seed)
        found = corrected_rate(f, labels, strata=strata, target="answers")
        estimates = {"people": found.people, "corrected": found.corrected}
        if gladen and (other := rogan_gladen(f, labels)):
            estimates["rogan_gladen"] = other
        for name, estimate in estimates.items():
            covered[name].append(estimate.ci_low <= rate <= estimate.ci_high)
            widths[name].append(estimate.width)
        values.append(found.corrected.value)
        halves.append(found.labels_to_halve or len(truth))
        if strata is None:
            widths["prompts"].append(corrected_rate(f, labels).corrected.width)
    page = {"labels": n, "draws": draws, "mean_value": float(np.mean(values)), "true_value": rate}
    for name in names:
        if covered[name]:
            page[f"{name}_covers"] = float(np.mean(covered[name]))
            page[f"{name}_width"] = float(np.mean(widths[name]))
    if len(covered["rogan_gladen"]) not in (0, draws):
        page["rogan_gladen_draws"] = len(covered["rogan_gladen"])
    if strata is None:
        page["ratio"] = page["corrected_width"] / page["people_width"]
        page["ratio_prompts"] = float(np.mean(widths["prompts"])) / page["people_width"]
    page["median_labels_to_halve"] = float(np.median(halves))
    return page | {"cpu_s": time.process_time() - start}


def main() -> None:
    """Measure judges on the unsafe axis, then cross-fitted heads on both axes."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--cache", type=Path, help="embeddings that are there are not made again")
    options.add_argument("--draws", type=int, default=2000, help="draws for judges")
    options.add_argument("--fitted-draws", type=int, default=500, help="draws for fitted heads")
    options.add_argument("--results", type=Path, default=common.RESULTS)
    asked = options.parse_args()
    data, metrics = msts.read(), {}
    total = len(data.answers)
    phrases = np.array([not refuses(answer) for answer in data.answers], dtype=float)

    def keep(name: str, page: dict[str, float]) -> None:
        metrics[name] = page  # written at once: all together take an hour on a busy machine
        common.finish("corrected_rates", metrics, results=asked.results)

    features = embed_answers(data.answers, Encoder(), cache=asked.cache)

    def head(labels: list[bool | None], seed: int) -> np.ndarray:
        return cross_fit(features, labels, data.cases, seed=seed)

    def judged(name: str, f: np.ndarray) -> None:
        draw = simple_sample(total, 200)
        page = measure(data.unsafe, lambda _, __: f, draw, asked.draws, gladen=True)
        keep(f"unsafe, 200 labels, {name}", page)

    def fitted(axis: str, truth: np.ndarray, n: int) -> None:
        page = measure(truth, head, simple_sample(total, n), asked.fitted_draws)
        keep(f"{axis}, {n} labels, cross-fitted head", page)

    judged("phrases-v1", phrases)
    fitted("refused", data.refused, 400)
    strata = list(zip(phrases.tolist(), data.models, strict=True))
    page = measure(
        data.unsafe,
        lambda _, __: phrases,
        lambda seed: draw_sample(strata, 200, seed=seed).rows,
        asked.fitted_draws,
        strata,
    )
    keep("unsafe, 200 labels, phrases-v1, stratified by verdict and model", page)
    for name, f in data.judges.items():
        judged(name, f)
    fitted("refused", data.refused, 200)
    fitted("unsafe", data.unsafe, 200)
    fitted("unsafe", data.unsafe, 400)


if __name__ == "__main__":
    main()
