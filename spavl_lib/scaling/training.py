"""Train and measure one arm of the scaling stage."""

import shutil
from pathlib import Path

from spavl_lib.config import Config
from spavl_lib.data.load import eval_sets, load_prompts, load_truth
from spavl_lib.distributed import launcher
from spavl_lib.evaluation.judges import judge_all, make_judge
from spavl_lib.evaluation.suite import for_judge, prompts_rate
from spavl_lib.generation.generate import generate
from spavl_lib.modelling.load import load_policy, load_processor
from spavl_lib.runs.stage import Stage
from spavl_lib.scaling.arms import Arm, arm_stage

MEASURED = {"harm": "unsafe", "help": "helpful"}  # set of prompts -> the verdict that is counted


def run_arm(stage: Stage, arm: Arm, should_stop: object = False) -> dict:
    """Train and measure one arm. Its numbers and responses are kept; its weights are deleted.

    Args:
        stage: The scaling stage.
        arm: The arm to run. If it is complete, its summary is returned at once.
        should_stop: Becomes true when a stop is requested. It is polled between batches of
            responses.

    Returns:
        The arm's `rows`, `steps`, `epochs`, `trainable_parameters` and rates.

    Raises:
        BusyError: Another worker runs this arm.
        Preempted: A stop was requested. Repeating the call continues the arm.
    """
    result = arm_stage(stage, arm)
    if result.done:
        return result.summary
    with result.work():
        if result.done:  # another worker held the lock until now and completed the arm
            result.finish(result.summary)
            return result.summary
        config, training = result.run.config, result.run.stage("dpo")
        trained = launcher.make("dpo", config, training)
        rates = measure(config, training.path / "model", result.path, should_stop)
        summary = {
            "rows": trained["train_rows"],
            "steps": trained["steps"],
            "epochs": trained["epochs"],
            "trainable_parameters": trained["trainable_parameters"],
            **rates,
        }
        result.finish(summary)  # written first, because an arm without a summary needs its weights
        for folder in (training.path / "model", training.path / "checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
    return summary


def measure(
    config: Config, trained: Path | None, target: Path, should_stop: object = False
) -> dict:
    """Generate and judge responses to the harmful and the harmless prompts.

    Args:
        config: The arm's config.
        trained: Folder of the arm's weights; None for the base model.
        target: Folder for the responses.
        should_stop: Becomes true when a stop is requested. It is polled between batches.

    Returns:
        `unsafe_rate` and `helpful_rate`, each None if the judge gives no such verdict or the data
        have no such prompts. If the judge gives no verdict on what is unsafe, also `refusal_rate`.
    """
    processor, model = load_processor(config.model), load_policy(config.model, trained)
    judge = make_judge(config.evaluation.judge, load_truth(config.data), config.evaluation)
    rates: dict[str, dict | None] = {f"{column}_rate": None for column in MEASURED.values()}
    names = eval_sets(config.data, held_out_drawings=False)
    for name, column in MEASURED.items():
        if name not in names:
            continue
        prompts = load_prompts(config.data, name)
        records = generate(
            model, processor, prompts, config.generation,
            target / f"{name}.jsonl", seed=config.seed, labels={"set": name}, desc=name,
            should_stop=should_stop,
        )  # fmt: skip
        if getattr(judge, "needs_images", False):
            records = for_judge(prompts, records)
        rates |= prompts_rate(judge_all(judge, records), column)
    return rates
