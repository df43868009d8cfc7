"""Runs of `spavl` in processes that may be killed: forked from one that has imported everything.

A start costs seconds, a fork of a process that is ready costs none; so twenty kills are affordable.
What runs in the fork is the command line itself, on a small set of rows.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

# Imported once, by the server that forks, and not again by every child. Nothing that starts threads
# may be called there. The last four are what a training imports while it builds its model.
PRELOAD = (
    "tests.reliability.processes", "spavl_lib.cli", "spavl_lib.trainers.dpo",
    "spavl_lib.trainers.reward", "spavl_lib.trainers.ppo", "spavl_lib.evaluation.suite",
    "spavl_lib.pipeline", "spavl_lib.plotting", "matplotlib.pyplot",
    "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava",
    "transformers.models.llava.image_processing_pil_llava",
    "peft.utils.transformers_weight_conversion",
)  # fmt: skip
OPTIONAL = ("deepspeed",)  # trl imports it, where it is installed, with its first trainer
_context = None


def context() -> multiprocessing.context.BaseContext:
    """The fork server, started with one thread a process: two would not survive a fork."""
    global _context
    if _context is None:
        for name in ("torch", "numpy"):
            importlib.import_module(name)
        _context = multiprocessing.get_context("forkserver")
        there = [n for n in OPTIONAL if importlib.util.find_spec(n)]
        _context.set_forkserver_preload([*PRELOAD, *there])
        # The server's alone: whatever this process starts later has its own number of threads.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
    return _context


def ready() -> None:
    """Wait until the fork server has imported what it is to import."""
    process = context().Process(target=time.monotonic, daemon=True)
    process.start()
    process.join()


@dataclass
class Child:
    """One `spavl` command in a process of its own."""

    process: multiprocessing.Process
    log: Path

    @property
    def said(self) -> str:
        """What it wrote on stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self, timeout_s: float = 300) -> int:
        """Its exit code; negative for a signal."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.said[-3000:]}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill_after(self, seconds: float) -> int:
        """SIGKILL then, wherever it is; its exit code."""
        self.process.join(seconds)
        self.signal(signal.SIGKILL)
        return self.wait()


def spavl(
    words: list[str], runs: Path, log: Path, *, fault: str = "", env: dict[str, str] | None = None
) -> Child:
    """Start `spavl WORDS` in a fork.

    Args:
        words: Of the command line.
        runs: Its runs folder.
        log: Takes stdout and stderr.
        fault: `module:function(argument)` of `tests.reliability.faults`, called before the command.
        env: Further variables.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    more = {"SPAVL_RUNS": str(runs), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"} | (env or {})
    process = context().Process(target=_child, args=(words, str(log), fault, more), daemon=True)
    process.start()
    return Child(process, log)


def _child(words: list[str], log: str, fault: str, env: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: PTH123
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: PTH123
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # what the server imported is not garbage
    if fault:
        from tests.reliability import faults

        name, _, argument = fault.partition(":")
        getattr(faults, name)(argument)
    from spavl_lib.cli import main

    main(words)


def until(condition: Callable[[], bool], child: Child, timeout_s: float = 120) -> None:
    """Wait for a condition while a child lives."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert child.process.is_alive(), f"ended early:\n{child.said[-3000:]}"
        assert time.monotonic() < end, f"{timeout_s} s passed:\n{child.said[-3000:]}"
        time.sleep(0.02)
