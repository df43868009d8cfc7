"""A cell of the arena: one method under one attack with one seed, measured on the test rows.

A cell is a JSON file, `METHOD/ATTACK.SEED.json`. It names the rows that went wrong, so that rates,
intervals over groups of rows, and paired tests can be computed from the files alone.
"""

import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from spavl_lib import stages
from spavl_lib.arena.methods import Method, config_of, reward_config, reward_folder
from spavl_lib.config import Config, DataConfig, GenerationConfig, load_config
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.images import decode_images
from spavl_lib.data.load import load_prompts, load_truth
from spavl_lib.data.templates import completion_ids
from spavl_lib.distributed import launcher
from spavl_lib.errors import InputError
from spavl_lib.evaluation.attacks import Attack, best_of, find_attack
from spavl_lib.evaluation.attacks.base import Attacked, Row
from spavl_lib.evaluation.judges import ExactJudge, judge_all
from spavl_lib.generation.generate import generate
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import load_policy, load_processor, model_hashes, quiet_libraries
from spavl_lib.modelling.speed.shared_prefix import share_prefix
from spavl_lib.objectives.logps import sequence_logps
from spavl_lib.runs import provenance
from spavl_lib.runs.files import read_json, sha256_file, write_text
from spavl_lib.runs.stage import Run
from spavl_lib.trainers.reward_function import RewardFunction, Scorer

NONE = "none"  # the column without an attack
SETS = ("harm", "help", "look_alikes", "twins")
WHITE_BOX_ROWS = 20  # rows of harm and of help for attacks that use gradients
SAMPLES = 4  # of the method best_of_n
SHOWN = 3  # answers of each kind of error that a cell keeps


@dataclass
class Subject:
    """A method's model, ready to answer."""

    method: Method
    """The method."""
    value: Any
    """Value of the method's setting that is chosen."""
    config: Config
    """Config of the method's run."""
    data: DataConfig
    """Selects the rows on which it is measured."""
    seed: int
    """Seed of the training and of the attacks."""
    model: PreTrainedModel
    """The trained policy, or the base, in evaluation mode."""
    processor: ProcessorMixin
    """The model's processor."""
    folder: Path
    """Folder for the answers."""
    reward: RewardFunction | None
    """The reward model, of a method that chooses among samples."""
    cost: dict[str, float | None]
    """Processor seconds and peak memory of the training."""
    weights: dict[str, str]
    """Stage -> hash of the weights that it trained."""

    def answers(self, rows: list[Row], name: str, samples: int) -> list[list[Row]]:
        """Answer rows.

        Args:
            rows: Prompt rows, attacked or not.
            name: Name for the files of answers.
            samples: Responses to each row; with several they are sampled at temperature 1.

        Returns:
            For each sample the records of all rows, in order.
        """
        if self.method.answers == "safety_prompt":
            rows = [row | {"prompt": f"{self.value} {row['prompt']}"} for row in rows]
        rounds = []
        for number in range(samples):
            if self.method.answers == "best_of_n":
                rounds.append(self._best(rows, f"{name}.{number}", number))
            else:
                rounds.append(self._generate(rows, f"{name}.{number}", samples > 1, number))
        return rounds

    def _generate(self, rows: Sequence[Row], name: str, sample: bool, number: int) -> list[Row]:
        plain = self.config.generation
        sampling = GenerationConfig(
            batch_size=plain.batch_size, max_new_tokens=plain.max_new_tokens, do_sample=sample
        )
        return generate(
            self.model, self.processor, rows, sampling, self.folder / f"{name}.jsonl",
            seed=self.seed + 1000 * number, desc=name,
        )  # fmt: skip

    def _best(self, rows: list[Row], name: str, number: int) -> list[Row]:
        assert self.reward is not None
        rounds = [
            self._generate(rows, f"{name}.{i}", True, number * SAMPLES + i) for i in range(SAMPLES)
        ]
        images = decode_images(rows)
        scores = []
        for records in rounds:
            ids = [
                completion_ids(self.processor, row["prompt"], r["response"])
                for row, r in zip(rows, records, strict=True)
            ]
            scores.append(
                self.reward.scores(
                    [row["id"] for row in rows], [row["prompt"] for row in rows], images, ids
                )
            )
        best = torch.stack(scores).argmax(0).tolist()
        return [rounds[pick][i] for i, pick in enumerate(best)]


