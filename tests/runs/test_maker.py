"""The front door of makers: variables of other launchers end there."""

import os
from pathlib import Path
from typing import Any

import pytest

from spavl_lib.distributed import launcher
from spavl_lib.errors import InputError
from spavl_lib.machine import WORKER
from spavl_lib.notebook.session import open_stage
from spavl_lib.runs.maker import leave_other_launchers, maker_of
from spavl_lib.runs.stage import Run, Stage
from tests.helpers import smoke

FOREIGN = {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "2",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "RANK": "0", "LOCAL_RANK": "0",
    "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "7", "PMI_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0",
    "MV2_COMM_WORLD_SIZE": "1", "PARALLELISM_CONFIG_CP_COMM_STRATEGY": "x", "FORK_LAUNCHED": "1",
}  # fmt: skip
OURS = {"OMP_NUM_THREADS": "1", "SLURM_PROCID": "0", "SPAVL_RUNS": "runs", "HF_HOME": "x",
        "MY_RANK": "3", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


class Opened(Exception):
    """The stage's folder was opened: the door let the work begin."""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKER, raising=False)
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    for name in FOREIGN:  # the test's own end restores what stood there
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def stage_of(name: str, tmp_path: Path, **settings: Any) -> tuple[Any, Stage]:
    config = smoke(settings, run_name="r")
    return config, Run(config, root=tmp_path).stage(name)


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_each_is_named_and_removed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(name, FOREIGN[name])
    leave_other_launchers(smoke().launch)
    assert name not in os.environ and not OURS.keys() - os.environ.keys()
    assert f"ignored: {name} of another launcher" in capsys.readouterr().out
    leave_other_launchers(smoke().launch)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("size", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("kind", ["reward", "dpo", "ppo", "rloo", "inference"])
def test_one_of_several_foreign_processes_is_refused_before_it_waits(
    kind: str, size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(size, "2")
    config, stage = stage_of(kind, tmp_path)
    monkeypatch.setattr(f"{maker_of(kind).__module__}.load_rows", None, raising=False)
    monkeypatch.setattr(Stage, "work", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(InputError, match="another launcher started 2 .*unset") as refused:
        maker_of(kind)(config, stage)
    assert "RANK" in str(refused.value) and size in str(refused.value)


@pytest.mark.parametrize("door", ["maker", "launcher", "notebook"])
def test_every_door_looks(door: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(*_: Any, **__: Any) -> None:
        assert not FOREIGN.keys() & os.environ.keys()
        raise Opened

    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    if door == "notebook":
        monkeypatch.setenv("SPAVL_RUNS", str(tmp_path))
        open_stage("dpo", "smoke")
        assert not FOREIGN.keys() & os.environ.keys()
        return
    several = {"launch.num_processes": 2, "dpo.gradient_accumulation_steps": 2}
    config, stage = stage_of("dpo", tmp_path, **(several if door == "launcher" else {}))
    monkeypatch.setattr(Stage, "work", opened)
    monkeypatch.setattr(launcher, "train_in_processes", opened)
    with pytest.raises(Opened):
        launcher.make("dpo", config, stage)


def test_fsdp_is_refused_and_the_engine_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(Stage, "work", lambda *_, **__: pytest.fail("the work began"))
    config, stage = stage_of("dpo", tmp_path)
    with pytest.raises(
        InputError, match="FSDP.* unset it, and set launch.engine to zero2"
    ) as error:
        launcher.make("dpo", config, stage)
    assert "\n" not in str(error.value)
    with pytest.raises(
        InputError, match="launch.engine must be 'ddp', 'zero2' or 'zero3', got 'fs"
    ):
        smoke({"launch.engine": "fsdp"})


def test_our_own_processes_keep_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(WORKER, str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    leave_other_launchers(smoke({"launch.num_processes": 2}).launch)
    assert os.environ["WORLD_SIZE"] == "2"


@pytest.mark.parametrize("number", [3, 0])
def test_a_stage_computes_with_the_threads_of_its_settings(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise Opened

    set_to: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    monkeypatch.setattr(Stage, "work", opened)
    config, stage = stage_of("dpo", tmp_path, **{"launch.num_threads": number})
    with pytest.raises(Opened):
        maker_of("dpo")(config, stage)
    monkeypatch.setenv("SPAVL_RUNS", str(tmp_path))
    open_stage("dpo", "smoke", overrides={"launch.num_threads": number})
    assert set_to == ([number] * 2 if number else [])
