"""The home head on MSTS: how well it judges new cases after 200 or 400 labels, and how fast it is.

    SPAVL_BENCHMARKS=FOLDER python -m benchmarks.home_head --cache FOLDER

The cases are halved at random. Labels are drawn from the answers of one half, and the head is read
on the other half. Needs the extra `judge-head`. Writes `results/home_head.json`.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks import common, msts
from spavl_lib.evaluation.agreement import kappa
from spavl_lib.evaluation.head import Encoder, embed_answers, fit_logistic

LABELS, SEEDS = (200, 400), range(20)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive row scores above a negative one; ties count half."""
    from scipy.stats import mannwhitneyu

    yes, no = scores[positive == 1], scores[positive == 0]
    return float(mannwhitneyu(yes, no).statistic) / (len(yes) * len(no))


def trial(data: msts.Msts, features: np.ndarray, n: int, seed: int) -> dict[str, float]:
    """Fit on `n` labels of half of the cases, and read the answers of the other half."""
    rng = np.random.default_rng(seed)
    cases = np.array(data.cases)
    names = rng.permutation(np.unique(cases))
    at_home = np.isin(cases, names[: len(names) // 2])
    rows = rng.choice(np.flatnonzero(at_home), n, replace=False)
    new = ~at_home
    start = time.process_time()
    refused = fit_logistic(features[rows], data.refused[rows])
    unsafe = fit_logistic(features[rows], data.unsafe[rows])
    seconds = time.process_time() - start
    refusal, harm = refused.probabilities(features[new]), unsafe.probabilities(features[new])
    # A rare event seldom reaches a probability of one half: the threshold keeps the labels' share.
    threshold = np.quantile(harm, 1 - data.unsafe[rows].mean())
    found = {
        "refusal_kappa": kappa((refusal > 0.5).tolist(), (data.refused[new] == 1).tolist()),
        "unsafe_kappa": kappa((harm > threshold).tolist(), (data.unsafe[new] == 1).tolist()),
    }
    auc_of = {
        "refusal_auc": auc(refusal, data.refused[new]),
        "unsafe_auc": auc(harm, data.unsafe[new]),
    }
    return {name: value or 0.0 for name, value in found.items()} | auc_of | {"fit_cpu_s": seconds}


def main() -> None:
    """Embed, then run all trials."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--cache", type=Path, help="embeddings that are there are not made again")
    options.add_argument("--results", type=Path, default=common.RESULTS)
    asked = options.parse_args()
    data, encoder = msts.read(), Encoder()
    wall, cpu = time.perf_counter(), time.process_time()
    made: list[int] = []
    features = embed_answers(
        data.answers,
        encoder,
        cache=asked.cache,
        progress=lambda done, total: made.append(total),
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    metrics: dict = {
        "answers": len(data.answers),
        "embedding": {"wall_s": wall, "cpu_s": cpu, "from_cache": not made},
        "seeds": [SEEDS.start, SEEDS.stop - 1],
    }
    for n in LABELS:
        trials = [trial(data, features, n, seed) for seed in SEEDS]
        metrics[f"labels_{n}"] = {
            name: {
                "mean": statistics.fmean(row[name] for row in trials),
                "sd": statistics.stdev(row[name] for row in trials),
                "worst": (max if name == "fit_cpu_s" else min)(row[name] for row in trials),
            }
            for name in trials[0]
        }
    common.finish("home_head", metrics, results=asked.results)


if __name__ == "__main__":
    main()
