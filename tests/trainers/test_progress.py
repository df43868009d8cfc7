"""What a summary says about the rows of metrics.jsonl, and what a stopped training says."""

from spavl_lib.runs.signals import StopFlag
from spavl_lib.trainers.progress import best_step, first_and_last_tenth, stopped


def test_the_best_step_is_the_first_lowest_that_was_measured() -> None:
    curve = {2: 0.6, 4: 0.4, 6: None, 8: 0.4, 10: 0.5}
    rows = [{"step": step, "loss": 0.1} for step in range(1, 11)]
    rows += [{"step": step, "eval_loss": value} for step, value in curve.items()]
    assert best_step(rows, "eval_loss") == {"step": 4, "metric": "eval_loss", "value": 0.4}
    assert best_step(rows[:10], "eval_loss") is None
    assert best_step([{"step": 1, "eval_loss": None}], "eval_loss") is None


def test_means_of_the_first_and_the_last_tenth_leave_out_what_was_not_logged() -> None:
    rows = [{"loss": float(n)} for n in range(1, 31)] + [{"loss": None}, {"other": 1.0}]
    assert first_and_last_tenth(rows, "loss") == {"first_steps": 2.0, "last_steps": 30.0}
    assert first_and_last_tenth(rows, "none") == {"first_steps": None, "last_steps": None}
    assert first_and_last_tenth([], "loss") == {"first_steps": None, "last_steps": None}


def test_a_stop_says_how_to_continue_in_a_terminal_and_in_a_notebook() -> None:
    flag = StopFlag()
    flag.reason = "SIGINT"
    assert str(stopped(flag, "after step 3 of 6")) == (
        "stopped by SIGINT after step 3 of 6; checkpoint written, run the same command or cell "
        "again to continue"
    )
