"""The precision: one function decides it, and config, manifest, children and reruns agree on it."""

import ast
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from spavl_lib import machine, rerun, stages
from spavl_lib.config import from_dict, load_config
from spavl_lib.distributed import launcher
from spavl_lib.errors import InputError
from spavl_lib.modelling import load
from spavl_lib.notebook.session import open_stage
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.maker import _MAKERS, maker_of, stage_maker
from spavl_lib.runs.stage import Run, Stage, recorded_dtype
from tests.helpers import smoke

LIBRARY = Path(__file__).parents[2] / "spavl_lib"
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.DTYPE, raising=False)


# --- one function -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH)
def test_the_variable_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DTYPE, name)
    assert machine.dtype_name() == name and load.compute_dtype() is TORCH[name]
    context = load.autocast()
    assert context._enabled is (name != "fp32")
    assert name == "fp32" or context.fast_dtype is TORCH[name]


@pytest.mark.parametrize(
    ("gpu", "bf16", "expected"),
    [(False, False, "fp32"), (True, True, "bf16"), (True, False, "fp16")],
)
def test_the_hardware_decides_if_it_is_unset(
    gpu: bool, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert machine.dtype_name() == expected
    monkeypatch.setenv(machine.DTYPE, "")  # empty is unset
    assert machine.dtype_name() == expected


@pytest.mark.parametrize("bad", ["float16", "BF16", "16", "int8"])
def test_another_word_is_refused_before_anything_is_read(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.DTYPE, bad)
    with pytest.raises(InputError, match=rf"SPAVL_DTYPE is '{bad}'.*bf16, fp16, fp32"):
        load_config("smoke")
    with pytest.raises(InputError, match="SPAVL_DTYPE"):
        machine.dtype_name()


CHOICES = ("float16", "bfloat16", "is_bf16_supported")
# Reads of a half-precision type by name, with the reason why each is no decision.
ALLOWED = {
    "trainers/engines.py": "which of DeepSpeed's sections, and whether a scaler is needed",
    "trainers/arguments.py": "which of transformers' two flags",
    "trainers/embedded_base.py": "the file format of the embedded model",
    "machine.py": "the function itself",
    "report/playground/weights.py": "the file format of the playground's weights",
}


def test_nothing_else_chooses_a_half_precision_type() -> None:
    found = set()
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in CHOICES:
                found.add(str(path.relative_to(LIBRARY)))
    assert found == ALLOWED.keys()


# --- the setting, its record, and its comparison --------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions in which a maker that stands in for DPO's computed."""
    computed: list[str] = []
    monkeypatch.setattr("spavl_lib.trainers.inputs.model_hashes", lambda config: {})
    maker_of("dpo")

    def make(config: object, stage: Stage, flag: object) -> dict:
        computed.append(machine.dtype_name())
        stage.log({"step": 1})
        return {"made": len(computed)}

    monkeypatch.setitem(_MAKERS, "dpo", _MAKERS["dpo"])  # put back what stands there
    stage_maker("dpo", inputs=lambda config, stage: {}, polls_stop=True)(make)
    return computed


def make(root: Path, **overrides: object) -> Stage:
    config = smoke(overrides)
    stage = Run(config, root=root).stage("dpo")
    maker_of("dpo")(config, stage)
    return stage


@pytest.mark.parametrize("name", TORCH)
def test_config_and_manifest_name_it(
    name: str, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.DTYPE, name)
    stage = make(tmp_path)
    manifest = read_json(stage.path / "manifest.json")
    assert manifest["dtype"] == manifest["config"]["dtype"] == name == made[0]
    assert yaml.safe_load((stage.path / "config.yaml").read_text())["dtype"] == name
    assert "dtype" not in manifest["overridden"]


def test_a_setting_goes_before_the_variable_and_only_for_its_stage(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.DTYPE, "fp16")
    stage = make(tmp_path, dtype="bf16")
    assert made == ["bf16"] and os.environ[machine.DTYPE] == "fp16"
    assert "dtype" in read_json(stage.path / "manifest.json")["overridden"]
    monkeypatch.delenv(machine.DTYPE)
    make(tmp_path / "second", dtype="bf16")
    assert made == ["bf16"] * 2 and machine.DTYPE not in os.environ
    with pytest.raises(InputError, match="dtype"):
        smoke({"dtype": "float16"})


def test_a_notebook_takes_its_setting_into_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(machine.DTYPE, "fp32")  # put back at the end
    monkeypatch.setenv("SPAVL_RUNS", str(tmp_path))
    open_stage("dpo", "smoke", overrides={"dtype": "bf16"})
    assert load.compute_dtype() is torch.bfloat16
    assert "bf16" in capsys.readouterr().out


@pytest.mark.parametrize("complete", [True, False])
def test_a_stage_is_not_continued_in_another_precision(
    complete: bool, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make(tmp_path)
    if not complete:
        (stage.path / "summary.json").unlink()
    monkeypatch.setenv(machine.DTYPE, "bf16")
    with pytest.raises(InputError, match=r"dtype: 'fp32' -> 'bf16'(?s:.*)SPAVL_DTYPE=fp32"):
        make(tmp_path)
    assert len(made) == 1
    if not complete:
        monkeypatch.setenv("SPAVL_ALLOW_CHANGE", "dtype")
        make(tmp_path)
        resumed = read_json(stage.path / "manifest.json")["resumed"]
        assert resumed[-1]["allowed_changes"] == ["dtype"]


def test_every_stage_in_which_models_compute_is_compared() -> None:
    named = {name for name, spec in stages.all_stages().items() if spec.computes}
    assert named == {
        "reward", "dpo", "ppo", "practice", "rloo", "grpo", "kto", "online_dpo", "inference",
        "scaling", "laboratory",
    }  # fmt: skip


def test_stages_that_renew_their_result_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Run(smoke(), root=tmp_path).stage("inference")
    with stage.work({}, renew=True):
        stage.log({"step": 1})
    monkeypatch.setenv(machine.DTYPE, "bf16")
    with pytest.raises(InputError, match="dtype"), stage.work({}, renew=True):
        pass


def test_older_manifests_name_it_among_the_inputs(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make(tmp_path)
    manifest = read_json(stage.path / "manifest.json")
    del manifest["dtype"], manifest["config"]["dtype"]
    manifest["inputs"]["dtype"] = "float32"
    write_json(stage.path / "manifest.json", manifest)
    assert recorded_dtype(manifest) == "fp32"
    make(tmp_path)
    monkeypatch.setenv(machine.DTYPE, "fp16")
    with pytest.raises(InputError, match="'fp32' -> 'fp16'"):
        make(tmp_path)
    assert rerun._read(stage.path)[1].dtype == "fp32"


def test_a_rerun_computes_in_the_runs_precision(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.DTYPE, "bf16")
    stage = make(tmp_path)
    monkeypatch.delenv(machine.DTYPE)
    said = list(rerun.condition_differences(*rerun._read(stage.path), "dpo"))
    assert [line for line in said if line.startswith("dtype: 'bf16' -> 'fp32'")]
    rerun.make_again(stage.run.path, "dpo", tmp_path / "again")
    assert made == ["bf16", "bf16"]
    assert read_json(tmp_path / "again/smoke/dpo/manifest.json")["dtype"] == "bf16"


def test_children_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DTYPE, "bf16")
    config = smoke({"launch.num_processes": 2})
    stage = Run(config, root=tmp_path).stage("dpo")
    words, env = launcher._command("dpo", config, stage, tmp_path, tmp_path)
    path = Path(words[words.index("dpo") + 1])
    told = from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert told == dataclasses.replace(config, dtype="bf16")
    assert env[machine.DTYPE] == "bf16"
    assert json.loads(json.dumps(told.to_dict()))["dtype"] == "bf16"
