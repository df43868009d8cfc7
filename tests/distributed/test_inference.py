"""Rows shared out among processes: one file, the very one that one process writes."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from spavl_lib import pipeline
from spavl_lib.errors import RankError
from spavl_lib.generation import generate as generation
from spavl_lib.generation.stage import make_inference_stage
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from tests.distributed.conftest import alive, config_of, process_of, train, when

QUICK = {
    "generation__max_new_tokens": 12, "generation__batch_size": 2, "data__test_rows": 14,
    "evaluation__held_out_drawings": False, "dpo__max_steps": 1,
}  # fmt: skip


def answers(stage: Stage) -> dict[str, bytes]:
    return {
        str(p.relative_to(stage.path)): p.read_bytes() for p in sorted(stage.path.rglob("*.jsonl"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_two_processes_write_the_file_of_one_over_the_death_of_one(
    sampled: bool, pytestconfig: pytest.Config
) -> None:
    if not sampled and not pytestconfig.getoption("--soak"):
        pytest.skip("only in the soak")
    quick = QUICK | {"generation__do_sample": sampled}
    name = f"answers-{sampled}"
    alone = config_of("dpo", f"{name}-alone", **quick)
    train("dpo", alone)
    make_inference_stage(alone, Run(alone).stage("inference"))  # of DPO's model alone
    expected = answers(Run(alone).stage("inference"))
    assert len(expected) >= 6 and all(b.count(b"\n") >= 10 for b in expected.values())

    # The same model, answering in two processes.
    two = config_of("dpo", name, **quick, launch__num_processes=2)
    shutil.copytree(Run(alone).stage("dpo").path, Run(two).stage("dpo").path)
    stage = Run(two).stage("inference")
    pids: list[int] = []

    def kill() -> None:
        pids.extend(process_of(stage, rank) for rank in (0, 1))
        os.kill(pids[1], signal.SIGKILL)

    def some_written() -> bool:
        return any(p.stat().st_size > 2000 for p in stage.path.rglob("*.partial-1"))

    killer = when(some_written, kill)
    with pytest.raises(RankError, match="rank 1 of 2 was killed by SIGKILL"):
        pipeline.make("inference", two)
    killer.join()
    assert not any(map(alive, pids))
    kept = sum(p.read_text().count('"batch"') for p in stage.path.rglob("*.partial*"))
    assert kept > 0  # work that the second call takes up
    pipeline.make("inference", two)
    assert answers(stage) == expected
    assert not list(stage.path.rglob("*.partial*"))
    ids = [r["id"] for r in read_jsonl(next(stage.path.rglob("harm.jsonl")))]
    assert len(ids) == len(set(ids))


def test_partial_files_of_more_processes_than_now_are_taken_up(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    for rank, number in ((0, 0), (3, 1)):
        generation._resume(generation._partial(target, rank), "key")
        with generation._partial(target, rank).open("a") as handle:
            handle.write(f'{{"batch": {number}, "records": [{{"id": "{number}"}}]}}\n')
    found = {}
    for path in generation._partials(target):
        found |= generation._finished(path, "key")
        assert generation._finished(path, "another key") == {}
    assert found == {0: [{"id": "0"}], 1: [{"id": "1"}]}
