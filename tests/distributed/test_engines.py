"""Two processes train what one does, under each engine, also over the death of one of them."""

import os
import signal
from collections.abc import Callable

import pytest

from spavl_lib import pipeline
from spavl_lib.errors import InputError, RankError
from spavl_lib.runs.stage import Run
from tests.distributed.conftest import Result, alive, config_of, process_of, read, train, when

PAIRS = (("reward", "ddp"), ("dpo", "zero3"), ("ppo", "zero2"))
TOLERANCE = {"ddp": 1e-5, "zero2": 1e-5, "zero3": 1e-4}


def assert_equal_losses(result: Result, expected: Result, tolerance: float) -> None:
    assert result.losses.keys() == expected.losses.keys() and len(result.losses) >= 5
    for step, loss in expected.losses.items():
        assert result.losses[step] == pytest.approx(loss, abs=tolerance), step
    values = list(expected.losses.values())
    assert max(values) - min(values) > 1e-2  # steps differ, or equal losses would say nothing


@pytest.mark.slow
@pytest.mark.parametrize("engine", TOLERANCE)
@pytest.mark.parametrize("kind", ["reward", "dpo", "ppo"])
def test_two_processes_train_what_one_does_over_the_death_of_one(
    kind: str, engine: str, alone: Callable[[str], Result], pytestconfig: pytest.Config
) -> None:
    """Each trainer and each engine once; all nine pairs in the soak."""
    if (kind, engine) not in PAIRS and not pytestconfig.getoption("--soak"):
        pytest.skip("only in the soak")
    if engine != "ddp":
        pytest.importorskip("deepspeed", reason="the optional extra is not installed")
    config = config_of(kind, f"{kind}-{engine}", launch__num_processes=2, launch__engine=engine)
    stage = Run(config).stage(kind)
    pids: list[int] = []

    def kill() -> None:
        pids.extend(process_of(stage, rank) for rank in (0, 1))
        os.kill(pids[1], signal.SIGKILL)

    killer = when((stage.path / "checkpoints/step-2/MANIFEST.json").is_file, kill)
    with pytest.raises(
        RankError, match="rank 1 of 2 was killed by SIGKILL.*last checkpoint is kept"
    ):
        pipeline.train(kind, config, stage)
    killer.join()
    assert len(pids) == 2 and not any(map(alive, pids))
    assert not stage.done and not (stage.path / ".ranks").exists()

    pipeline.train(kind, config, stage)
    assert_trained_as_alone(read(stage), alone(kind), engine)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_two_processes_train_as_one_does(kind: str, alone: Callable[[str], Result]) -> None:
    """PPO has an engine of its own; the others train under accelerate's in the same way."""
    config = config_of(kind, f"{kind}-whole", launch__num_processes=2)
    assert_trained_as_alone(train(kind, config), alone(kind), "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_run_of_two_processes_goes_on_with_one_or_says_what_to_set(
    engine: str, alone: Callable[[str], Result]
) -> None:
    """The optimizer state of ddp is whole; shards of ZeRO fit only the same number of processes."""
    if engine != "ddp":
        pytest.importorskip("deepspeed", reason="the optional extra is not installed")
    name = f"fewer-{engine}"
    config = config_of("dpo", name, launch__num_processes=2, launch__engine=engine)
    stage = Run(config).stage("dpo")
    killer = when(
        (stage.path / "checkpoints/step-2/MANIFEST.json").is_file,
        lambda: os.kill(process_of(stage, 1), signal.SIGKILL),
    )
    with pytest.raises(RankError, match="last checkpoint is kept"):
        pipeline.train("dpo", config, stage)
    killer.join()
    fewer = config_of("dpo", name, launch__num_processes=1, launch__engine=engine)
    if engine == "ddp":
        result = train("dpo", fewer)
        assert result.summary["launch"] == {"engine": "none", "world_size": 1}
        assert_equal_losses(result, alone("dpo"), TOLERANCE["ddp"])
        return
    says = "by zero2 in 2 processes, but this run holds it by zero2 in 1 processes; use the launch"
    with pytest.raises(InputError, match=says):
        train("dpo", fewer)


def assert_trained_as_alone(result: Result, expected: Result, engine: str) -> None:
    """The same losses and weights; saved as one process saves, loadable without several."""
    assert result.summary["launch"] == {"engine": engine, "world_size": 2}
    assert_equal_losses(result, expected, TOLERANCE[engine])
    parameters = expected.summary["trainable_parameters"]
    assert result.summary["trainable_parameters"] == parameters
    saved = {p.name for p in (result.stage.path / "model").iterdir()}
    assert saved == {p.name for p in (expected.stage.path / "model").iterdir()}
    assert_same_model(result, expected, 2e-5 if engine != "zero3" else 2e-4)


def assert_same_model(result: Result, expected: Result, tolerance: float) -> None:
    from safetensors.torch import load_file

    for path in expected.stage.path.glob("model/*.safetensors"):
        theirs, ours = load_file(path), load_file(result.stage.path / "model" / path.name)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].shape == value.shape
            assert (ours[name] - value).abs().max() < tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_offload_to_the_cpu_changes_no_loss(
    engine: str, alone: Callable[[str], Result], pytestconfig: pytest.Config
) -> None:
    if engine == "zero2" and not pytestconfig.getoption("--soak"):
        pytest.skip("only in the soak")
    pytest.importorskip("deepspeed", reason="the optional extra is not installed")
    result = train(
        "dpo",
        config_of(
            "dpo", f"offload-{engine}", launch__num_processes=2, launch__engine=engine,
            launch__cpu_offload=True,
        ),
    )  # fmt: skip
    assert_equal_losses(result, alone("dpo"), TOLERANCE[engine])


def test_a_step_that_cannot_be_shared_out_is_refused() -> None:
    config = config_of("dpo", "uneven", launch__num_processes=3)
    with pytest.raises(InputError, match="must be a multiple of launch.num_processes = 3"):
        pipeline.train("dpo", config, Run(config).stage("dpo"))
    assert not Run(config).path.exists()
