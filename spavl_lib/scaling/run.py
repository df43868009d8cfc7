"""Arms that differ in one thing: how many pairs, which questions, whose answers, what trains.

    make scaling        # spavl run 07_scaling_and_ablations --profile demo

Every arm starts from the same base and passes once over its own rows, or makes `scaling.min_steps`
updates if that is more; it is measured on the same prompts as all others. An arm is a run of its
own under `scaling/arms/`: a finished one is kept, a broken one goes on, and several workers share
what is left to do. Arms with equal settings are trained once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from spavl_lib.config import Config, DataConfig, DPOConfig, ModelConfig, from_dict
from spavl_lib.data.load import load_preferences, load_prompts, load_truth
from spavl_lib.distributed import launcher
from spavl_lib.errors import ERRORS, BusyError, InputError, Preempted
from spavl_lib.evaluation.judges import judge_all, make_judge
from spavl_lib.evaluation.rates import count_rate
from spavl_lib.generation.stage import generate
from spavl_lib.modelling.load import load_policy, load_processor, quiet_libraries, weights_sha256
from spavl_lib.runs.files import write_text
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag, stop_on_signals
from spavl_lib.runs.stage import Run, Stage

FAMILIES = {
    "size": "data scale",
    "questions": "question types",
    "answers": "answer sources",
    "projector": "projector",
    "rank": "LoRA rank",
}
MEASURED = {"harm": ("unsafe_rate", "unsafe"), "help": ("helpful_rate", "helpful")}
MEASURED_RATES = tuple(key for key, _ in MEASURED.values())
VALIDATION_ROWS = 32  # the trainer's own held-out pairs; no result rests on them
# What the paper says, of LLaVA-1.5-7B after DPO, in percent; read in secondary copies of its tables
# (its full text was not at hand), so it stands beside ours as a shape to compare, not a target.
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
    "answers": "AdvBench suffix ASR: about 65 % with the safe group's answers, 6.54 % (34/520) "
    "with all (Table 4)",
    "questions": "mixed is best on every safety column (Table 5); its numbers were not found",
    "rank": "no numbers found",
}


@dataclass(frozen=True)
class Arm:
    """One training: which family it belongs to, its name there, and its whole config."""

    family: str
    name: str
    seed: int
    config: Config

    @property
    def key(self) -> str:
        """Names the folder; equal for arms that would train the very same thing."""
        settings = self.config.to_dict()
        for free in ("run_name", "scaling"):
            settings.pop(free)
        text = json.dumps(settings, sort_keys=True)
        return f"seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def plan(config: Config) -> list[Arm]:
    """Every arm of every seed, each with its full config.

    Raises:
        InputError: The profile names no arms, or one that cannot be.
    """
    scaling = config.scaling
    variants = list(_variants(config))
    if not variants or not scaling.seeds:
        raise InputError(
            f"profile {config.profile}: no arms; name them under `scaling:` (sizes, "
            "question_types, answers, projector, lora_ranks, seeds), as profiles/demo.yaml does"
        )
    sizes = _equal_sizes(config, variants)
    arms = []
    for seed in scaling.seeds:
        for family, name, data, model in variants:
            rows = data.train_rows if family == "size" else sizes[family]
            data_config = dataclasses.replace(
                data, train_rows=rows, sampling_seed=seed, test_rows=scaling.eval_rows,
                validation_rows=VALIDATION_ROWS,
            )  # fmt: skip
            made = dataclasses.replace(
                config, data=data_config, model=model, seed=seed, dpo=_dpo(config, family, rows)
            )
            arms.append(Arm(family, name, seed, made))
    return arms


def _variants(config: Config) -> Iterator[tuple[str, str, DataConfig, ModelConfig]]:
    """(family, name, data, model) of every arm; data sizes and seeds follow."""
    scaling, data, model = config.scaling, config.data, config.model
    whole = len(load_preferences(dataclasses.replace(data, train_rows=0), "train"))
    for size in scaling.sizes:
        rows = min(size or whole, whole)
        yield "size", f"{rows:,}", dataclasses.replace(data, train_rows=rows), model
    for name in scaling.question_types:
        types = () if name == "mixed" else (name,)
        yield "questions", name, dataclasses.replace(data, question_types=types), model
    for text in scaling.answers:
        name, sign, listed = text.partition("=")
        if not sign:
            raise InputError(f"scaling.answers {text!r}: expected NAME=SOURCE+SOURCE, or NAME=all")
        sources = () if listed.strip() == "all" else tuple(s.strip() for s in listed.split("+"))
        replaced = dataclasses.replace(data, answer_sources=sources)
        yield "answers", name.strip(), replaced, model
    for name in scaling.projector:
        trained = dataclasses.replace(model, train_projector=name == "trained")
        yield "projector", name, data, trained
    for rank in scaling.lora_ranks:
        adapter = "qlora" if model.adapter == "qlora" else "lora"
        lora = dataclasses.replace(model, adapter=adapter, lora_rank=rank, lora_alpha=2 * rank)
        yield "rank", str(rank), data, lora


def _equal_sizes(config: Config, variants: list) -> dict[str, int]:
    """Pairs of every ablation: the same within a family, no more than its poorest arm has."""
    wanted, sizes, known = config.scaling.ablation_rows, {}, {}
    for family in FAMILIES:
        datas = [d for f, _, d, _ in variants if f == family and family != "size"]
        if datas:
            for data in set(datas) - known.keys():
                whole = dataclasses.replace(data, train_rows=0)
                known[data] = len(load_preferences(whole, "train"))
            poorest = min(known[d] for d in datas)
            sizes[family] = min(wanted, poorest) if wanted else poorest
    return sizes


def _dpo(config: Config, family: str, rows: int) -> DPOConfig:
    """One pass over the rows, or the floor of steps if that is more; rank arms at their rate."""
    learning_rate = config.scaling.lora_learning_rate if family == "rank" else 0.0
    batch = config.dpo.global_batch_size
    steps = max(config.scaling.min_steps, -(-rows // batch))
    return dataclasses.replace(
        config.dpo, max_steps=steps, warmup_steps=min(config.dpo.warmup_steps, steps // 4),
        save_steps=max(steps, 1), eval_steps=0,
        learning_rate=learning_rate or config.dpo.learning_rate,
    )  # fmt: skip


# --- one arm ------------------------------------------------------------------------------------


def arm_stage(stage: Stage, arm: Arm) -> Stage:
    """The folder of an arm's result."""
    return Run(dataclasses.replace(arm.config, run_name=arm.key), stage.path / "arms").stage(
        "scaling"
    )


