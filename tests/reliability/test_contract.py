"""What a run may be taken up with, and what is refused by name before anything is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.runs.files import read_json
from spavl_lib.trainers import checkpoint as ckpt
from tests.helpers import files_of, hub_rows, write_hub_folder
from tests.reliability.conftest import Case

BASE = ASSETS / "model"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A LoRA DPO killed after step 4, on data and a base of its own, and its uninterrupted run."""
    root = tmp_path_factory.mktemp("contract")
    rows = write_hub_folder(root / "rows", hub_rows("train", 16), hub_rows("validation", 4))
    case = Case("dpo_lora", rows, root)
    shutil.copytree(BASE, root / "base")
    case.sets["model.name"] = str(root / "base")
    child = case.start("straight")
    assert child.wait() == 0, child.said[-2000:]
    case.straight = case.ended("straight")
    assert case.start("broken", fault="kill_in:backward@5").wait() == -9
    assert case.newest("broken") == 4
    return case


def copy_of(case: Case, name: str) -> None:
    """The broken run under another name, as often as it is needed."""
    shutil.copytree(case.root / "broken", case.root / name)


def untouched(case: Case, name: str) -> dict:
    files = files_of(case.stage(name))
    return {k: v for k, v in files.items() if Path(k).name not in (".lock",)}


SETTINGS = {
    "dpo.learning_rate": 2e-3,
    "dpo.per_device_batch_size": 2,
    "dpo.gradient_accumulation_steps": 2,
    "dpo.beta": 0.3,
    "model.lora_rank": 4,
}


def test_each_changed_setting_is_refused_by_name(broken: Case, record: Callable) -> None:
    """Ten: five settings, the seed, data, base, precision and a major version."""
    copy_of(broken, "settings")
    before = untouched(broken, "settings")
    refused = 0

    def refuses(field: str, **options: object) -> None:
        nonlocal refused
        child = broken.start("settings", **options)
        assert child.wait() == 2, child.said[-2000:]
        line = next(x for x in child.said.splitlines()[::-1] if x.strip().startswith(field))
        assert " -> " in line, line
        assert f"--allow-change {field}" in child.said
        child.log.unlink()
        assert untouched(broken, "settings") == before, field
        refused += 1

    for field, value in SETTINGS.items():
        refuses(field, changes={field: value})
    refuses("seed", seed=3)
    refuses("dtype", fault="another_dtype:bf16")
    refuses("versions.trl", fault="another_version:trl==99.0.0")
    (data,) = (broken.root / "rows/data").iterdir()
    weights = broken.root / "base/model.safetensors"
    for field, path in (("data/train", data), ("model/model.safetensors", weights)):
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
        refuses(field)
        path.write_bytes(whole)
    record("R7", refused, 10, "settings, inputs, precision and versions")


def test_an_allowed_change_takes_effect_and_is_recorded(broken: Case) -> None:
    """Another rate from step 5 on: other weights than the straight run's, and the log shows it."""
    copy_of(broken, "allowed")
    change = {"dpo.learning_rate": 2e-3}
    more = ("--allow-change", "dpo.learning_rate")
    child = broken.start("allowed", changes=change, more=more)
    assert child.wait() == 0, child.said[-2000:]
    manifest = read_json(broken.stage("allowed") / "manifest.json")
    assert manifest["resumed"][-1]["allowed_changes"] == ["dpo.learning_rate"]
    rates = {}
    for name in ("straight", "allowed"):
        log = json.loads(broken.ended(name).log)
        rates[name] = {r["step"]: r["learning_rate"] for r in log if "learning_rate" in r}
    for step in range(1, 7):
        factor = 1 if step <= 4 else 2
        assert rates["allowed"][step] == pytest.approx(
            factor * rates["straight"][step], rel=0.01
        ), step
    assert broken.ended("allowed").weights != broken.straight.weights
    # And the change is the run's own now: the first rate would be the changed one.
    (broken.stage("allowed") / "summary.json").unlink()
    assert broken.start("allowed").wait() == 2


