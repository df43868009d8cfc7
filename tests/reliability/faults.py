"""What goes wrong, put in before the command begins: each by its name and one text argument."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch


def die_at_write(number: str) -> None:
    """Exit without a word at the n-th instant before or after a write of a checkpoint.

    Args:
        number: Which, from 1; 0 only counts them, in the file $SPAVL_COUNT.
    """
    import shutil

    from spavl_lib.trainers import checkpoint as ckpt

    wanted, seen = int(number), [0]

    def tick() -> None:
        seen[0] += 1
        if seen[0] == wanted:
            os._exit(9)
        if not wanted:
            Path(os.environ["SPAVL_COUNT"]).write_text(str(seen[0]))

    def ticking(function: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            tick()
            result = function(*args, **options)
            tick()
            return result

        return wrapped

    def half(named: dict, path: Path) -> None:
        """A file of which only the beginning reached the disk, and then the end."""
        save_file(named, path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        tick()
        Path(path).write_bytes(whole)

    save_file = ckpt.save_file
    ckpt.save_file = ticking(half)
    ckpt._sync = ticking(ckpt._sync)

    class Removal:
        def __getattr__(self, name: str) -> Any:
            return ticking(shutil.rmtree) if name == "rmtree" else getattr(shutil, name)

    ckpt.shutil = Removal()
    replace = Path.replace

    def renamed(self: Path, target: Path) -> Path:
        watched = ".tmp-step" in self.name
        if watched:
            tick()
        result = replace(self, target)
        if watched:
            tick()
        return result

    Path.replace = renamed


def kill_in(phase: str) -> None:
    """SIGKILL oneself in a phase: `import`, `data`, `forward@2`, `backward@4`, ... @ which call."""
    name, _, which = phase.partition("@")
    wanted, seen = int(which or 1), [0]

    def dying(function: Any, after: bool = False) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] == wanted and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if seen[0] == wanted and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    patch(name, dying)


# Phase -> module, and the dotted name in it that runs then; {kind} is the trainer.
PHASES = {
    "hashing": ("spavl_lib.runs.provenance", "environment"),
    "data": ("spavl_lib.trainers.{kind}", "load_preferences"),
    "build": ("spavl_lib.trainers.{kind}", "build_trainer"),
    "forward": ("spavl_lib.trainers.guards", "gate_loss"),
    "backward": ("spavl_lib.trainers.guards", "gate_gradients"),
    "optimizer": ("torch.optim", "AdamW.step"),
    "logging": ("spavl_lib.runs.stage", "Stage.log"),
    "save": ("spavl_lib.trainers.checkpoint", "save_file"),
    "seal": ("spavl_lib.trainers.checkpoint", "sha256_file"),
    "evaluate": ("transformers", "Trainer.evaluation_loop"),
    "score": ("spavl_lib.trainers.reward", "score_pairs"),
    "summary": ("spavl_lib.runs.stage", "Stage._conclude"),
    "rollout": ("spavl_lib.trainers.ppo_rollout", "sample"),
    "reward": ("spavl_lib.trainers.ppo_rollout", "add_advantages"),
    "update": ("spavl_lib.trainers.ppo", "PPOTrainer.minibatch"),
    "generate": ("spavl_lib.generation.generate", "generate_batch"),
}


def trainer_module() -> Any:
    """The module of the trainer at hand."""
    import importlib

    return importlib.import_module(f"spavl_lib.trainers.{os.environ['SPAVL_KIND']}")


def patch_gate(name: str, wrap: Any) -> None:
    """Put a wrapper around a gate, in every module that looks it up."""
    import sys

    from spavl_lib.trainers import guards

    trainer_module()
    plain = getattr(guards, name)
    wrapped = wrap(plain)
    ours = [m for key, m in sys.modules.items() if key.startswith("spavl_lib.")]
    for module in ours:
        if getattr(module, name, None) is plain:
            setattr(module, name, wrapped)


def patch(name: str, wrap: Any) -> None:
    """Put a wrapper around what runs in a phase."""
    import importlib

    module_name, dotted = PHASES[name]
    if module_name.endswith(".guards"):
        patch_gate(dotted, wrap)
        return
    owner: Any = importlib.import_module(module_name.format(kind=os.environ["SPAVL_KIND"]))
    *parents, last = dotted.split(".")
    for part in parents:
        owner = getattr(owner, part)
    setattr(owner, last, wrap(getattr(owner, last)))


def signal_in(phase: str) -> None:
    """SIGTERM or SIGINT oneself in a phase: `SIGTERM/evaluate@1`."""
    number, _, phase = phase.partition("/")
    name, _, which = phase.partition("@")
    wanted, seen = int(which or 1), [0]

    def signalling(function: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] == wanted:
                os.kill(os.getpid(), getattr(signal, number))
            return function(*args, **options)

        return wrapped

    patch(name, signalling)


def poison(where: str) -> None:
    """Make a number none at a step: `weight@3`, `gradient@1`, `loss@6`, and of PPO's rollout
    `scores@1`, `logps@3`, `ref_logps@6` (the KL rests on both). Weights turn after their step.
    """
    name, _, step = where.partition("@")
    wanted = int(step)

    def spoilt_loss(gate: Any) -> Any:
        def spoilt(loss: Any, step: int, row_ids: list[str]) -> None:
            gate(loss * (math.nan if step == wanted else 1), step, row_ids)

        return spoilt

    def spoilt_gradient(gate: Any) -> Any:
        def spoilt(model: Any, step: int, row_ids: list[str]) -> None:
            if step == wanted:
                next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = (
                    math.nan
                )
            gate(model, step, row_ids)

        return spoilt

    if name == "weight":
        _spoil_weight(wanted)
    elif name == "gradient":
        patch_gate("gate_gradients", spoilt_gradient)
    elif name == "loss":
        patch_gate("gate_loss", spoilt_loss)
    else:
        _spoil_column(name, wanted)


def _spoil_column(name: str, wanted: int) -> None:
    """One number of PPO's rollout, before its gate."""
    from spavl_lib.trainers import ppo_rollout

    inner = ppo_rollout.check_finite

    def spoilt(rollout: Any, step: int) -> None:
        if step == wanted:
            rollout.columns[name].view(-1)[0] = math.inf
        inner(rollout, step)

    ppo_rollout.check_finite = spoilt