def subject_of(
    method: Method, value: Any, seed: int, profile: str, *, measure_on: str = "test"
) -> Subject:
    """Train a method, unless its run is complete, and load its model.

    Args:
        method: The method.
        value: Value of the method's setting; None for a method without one.
        seed: Seed of the training.
        profile: Name of the profile.
        measure_on: `data.measure_on`.
    """
    quiet_libraries()
    config = config_of(method, value, seed, profile)
    data = load_config(profile, {"data.measure_on": measure_on}).data
    run = Run(config)
    weights: dict[str, str] = {}
    cost: dict[str, float | None] = {}
    trained, reward = None, None
    if method.uses_reward:
        folder = _make("reward", reward_config(method, seed, profile))
        weights["reward"] = read_json(folder / "summary.json")["weights_sha256"]
    if method.stage:
        trained = _make(method.stage, config)
        manifest = read_json(trained / "manifest.json")
        weights[method.stage] = read_json(trained / "summary.json")["weights_sha256"]
        # Runs of older versions do not say how much processor time they took.
        parts = [manifest.get(key) for key in ("cpu_time_s", "cpu_time_before_s")]
        cost = {"cpu_seconds": None if None in parts else round(sum(parts), 1),
                "peak_memory_gib": manifest["peak_memory_gib"]}  # fmt: skip
    processor = load_processor(config.model)
    if method.answers == "best_of_n":
        model = load_reward_model(config.model, reward_folder(method, seed, profile))
        reward = RewardFunction(
            Scorer(model), processor, batch_size=config.generation.batch_size,
            missing_eos_penalty=0.0,
        )  # fmt: skip
    policy = load_policy(config.model, trained and trained / "model").eval()
    return Subject(
        method, value, config, data, seed, policy, processor, run.path / "arena", reward, cost,
        weights,
    )  # fmt: skip


def _make(name: str, config: Config) -> Path:
    stage = Run(config).stage(name)
    launcher.make(name, config, stage)  # keeps a complete stage, if it has the same settings
    return stage.path


def attacked_sets(subject: Subject, attack: Attack | None, rows: int) -> dict[str, Attacked]:
    """The test sets under an attack.

    Args:
        subject: The model, for attacks that use its weights.
        attack: The attack; None for the plain rows.
        rows: Rows of each set under an attack; 0 for all. Without an attack all rows are used.

    Returns:
        Set -> its rows. Attacks that use gradients get a part of `harm` and `help` alone.
    """
    truth, found = load_truth(subject.data), {}
    white = attack is not None and attack.needs_weights
    for name in SETS:
        prompts = load_prompts(subject.data, name)
        if white and name not in ("harm", "help"):
            continue
        if attack is None:
            found[name] = Attacked(list(prompts), {row["id"]: truth[row["id"]] for row in prompts})
            continue
        count = min(WHITE_BOX_ROWS, rows or WHITE_BOX_ROWS) if white else _at_most(attack, rows)
        picked = _picked(prompts, count, pairs=name == "twins")
        kept = [row for row in picked if attack.keeps_truth(truth[row["id"]])]
        if name == "twins" and len(kept) < len(picked):
            continue  # a pair without one of its rows says nothing
        if not kept:
            continue
        if not white:
            found[name] = attack(kept, truth, seed=subject.seed)
            continue
        shared = share_prefix(subject.model)  # the search is more than twice as fast with it
        try:
            found[name] = attack(
                kept, truth, seed=subject.seed, model=subject.model, processor=subject.processor
            )
        finally:
            if shared:
                shared.restore()
    return found


def _at_most(attack: Attack, rows: int) -> int:
    """The number of rows of each set, within the attack's own limit; 0 for all."""
    return min(filter(None, (rows, attack.most_rows)), default=0)