def run_arm(stage: Stage, arm: Arm, should_stop: object = False) -> dict:
    """Train and measure one arm; keeps its numbers and answers, not its weights.

    Args:
        stage: The scaling stage.
        arm: Which.
        should_stop: Truthy once asked to stop; polled between batches of answers.

    Raises:
        BusyError: Another worker has it.
        Preempted: Asked to stop; the same call goes on.
    """
    own = arm_stage(stage, arm)
    if own.done:
        return own.summary
    with own.work():
        if own.done:  # by a worker that held it until now
            own.finish(own.summary)
            return own.summary
        training = own.run.stage("dpo")
        trained = launcher.make("dpo", own.run.config, training)
        rates = measure(own.run.config, training.path / "model", own.path, should_stop)
        summary = {
            "rows": trained["train_rows"],
            "steps": trained["steps"],
            "epochs": trained["epochs"],
            "trainable_parameters": trained["trainable_parameters"],
            **rates,
        }
        own.finish(summary)  # before the weights go: until it stands, they are needed
        for folder in (training.path / "model", training.path / "checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
    return summary


def measure(
    config: Config, trained: Path | None, target: Path, should_stop: object = False
) -> dict:
    """Answer and judge the harmful and the harmless prompts.

    Args:
        config: Of the arm.
        trained: Its weights; None for the base.
        target: Folder for the answers.
        should_stop: Truthy once asked to stop; polled between batches.

    Returns:
        `unsafe_rate` and `helpful_rate`; None what the judge has no opinion of.
    """
    processor, model = load_processor(config.model), load_policy(config.model, trained)
    judge = make_judge(config.evaluation.judge, load_truth(config.data), config.evaluation)
    rates = {}
    for name, (key, column) in MEASURED.items():
        records = generate(
            model, processor, load_prompts(config.data, name), config.generation,
            target / f"{name}.jsonl", seed=config.seed, labels={"set": name}, desc=name,
            should_stop=should_stop,
        )  # fmt: skip
        values = [row[column] for row in judge_all(judge, records) if row[column] is not None]
        rates[key] = count_rate(sum(values), len(values))
    return rates


# --- all arms -----------------------------------------------------------------------------------


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    return {f"model/{name}": digest for name, digest in weights_sha256(config.model).items()}


@stage_maker("scaling", inputs=_inputs, polls_stop=True)
def run_scaling(config: Config, stage: Stage, flag: StopFlag) -> dict:
    """Train and measure every arm, and gather them.

    Returns:
        The summary: base, arms by family with their rates over all seeds, and the paper's numbers.

    Raises:
        InputError: As `plan`.
        Preempted: Asked to stop; finished arms are kept.
    """
    quiet_libraries()
    arms = plan(config)
    base = _base(config, stage, flag)
    unique = list({arm.key: arm for arm in arms}.values())
    todo = [arm for arm in unique if not arm_stage(stage, arm).done]
    workers = min(config.scaling.workers or workers_here(), max(1, len(todo)))
    if workers == 1:
        _run_here(stage, unique, flag)
    else:
        _run_apart(stage, unique, workers, flag)
    results = {arm.key: arm_stage(stage, arm).summary for arm in unique}
    summary = gather(config, arms, results, base)
    return summary


def workers_here() -> int:
    """How many arms there is room for at once: one on a GPU, else one a core and 3 GiB."""
    import torch

    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(cores or 1, int(memory // 3)))


def _base(config: Config, stage: Stage, flag: StopFlag) -> dict:
    """The base model on the same prompts."""
    path = stage.path / "base.json"
    if not path.is_file():
        data = dataclasses.replace(config.data, test_rows=config.scaling.eval_rows)
        rates = measure(dataclasses.replace(config, data=data), None, stage.path / "base", flag)
        write_text(path, json.dumps(rates))
    return json.loads(path.read_text(encoding="utf-8"))


def _run_here(stage: Stage, arms: list[Arm], flag: StopFlag) -> None:
    with tqdm(total=len(arms), desc="arms", unit="arm") as bar:
        for arm in arms:
            if flag:
                raise Preempted("stopped between arms; the same command goes on")
            run_arm(stage, arm, flag)
            bar.update(1)


def _run_apart(stage: Stage, arms: list[Arm], workers: int, flag: StopFlag) -> None:
    """Share the arms among processes: each takes the first that nobody holds.

    Raises:
        SpavlError: What a worker raised, if it is one of ours.
        RuntimeError: A worker failed in another way.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", "spavl_lib.scaling.run", str(stage.path)]
    logs = [stage.path / f"worker{n}.log" for n in range(workers)]
    processes = []
    for log in logs:
        with log.open("w", encoding="utf-8") as handle:
            processes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=handle,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            )
    try:
        with tqdm(total=len(arms), desc=f"arms, {workers} at a time", unit="arm") as bar:
            while any(p.poll() is None for p in processes):
                done = sum(arm_stage(stage, arm).done for arm in arms)
                bar.update(done - bar.n)
                failed = [p for p in processes if p.poll() not in (None, 0)]
                if flag or failed:
                    break
                time.sleep(1)
            bar.update(sum(arm_stage(stage, arm).done for arm in arms) - bar.n)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # a worker writes a checkpoint and stops
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.stdin.close()  # open until here: a worker ends when it does
    if flag:
        raise Preempted("stopped with some arms undone; the same command goes on")
    for code, log in zip(codes, logs, strict=True):
        if code not in (0, Preempted.exit_code, -15):
            _raise_as(log, code)
    if not all(arm_stage(stage, arm).done for arm in arms):
        raise Preempted("a worker was stopped from outside; the same command goes on")


def _raise_as(log: Path, code: int) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    for number in range(len(lines) - 1, -1, -1):
        name, colon, message = lines[number].partition(": ")
        if colon and name in ERRORS:
            raise ERRORS[name]("\n".join([message, *lines[number + 1 :]]))
    raise RuntimeError(f"a worker ended with code {code}; its last words: {log}")


def gather(config: Config, arms: list[Arm], results: dict[str, dict], base: dict) -> dict:
    """Arms as one table, each over all its seeds.

    Args:
        config: Of the run.
        arms: All of them.
        results: Arm key -> what `run_arm` gave.
        base: The base model's rates.
    """
    rows, rates = [], {(a.family, a.name): a.config.dpo.learning_rate for a in arms}
    for family, name in rates:
        found = [results[a.key] for a in arms if (a.family, a.name) == (family, name)]
        row = {
            "family": family,
            "arm": name,
            "pairs": found[0]["rows"],
            "steps": found[0]["steps"],
            "epochs": found[0]["epochs"],
            "learning_rate": rates[family, name],
            "trainable_parameters": found[0]["trainable_parameters"],
            "seeds": len(found),
        }
        for key in MEASURED_RATES:
            cells = [result[key] for result in found if result[key]]
            row[key] = count_rate(sum(c["k"] for c in cells), sum(c["n"] for c in cells))
            row[f"{key}_by_seed"] = [c["value"] for c in cells]
        rows.append(row)
    return {
        "base": base, "arms": rows, "paper": PAPER, "min_steps": config.scaling.min_steps,
        "batch": config.dpo.global_batch_size, "findings": findings(rows),
    }  # fmt: skip


def findings(rows: list[dict]) -> dict[str, bool | None]:
    """What the paper leads one to expect, and whether these numbers say so.

    Args:
        rows: As `gather` lays them out.

    Returns:
        `more_data_is_safer`: the unsafe rate never rises from a size to the next by more than
        their intervals allow, and the largest is below the smallest. `mixed_is_safest`: mixed
        questions are at most as unsafe as each single type. `all_answers_are_safest`: all sources
        as any choice of them. None where there is nothing to compare.
    """
    unsafe = {(r["family"], r["arm"]): r["unsafe_rate"] for r in rows if r["unsafe_rate"]}
    sizes = [u for (family, _), u in unsafe.items() if family == "size"]

    def safest(among: str, whole: str) -> bool | None:
        arms = {arm: u["value"] for (family, arm), u in unsafe.items() if family == among}
        own = arms.pop(whole, None)
        return all(own <= v for v in arms.values()) if own is not None and arms else None

    rising = any(b["ci_low"] > a["ci_high"] for a, b in zip(sizes, sizes[1:], strict=False))
    return {
        "more_data_is_safer": not rising and sizes[-1]["value"] < sizes[0]["value"]
        if len(sizes) > 1
        else None,
        "mixed_is_safest": safest("questions", "mixed"),
        "all_answers_are_safest": safest("answers", "all"),
    }


# --- a worker -----------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """Take arms nobody holds until none is left.

    Args:
        folder: The scaling stage's.
    """
    config = from_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    stage = Run(dataclasses.replace(config, run_name=folder.parent.name), folder.parents[1]).stage(
        "scaling"
    )
    quiet_libraries()
    waiting = list({arm.key: arm for arm in plan(config)}.values())
    with stop_on_signals() as flag:
        for arm in waiting:
            if flag:
                raise Preempted("stopped between arms")
            with contextlib.suppress(BusyError):
                run_arm(stage, arm, flag)


if __name__ == "__main__":
    from spavl_lib.errors import SpavlError
    from spavl_lib.runs.signals import end_with_parent

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        work(Path(sys.argv[1]))
    except SpavlError as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
