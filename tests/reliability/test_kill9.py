"""SIGKILL anywhere: the same command goes on, and ends in the same bits."""

import random
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from spavl_lib.trainers import checkpoint as ckpt
from tests.reliability.conftest import ALGORITHMS, SAVE_STEPS, STEPS, Case

# Moments that chance would rarely hit; @ says which call of it.
PHASES = {
    "reward": ("data", "backward@4", "save@4", "seal@6", "score@2"),
    "dpo": ("build", "forward@3", "optimizer@3", "save@5", "logging@7", "evaluate", "summary"),
    "ppo": (
        "rollout@1",
        "rollout@4",
        "rollout@6",
        "reward@1",
        "reward@3",
        "reward@6",
        "update@2",
        "update@9",
        "update@22",
        "save@2",
        "seal@5",
        "save@8",
    ),
}
SHORT_PHASES = {"dpo_lora": ("optimizer@3",), "ppo": ("rollout@4", "update@9")}


def resume(case: Case, name: str) -> None:
    """The same command, until it is done; at most three times."""
    child = case.start(name)
    assert child.wait() == 0, child.said[-3000:]


def compare(case: Case, name: str) -> None:
    assert case.ended(name) == case.straight, name


# One trainer in every test run, phases of PPO (whose loop is its own) among the slow tests, all in
# the soak.
EACH = [pytest.param(a, marks=() if a == "dpo_lora" else pytest.mark.slow) for a in ALGORITHMS]


@pytest.mark.parametrize("algorithm", EACH)
def test_killed_at_any_time_it_ends_in_the_same_bits(
    cases: Callable[[str], Case], algorithm: str, soak: bool, dice: random.Random, record: Callable
) -> None:
    if not soak and algorithm != "dpo_lora":
        pytest.skip("only in the soak")
    case, kills = cases(algorithm), 20 if soak else 1
    killed, inside, n = 0, 0, 0 if soak else 1
    while killed < kills:
        name = f"kill{n}"
        child = case.start(name)
        if n % 4:  # while it trains: at a random time after a random step
            wait_for = dice.randrange(STEPS)
            while case.logged(name) < wait_for and child.process.is_alive():
                time.sleep(0.005)
            moment = dice.random() * case.took_s / (2 * STEPS)
        else:  # over the whole run, from the first line of it
            moment = dice.random() * case.took_s
        code, n = child.kill_after(moment), n + 1
        assert code in (0, -9) and n < 3 * kills, child.said[-3000:]
        if code == 0:  # it was done before: no kill
            continue
        killed += 1
        logged, saved = case.logged(name), case.newest(name)
        inside += 0 < logged and not (case.stage(name) / "summary.json").exists()
        assert logged - saved <= SAVE_STEPS, f"{logged - saved} steps lost"
        resume(case, name)
        compare(case, name)
    record("R1", killed, kills, algorithm, after_a_first_step=inside)


@pytest.mark.parametrize("algorithm", EACH)
def test_killed_in_a_phase_it_ends_in_the_same_bits(
    cases: Callable[[str], Case], algorithm: str, soak: bool, record: Callable
) -> None:
    if not soak and algorithm not in SHORT_PHASES:
        pytest.skip("only in the soak")
    case = cases(algorithm)
    phases = PHASES[case.kind] if soak else SHORT_PHASES[algorithm]
    for phase in phases:
        name = f"phase-{phase}"
        child = case.start(name, fault=f"kill_in:{phase}")
        assert child.wait() == -9, f"{phase}: was never reached\n{child.said[-2000:]}"
        resume(case, name)
        compare(case, name)
    row = "R5" if algorithm == "ppo" else "R1"
    record(row, len(phases), len(phases), f"{algorithm} by phase, in {', '.join(phases)}")


@pytest.mark.slow
def test_dead_at_any_write_it_goes_on_from_the_last_whole_checkpoint(
    cases: Callable[[str], Case], soak: bool, dice: random.Random, record: Callable
) -> None:
    """Before, after and in the middle of every file, the seal, the rename and the clearing away."""
    case = cases("dpo_lora")
    count = case.root / "count"
    child = case.start("counted", fault="die_at_write:0", SPAVL_COUNT=str(count))
    assert child.wait() == 0, child.said[-2000:]
    points = int(count.read_text())
    assert points >= 3 * 12
    wanted = 25 if soak else 2
    bounds = [k * points // wanted for k in range(wanted + 1)]  # one of each stretch, none twice
    for number in (1 + dice.randrange(a, b) for a, b in pairwise(bounds)):
        name = f"torn{number}"
        assert case.start(name, fault=f"die_at_write:{number}").wait() == 9
        folder = case.stage(name) / "checkpoints"
        whole = [p for p in folder.glob("step-*") if ckpt.problem_with(p) is None]
        assert case.logged(name) - case.newest(name) <= SAVE_STEPS and len(whole) <= 3
        resume(case, name)
        compare(case, name)
    record("R2", wanted, wanted, f"of {points} points in three saves")