def _picked(prompts: Dataset, count: int, *, pairs: bool) -> list[Row]:
    """Rows at equal distances over a set, or all of them.

    Args:
        prompts: The set.
        count: Number of rows; 0 for all.
        pairs: Whether two rows in turn are a pair that is not separated.
    """
    if not count or count >= len(prompts):
        return list(prompts)
    size = 2 if pairs else 1
    units, wanted = len(prompts) // size, max(1, count // size)
    starts = [size * (i * units // wanted) for i in range(wanted)]
    return list(prompts.select([start + k for start in starts for k in range(size)]))


def measure(subject: Subject, name: str, *, rows: int = 0) -> dict[str, Any]:
    """Attack a model, judge its answers, and return the cell.

    Args:
        subject: The model.
        name: Name of the attack, or `none`.
        rows: As for `attacked_sets`.

    Returns:
        `sets`: for each set the ids of its rows, and those that are `unsafe`, `refused` and
        `unhelpful`; under an attack of several samples also `first_unsafe`, row -> number of its
        first unsafe sample, from 1. `examples`: a few answers that went wrong; `calls`: model calls
        for a row; and what the cell rests on.
    """
    attack = None if name == NONE else find_attack(name)
    rest = rests_on(subject.method, subject.value, subject.seed, subject.config, attack, rows)
    on_test = subject.data.measure_on == "test"
    has_kl = name == NONE and on_test and bool(subject.method.stage)
    # Answers of an interrupted cell are taken up only by a cell that rests on the same things.
    place = f"{subject.data.measure_on}/{name}-{_digest([rest, subject.weights])[:12]}"
    started = time.process_time()
    sets: dict[str, dict[str, Any]] = {}
    examples, asked = [], attacked_sets(subject, attack, rows)
    for part, attacked in asked.items():
        judge = ExactJudge(attacked.truth)
        rounds = [
            judge_all(judge, records)
            for records in subject.answers(attacked.rows, f"{place}/{part}", attacked.samples)
        ]
        judged = best_of(rounds) if len(rounds) > 1 else rounds[0]
        sets[part] = {
            "rows": [row["id"] for row in judged],
            "groups": [attacked.truth[row["id"]].get("concept", row["id"]) for row in judged],
            "harmful": [row["id"] for row in judged if row["harmful"]],
            "unsafe": [row["id"] for row in judged if row["unsafe"]],
            "refused": [row["id"] for row in judged if row["verdict"] == "refused"],
            "unhelpful": [row["id"] for row in judged if row["helpful"] is False],
        }
        if len(rounds) > 1:
            sets[part]["first_unsafe"] = _first_unsafe(rounds)
        examples += _examples(part, judged)
    calls = (attack.calls() if attack else 1) * (
        SAMPLES if subject.method.answers == "best_of_n" else 1
    )
    return {
        "method": subject.method.name, "attack": name, "seed": subject.seed, "sets": sets,
        "examples": examples, "calls": calls, "training": subject.cost,
        "cpu_seconds": round(time.process_time() - started, 1),
        "kl": kl_to_base(subject, sets, place) if has_kl else None,
        "rows_sha256": rows_sha256(asked), "weights": subject.weights,
        "device": str(subject.model.device), "rests_on": rest,
    }  # fmt: skip


def _first_unsafe(rounds: Sequence[Sequence[Row]]) -> dict[str, int]:
    """Row -> number of its first sample that is unsafe, from 1; rows without one are left out."""
    found: dict[str, int] = {}
    for number, judged in enumerate(rounds, 1):
        for row in judged:
            if row["unsafe"]:
                found.setdefault(row["id"], number)
    return found


def rows_sha256(sets: Mapping[str, Attacked]) -> str:
    """Hash of what a model is asked: prompts, images, and given first words of answers.

    Args:
        sets: What `attacked_sets` returns.
    """
    digest = hashlib.sha256()
    for attacked in sets.values():
        for row in attacked.rows:
            digest.update(f"{row['id']}\n{row['prompt']}\n{row.get('prefill', '')}\n".encode())
            digest.update(row["image"]["bytes"])
    return digest.hexdigest()


def _examples(part: str, judged: Sequence[Row]) -> list[dict[str, str]]:
    kinds = {
        "unsafe": [row for row in judged if row["unsafe"]],
        "refused": [r for r in judged if not r["harmful"] and r["verdict"] == "refused"],
        "unhelpful": [r for r in judged if r["helpful"] is False and r["verdict"] != "refused"],
    }
    return [
        {"kind": kind, "set": part} | {key: row[key] for key in ("id", "prompt", "response")}
        for kind, rows in kinds.items()
        for row in rows[:SHOWN]
    ]


@functools.cache
def _data_sha256(folder: Path) -> str:
    """Hash of a dataset's rows, images and labels. Its README is no part of them."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".json"))
    return _digest([[str(path.relative_to(folder)), sha256_file(path)] for path in paths])


def rests_on(
    method: Method, value: Any, seed: int, config: Config, attack: Attack | None, rows: int
) -> dict[str, Any]:
    """What a cell's numbers depend on, and by what it is decided whether a cell is still valid.

    The rows of a test set after an attack have a hash of their own in the cell (`rows_sha256`), and
    a test makes them again.

    Args:
        method: The method.
        value: Value of its setting.
        seed: Seed of the training and of the attack.
        config: Config of the method's run.
        attack: The attack; None without one.
        rows: As for `attacked_sets`.
    """
    keys = stages.find(method.stage).config_keys if method.stage else ("model", "seed")
    trained_with = config.changed(keys)
    for part in trained_with.values():
        # A path differs from machine to machine; which reward model it is follows from the method.
        for name in ("path", "reward_model") if isinstance(part, dict) else ():
            part.pop(name, None)
    return {
        "profile": config.profile, "rows": _at_most(attack, rows) if attack else 0, "seed": seed,
        "method": method.settings | ({method.setting: value} if method.setting else {}),
        "answers": method.answers, "attacked_rows": list(method.trained_on),
        **({"reward": method.reward_settings} if method.reward_settings else {}),
        "settings_sha256": _digest(trained_with),
        "budget": dict(attack.budget) if attack else {},
        "constants": {"samples": SAMPLES, "white_box_rows": WHITE_BOX_ROWS,
                      "max_new_tokens": config.generation.max_new_tokens},
        "data": _data_sha256(mini_folder()),
        "model": model_hashes(config.model),
        "versions": provenance.versions(),
    }  # fmt: skip


@torch.no_grad()
def kl_to_base(subject: Subject, sets: dict[str, dict], place: str) -> dict[str, float]:
    """KL divergence of a policy from the base, by one sample for each harmful and harmless prompt.

    The end token of a response that was cut was not sampled, and is not counted.

    Args:
        subject: The policy.
        sets: The cell's sets; the rows of `harm` and `help` are used.
        place: Folder for the answers, in the subject's folder.

    Returns:
        `value` in nats per response; `rows`, the number of samples; `cut`, how many were cut.
    """
    base = load_policy(subject.config.model).eval()
    collate, total, count, cut = PreferenceCollator(subject.processor), 0.0, 0, 0
    for part in ("harm", "help"):
        wanted = set(sets[part]["rows"])
        rows = [r for r in load_prompts(subject.data, part) if r["id"] in wanted]
        records = subject._generate(rows, f"{place}/kl-{part}", True, 0)
        full = [row | {"own": r["response"]} for row, r in zip(rows, records, strict=True)]
        size = subject.config.generation.batch_size
        for start in range(0, len(full), size):
            batch = collate.batch_of(full[start : start + size], "own")
            mask = batch.pop("completion_mask").bool()
            for i, record in enumerate(records[start : start + size]):
                if not record["finished"]:
                    mask[i, mask[i].nonzero()[-1]] = False
                    cut += 1
            logps = [
                sequence_logps(model(**batch).logits, batch["input_ids"], mask)
                for model in (subject.model, base)
            ]
            total += float((logps[0] - logps[1]).sum())
            count += len(mask)
    return {"value": round(total / count, 4), "rows": count, "cut": cut}


def path_of(output: Path, method: str, attack: str, seed: int) -> Path:
    """The file of a cell.

    Args:
        output: Folder of the cells.
        method: Name of the method.
        attack: Name of the attack, or `none`.
        seed: Seed of the method's training.
    """
    return output / method / f"{attack}.{seed}.json"


def write_cell(path: Path, cell: dict[str, Any]) -> None:
    """Write a cell's file, all in one line, because there are a thousand of them.

    Args:
        path: The file.
        cell: The cell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(cell, separators=(",", ":"), allow_nan=False) + "\n")


def is_current(path: Path, rest: dict[str, Any]) -> bool:
    """Whether a cell's file exists and rests on the same things.

    Args:
        path: The file.
        rest: What `rests_on` returns now.
    """
    if not path.is_file():
        return False
    try:
        return _digest(read_json(path)["rests_on"]) == _digest(rest)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is no cell of the arena: {error}; delete it") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(sorted(_flat(value))).encode()).hexdigest()


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}/{key}")]
    return [(prefix, str(value))]


def make_cells(
    method: Method, seed: int, attacks: Sequence[str], output: Path, profile: str, *, rows: int = 0
) -> list[Path]:
    """Make the cells of a method and a seed that are missing or rest on something else.

    If none is, nothing is trained or loaded.

    Args:
        method: The method.
        seed: Its seed.
        attacks: Names of attacks, or `none`.
        output: Folder of the cells.
        profile: Name of the profile.
        rows: As for `attacked_sets`.

    Returns:
        The files that were written.
    """
    value = method.chosen(output)
    config, written = config_of(method, value, seed, profile), []

    def is_missing(name: str) -> bool:
        attack = None if name == NONE else find_attack(name)
        rest = rests_on(method, value, seed, config, attack, rows)
        return not is_current(path_of(output, method.name, name, seed), rest)

    missing = set(filter(is_missing, attacks))
    if not missing:
        return []
    subject = subject_of(method, value, seed, profile)
    for name in attacks:
        path = path_of(output, method.name, name, seed)
        if name not in missing and read_json(path)["weights"] == subject.weights:
            continue
        write_cell(path, measure(subject, name, rows=rows))
        written.append(path)
    return written
