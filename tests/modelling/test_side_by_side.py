"""Two roles of PPO at the same time: the same numbers to the last bit, and the same errors."""

import threading
from pathlib import Path

import pytest
import torch

from spavl_lib import machine
from spavl_lib.modelling.speed import side_by_side
from spavl_lib.modelling.speed.side_by_side import SideBySide
from tests.trainers.test_train_ppo import settings, trainer_of


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)


def test_both_run_at_the_same_time_and_both_results_come_back(two_cores: None) -> None:
    meeting = threading.Barrier(2)

    def meet() -> tuple[str, int]:
        meeting.wait(20)  # breaks if the other one starts only afterwards
        return threading.current_thread().name, torch.get_num_threads()

    (first, threads), (second, others) = SideBySide(True)(meet, meet)
    assert first == threading.current_thread().name != second
    assert threads == others == 1


@pytest.mark.parametrize("condition", ["shared", "GPU", "processes", "threads", "cores"])
def test_each_condition_alone_keeps_one_after_the_other(
    condition: str, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SideBySide(True).works
    if condition == "GPU":
        monkeypatch.setattr(side_by_side, "device", lambda: torch.device("cuda"))
    elif condition == "processes":
        monkeypatch.setattr(machine, "world_size", lambda: 2)
    elif condition == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    elif condition == "cores":
        monkeypatch.setattr(machine, "cores", lambda: 1)
    call = SideBySide(condition != "shared")
    assert not call.works
    order = []
    note = lambda name: order.append((name, threading.current_thread()))  # noqa: E731
    call(lambda: note("first"), lambda: note("second"))
    assert order == [(name, threading.current_thread()) for name in ("first", "second")]


def test_an_error_of_either_comes_out_after_both_have_ended(two_cores: None) -> None:
    ended = threading.Event()

    def fail(name: str) -> None:
        raise ValueError(name)

    def late() -> None:
        threading.Event().wait(0.2)
        ended.set()

    with pytest.raises(ValueError, match="first"):
        SideBySide(True)(lambda: fail("first"), late)
    assert ended.is_set()
    with pytest.raises(ValueError, match="second"):
        SideBySide(True)(lambda: None, lambda: fail("second"))
    with pytest.raises(ValueError, match="first"):
        SideBySide(True)(lambda: fail("first"), lambda: fail("second"))


def test_ppo_gives_the_same_numbers_to_the_last_bit(
    reward_folders: dict[str, Path], two_cores: None, tmp_path: Path
) -> None:
    """With micro-batches, several updates and the cross-entropy of the chosen answers."""
    found = {}
    for allowed in (False, True):
        config = settings(reward_folders["full"], ppo__sft_coef=1.0)
        trainer = trainer_of(config, tmp_path / str(allowed))
        assert trainer.side_by_side.works
        trainer.side_by_side.allowed = allowed
        with trainer.tower_cache().rollout() as cache:
            rollout = trainer.roll_out(0, cache)
            stats = trainer.update(rollout, cache)
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        found[allowed] = stats, rollout.columns, weights
    (plain, columns, weights), (stats, together, others) = found.values()
    assert stats == plain and stats["loss/sft_avg"] > 0
    assert all(torch.equal(columns[name], together[name]) for name in columns)
    assert all(map(torch.equal, weights, others))


def test_roles_that_share_a_base_never_run_together(
    reward_folders: dict[str, Path], two_cores: None, tmp_path: Path
) -> None:
    assert not trainer_of(settings(reward_folders["lora"]), tmp_path).side_by_side.works
