"""Reference log-probs kept beside the runs: the same training, and no other model's numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import reference_cache
from spavl_lib.trainers.dpo import train_dpo
from spavl_lib.trainers.reference_cache import NAMES, read_cache, write_cache
from tests.helpers import hub_rows, smoke, write_hub_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*checkpoint.*")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_hub_folder(folder, hub_rows("train", 12), hub_rows("validation", 4))


def train(rows: Path, root: Path, name: str, **changes: object) -> Stage:
    overrides = {
        "data.source": "hub_layout", "data.path": str(rows), "data.train_rows": 0,
        "data.validation_rows": 0, "dpo.max_steps": 4, "dpo.per_device_batch_size": 4,
        "dpo.cache_reference": True, "dpo.learning_rate": 1e-3, "dpo.warmup_steps": 1,
        **{k.replace("__", "."): v for k, v in changes.items()},
    }  # fmt: skip
    config = smoke(overrides, run_name=name)
    stage = Run(config, root=root).stage("dpo")
    train_dpo(config, stage)
    return stage


def numbers(stage: Stage) -> list[dict]:
    kept = ("loss", "grad_norm", "rewards/margins", "eval_loss")
    return [{k: r[k] for k in kept if k in r} for r in read_jsonl(stage.metrics_path)]


@pytest.mark.slow
def test_computed_once_and_the_training_is_the_same(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(rows, tmp_path, "plain", dpo__cache_reference=False)
    first = train(rows, tmp_path, "first")
    files = sorted((tmp_path / "reference_logps").iterdir())
    assert len(files) == 2  # training and held-out rows
    stamps = [f.stat().st_mtime_ns for f in files]

    def computed(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference_cache, "_fill", computed)
    second = train(rows, tmp_path, "second")
    assert numbers(second) == numbers(first)  # to the bit
    for ours, theirs in zip(numbers(first), numbers(plain), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3, rel=2e-3)
    assert second.summary["weights_sha256"] == first.summary["weights_sha256"]
    # another beta is the same reference; other rows, limits and batches are not
    train(rows, tmp_path, "beta", dpo__beta=0.5)
    assert [f.stat().st_mtime_ns for f in files] == stamps
    for change in ({"data__train_rows": 8}, {"dpo__max_length": 200}):
        with pytest.raises(AssertionError, match="computed again"):
            train(rows, tmp_path, f"other{next(iter(change))}", **change)


@pytest.mark.slow
def test_a_full_fine_tuning_lets_its_reference_go(rows: Path, tmp_path: Path) -> None:
    changes = {"model__adapter": "full", "dpo__max_steps": 2}
    cached = train(rows, tmp_path, "cached", **changes)
    plain = train(rows, tmp_path, "plain", **changes, dpo__cache_reference=False)
    for ours, theirs in zip(numbers(cached), numbers(plain), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3, rel=2e-3)


def test_an_interrupted_computation_is_taken_up(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl

    calls, real = [], trl.DPOTrainer.compute_ref_log_probs

    def stops(self: object, model: object, inputs: dict) -> object:
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, model, inputs)

    monkeypatch.setattr(trl.DPOTrainer, "compute_ref_log_probs", stops)
    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path, "run")
    done = [load_file(f) for f in (tmp_path / "reference_logps").iterdir()]
    assert [int((~d[NAMES[0]].isnan()).sum()) for d in done] == [8]
    train(rows, tmp_path, "run")
    assert calls == [8, 8, 8, 8, 8]  # two, the stopped one, the third again, the held-out rows


def test_a_torn_or_foreign_file_is_told_and_not_used(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {n: torch.tensor([1.0, 2.0]) for n in NAMES}
    write_cache(path, "key", values)
    whole = path.read_bytes()
    for name in NAMES:
        assert torch.equal(read_cache(path, "key", 2)[name], values[name])
    with pytest.warns(UserWarning, match="does not match its hash"):
        assert read_cache(path, "another key", 2)[NAMES[0]].isnan().all()
    for broken in (whole[:-3], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match="computed again"):
            assert read_cache(path, "key", 2)[NAMES[0]].isnan().all()
    save_file({"ref_chosen_logps": torch.zeros(2)}, path)
    with pytest.warns(UserWarning, match="computed again"):
        assert read_cache(path, "key", 2)[NAMES[0]].isnan().all()