def _spoil_weight(wanted: int) -> None:
    """After a step is done and before it is saved."""
    ppo = os.environ["SPAVL_KIND"] == "ppo"
    if ppo:
        owner, name = trainer_module().PPOTrainer, "_log"
    else:
        from spavl_lib.trainers.progress import StageCallback as owner

        name = "on_step_end"
    inner = getattr(owner, name)

    def spoiling(self: Any, *args: Any, **more: Any) -> Any:
        model = self.model if ppo else self.trainer.model
        if (self.step if ppo else self.trainer.state.global_step) == wanted:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = math.inf
        return inner(self, *args, **more)

    setattr(owner, name, spoiling)


def limit_file_size(size: str) -> None:
    """No file may grow beyond so many bytes: what a full disk does, without filling one."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))


def dropout(share: str) -> None:
    """Training with dropout on: only then does a lost random state show."""
    from spavl_lib.trainers import dpo

    build = dpo.lora_config

    def with_dropout(*args: Any) -> Any:
        config = build(*args)
        config.lora_dropout = float(share)
        return config

    dpo.lora_config = with_dropout
    arguments = dpo.TRLConfig

    def keeping(**options: Any) -> Any:
        return arguments(disable_dropout=False, **options)

    dpo.TRLConfig = keeping
    dpo.check_reference = lambda logs, **_: None


def answers_instead(rows: str) -> None:
    """Not the command, but the stage of answers over so many rows of each set."""
    import sys

    from spavl_lib import cli
    from spavl_lib.config import load_config
    from spavl_lib.errors import SpavlError
    from spavl_lib.generation.stage import make_inference_stage
    from spavl_lib.runs.stage import Run

    def answer(_: list[str]) -> None:
        few = {"data.test_rows": int(rows), "generation.batch_size": 2}
        few |= {"generation.max_new_tokens": 8, "generation.do_sample": True}
        config = load_config("smoke", few, run_name="r")
        try:
            make_inference_stage(config, Run(config).stage("inference"))
        except SpavlError as error:
            sys.stderr.write(f"spavl: {error}\n")
            sys.exit(error.exit_code)

    cli.main = answer


def both(faults: str) -> None:
    """Several, split by `&`."""
    for fault in faults.split("&"):
        name, _, argument = fault.partition(":")
        globals()[name](argument)


def profile(target: str) -> None:
    """Where the time goes, for a look at it."""
    import cProfile
    import pstats

    from spavl_lib import cli

    main = cli.main

    def profiled(words: list[str]) -> None:
        profiler = cProfile.Profile()
        try:
            profiler.runcall(main, words)
        finally:
            pstats.Stats(profiler).dump_stats(target)

    cli.main = profiled


def another_dtype(name: str) -> None:
    """As on a machine whose hardware asks for another precision."""
    from spavl_lib import machine

    machine.dtype_name = lambda: name


def another_version(named: str) -> None:
    """As if a package had been exchanged: `trl==2.0.0`."""
    import importlib.metadata

    package, _, version = named.partition("==")
    inner = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == package else inner(name)


def move_reference(by: str) -> None:
    """A reference that is not what the run began with: the base, a little further on."""
    from spavl_lib.trainers import dpo

    build = dpo.build_trainer

    def moved(*args: Any) -> Any:
        trainer = build(*args)
        model = trainer.ref_model or trainer.model
        with torch.no_grad():
            frozen = [p for p in model.parameters() if not p.requires_grad]
            frozen[-1].add_(float(by))
        return trainer

    dpo.build_trainer = moved


def blind(_: str) -> None:
    """A model that does not get to see the pictures."""
    from spavl_lib.trainers import probe

    inner = probe._logps

    def without(model: Any, batch: dict) -> Any:
        blank = {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in batch.items()}
        return inner(model, blank)

    probe._logps = without


def edit_data(path: str) -> None:
    """Somebody edits the data while the run trains on them."""

    def editing(gate: Any) -> Any:
        def edited(loss: Any, step: int, row_ids: list[str]) -> None:
            if step == 2:
                with Path(path).open("ab") as handle:
                    handle.write(b"x")
            gate(loss, step, row_ids)

        return edited

    patch_gate("gate_loss", editing)


def save_all_the_time(seconds: str) -> None:
    """The longest time without a checkpoint, cut short."""
    from spavl_lib.trainers import progress

    progress.LONGEST_UNSAVED_S = float(seconds)


def keep_saving(target: str) -> None:
    """Write a large notebook again and again, until killed."""
    import nbformat

    from spavl_lib.notebook.status import keep_notebook

    cells = [nbformat.v4.new_code_cell(f"x = {'1 + ' * 200} {n}") for n in range(200)]
    page = nbformat.v4.new_notebook(cells=cells)
    while True:
        keep_notebook(page, Path(target))