def test_a_reference_that_moved_is_refused(broken: Case, record: Callable) -> None:
    for name, fault in (("moved", "move_reference:1e-3"), ("fixed", "move_reference:0")):
        copy_of(broken, name)
        before = untouched(broken, name)
        child = broken.start(name, fault=fault)
        if name == "fixed":
            assert child.wait() == 0, child.said[-2000:]
            assert broken.ended(name) == broken.straight
        else:
            assert child.wait() == 2, child.said[-2000:]
            assert "the reference is not the one that this run started with" in child.said
            after = untouched(broken, name)
            assert {k for k in after if after[k] != before.get(k)} <= {"manifest.json"}
    record("R4", 2, 2, "moved by 1e-3 refused; unmoved equal to the bit")


def test_a_model_that_does_not_look_is_refused(broken: Case) -> None:
    child = broken.start("blind", fault="blind:")
    assert child.wait() == 2 and "the model ignores the images" in child.said
    assert not broken.stage("blind").exists()


def test_data_edited_on_the_way_spoil_the_result(broken: Case) -> None:
    (data,) = (broken.root / "rows/data").iterdir()
    whole = data.read_bytes()
    child = broken.start("edited", fault=f"edit_data:{data}")
    code = child.wait()
    data.write_bytes(whole)
    assert code == 2 and "data/train changed while" in child.said, child.said[-2000:]
    assert not (broken.stage("edited") / "summary.json").exists()


def test_a_finished_run_is_left_as_it_is(broken: Case, record: Callable) -> None:
    before = untouched(broken, "straight")
    times = {p: p.stat().st_mtime_ns for p in broken.stage("straight").rglob("*")}
    for _ in range(3):
        assert broken.start("straight").wait() == 0
        assert untouched(broken, "straight") == before
        assert {p: p.stat().st_mtime_ns for p in broken.stage("straight").rglob("*")} == times
    record("R6", 3, 3, "steps 0, files changed 0")


def test_a_finished_run_of_other_data_is_no_answer(broken: Case) -> None:
    (data,) = (broken.root / "rows/data").iterdir()
    whole = data.read_bytes()
    data.write_bytes(whole + b"x")
    child = broken.start("straight")
    code = child.wait()
    data.write_bytes(whole)
    assert code == 2 and "data/train:" in child.said


# --- damage -------------------------------------------------------------------------------------


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "removed":
        path.unlink()
        return
    if kind.startswith("flipped"):
        place = {"flipped": len(content) // 2, "flipped-first": 0, "flipped-last": -1}[kind]
        content[place] ^= 1
    path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b""}.get(kind, content))


KINDS = ("removed", "truncated", "emptied", "flipped", "flipped-first", "flipped-last")


def test_every_damaged_file_is_found_and_the_checkpoint_before_is_used(
    broken: Case, soak: bool, tmp_path: Path, record: Callable
) -> None:
    source = broken.stage("broken") / "checkpoints"
    names = sorted(p.name for p in (source / "step-4").iterdir())
    cases = [(n, k) for n in names for k in KINDS]
    assert len(cases) == 36, names
    for number, (name, kind) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        damage(folder / "step-4" / name, kind)
        newest, skipped = ckpt.latest_checkpoint(folder)
        assert newest is not None and newest.name == "step-2", (name, kind)
        assert len(skipped) == 1 and f"step-4/{name}" in skipped[0], skipped
    resumed = cases if soak else [cases[0], ("optimizer.safetensors", "flipped")]
    for name, kind in resumed:
        run = f"damaged-{name}-{kind}"
        copy_of(broken, run)
        damage(broken.stage(run) / "checkpoints/step-4" / name, kind)
        child = broken.start(run)
        assert child.wait() == 0, child.said[-2000:]
        assert name in child.said and "using an older checkpoint" in child.said
        assert broken.ended(run) == broken.straight
        shutil.rmtree(broken.root / run)
    record("R8", 36, 36, f"found and named; {len(resumed)} of them taken up to the same bits")
