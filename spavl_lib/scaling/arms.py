"""The arms of the scaling stage: DPO trainings that differ in one setting.

A family varies one setting: the number of pairs, the question types, the answer sources, whether
the projector trains, or the rank of the adapter. Every arm starts from the same base model.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from spavl_lib.config import Config, DataConfig, DPOConfig, ModelConfig
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import InputError
from spavl_lib.evaluation.numbers import SCALING_FAMILIES
from spavl_lib.runs.stage import Run, Stage

VALIDATION_ROWS = 32  # the trainer loads them; no result of the scaling stage uses them
# Raise this number when arms are measured in another way. All arms are then trained again.
MEASURING = 2


@dataclass(frozen=True)
class Arm:
    """One training: its family, its name in this family, and its complete config."""

    family: str
    name: str
    seed: int
    config: Config

    @property
    def key(self) -> str:
        """Name of the arm's folder. Arms that would train the same model have the same key.

        The key does not depend on the precision. All arms have the precision of their stage, but
        only the config that a worker reads names the precision.
        """
        settings = self.config.to_dict()
        for name in ("run_name", "scaling", "dtype"):
            settings.pop(name)
        text = json.dumps([MEASURING, settings], sort_keys=True)
        return f"seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def arm_stage(stage: Stage, arm: Arm) -> Stage:
    """The stage that holds an arm's result. Each arm is a run in the scaling stage's folder."""
    config = dataclasses.replace(arm.config, run_name=arm.key)
    return Run(config, stage.path / "arms").stage("scaling")


def distinct(arms: list[Arm]) -> list[Arm]:
    """The arms without those that would repeat the training of another arm."""
    return list({arm.key: arm for arm in arms}.values())


def plan(config: Config) -> list[Arm]:
    """Every arm for every seed.

    Raises:
        InputError: The config names no arms, or names an arm that cannot be made.
    """
    scaling = config.scaling
    variants = list(_variants(config))
    if not variants or not scaling.seeds:
        raise InputError(
            f"profile {config.profile} names no arms; set scaling.seeds and at least one of "
            "scaling.sizes, question_types, answers, projector and lora_ranks, as "
            "profiles/demo.yaml does"
        )
    sizes = _equal_sizes(config, variants)
    arms = []
    for seed in scaling.seeds:
        for family, name, data, model in variants:
            rows = data.train_rows if family == "size" else sizes[family]
            arm_data = dataclasses.replace(
                data, train_rows=rows, sampling_seed=seed, test_rows=scaling.eval_rows,
                validation_rows=VALIDATION_ROWS,
            )  # fmt: skip
            arm_config = dataclasses.replace(
                config, data=arm_data, model=model, seed=seed, dpo=_dpo(config, family, rows)
            )
            arms.append(Arm(family, name, seed, arm_config))
    return arms


def _variants(config: Config) -> Iterator[tuple[str, str, DataConfig, ModelConfig]]:
    """(family, name, data, model) of every arm, before equal sizes and the seeds are set."""
    scaling, model = config.scaling, config.model
    data = dataclasses.replace(config.data, extra_path="")  # an arm has as many pairs as it says
    available = len(load_preferences(dataclasses.replace(data, train_rows=0), "train"))
    for rows in sorted({min(size or available, available) for size in scaling.sizes}):
        yield "size", f"{rows:,}", dataclasses.replace(data, train_rows=rows), model
    for kind in scaling.question_types:
        types = () if kind == "mixed" else (kind,)
        yield "questions", kind, dataclasses.replace(data, question_types=types), model
    for text in scaling.answers:
        name, sign, listed = text.partition("=")
        if not sign:
            raise InputError(f"scaling.answers {text!r}: expected NAME=SOURCE+SOURCE or NAME=all")
        sources = () if listed.strip() == "all" else tuple(s.strip() for s in listed.split("+"))
        chosen = dataclasses.replace(data, answer_sources=sources)
        yield "answers", name.strip(), chosen, model
    for state in scaling.projector:
        trained = dataclasses.replace(model, train_projector=state == "trained")
        yield "projector", state, data, trained
    for rank in scaling.lora_ranks:
        lora = dataclasses.replace(
            model, adapter="qlora" if model.adapter == "qlora" else "lora",
            lora_rank=rank, lora_alpha=2 * rank,
        )  # fmt: skip
        yield "rank", str(rank), data, lora


def _equal_sizes(config: Config, variants: list) -> dict[str, int]:
    """Family -> number of pairs that every arm of the family gets.

    This is the number of pairs available to the family's smallest arm, limited by
    `scaling.ablation_rows`. The family `size` is left out.
    """
    limit, sizes = config.scaling.ablation_rows, {}
    available: dict[DataConfig, int] = {}
    for family in SCALING_FAMILIES:
        datas = [d for f, _, d, _ in variants if f == family and family != "size"]
        if datas:
            for data in set(datas) - available.keys():
                all_rows = dataclasses.replace(data, train_rows=0)
                available[data] = len(load_preferences(all_rows, "train"))
            fewest = min(available[d] for d in datas)
            sizes[family] = min(limit, fewest) if limit else fewest
    return sizes


def _dpo(config: Config, family: str, rows: int) -> DPOConfig:
    """Settings for one pass over the rows, or for `scaling.min_steps` steps if that is more."""
    scaling = config.scaling
    learning_rate = scaling.lora_learning_rate if family == "rank" else scaling.learning_rate
    batch = config.dpo.global_batch_size
    steps = max(scaling.min_steps, -(-rows // batch))
    return dataclasses.replace(
        config.dpo, max_steps=steps, warmup_steps=min(config.dpo.warmup_steps, steps // 4),
        save_steps=max(steps, 1), eval_steps=0,
        learning_rate=learning_rate or config.dpo.learning_rate,
    )  # fmt: skip
