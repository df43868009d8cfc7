"""DPO end to end on the embedded model: repeatable, resumable, refusing to be silently wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import modeling_utils

from spavl_lib.data.convert import convert
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import BusyError, InputError, NonFiniteError, Preempted
from spavl_lib.modelling.adapters import freeze_for_full, trainable_parts
from spavl_lib.modelling.load import load_model, load_policy
from spavl_lib.objectives.dpo import dpo_loss
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers import exact_trainer
from spavl_lib.trainers.dpo import build_trainer, train_dpo
from tests.helpers import (
    count_calls,
    embedded_model,
    embedded_processor,
    files_of,
    hub_rows,
    logps_of,
    metric_rows,
    original_record,
    smoke,
    write_hub_folder,
    write_original_folder,
)

ADAPTERS = ("lora", "full")
STEPS, SAVED_EVERY = 6, 2
# Full fine-tuning runs the plain DPO loss, LoRA the default sum with the chosen answer's entropy.
LOSSES = {"full": {"dpo.loss_type": "sigmoid", "dpo.loss_weights": "1.0"}, "lora": {}}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training pairs and 8 held-out ones, in the Hub's layout."""
    folder = tmp_path_factory.mktemp("rows")
    return write_hub_folder(folder, told_by_words("train", 24), told_by_words("validation", 8))


def told_by_words(split: str, count: int) -> list[dict]:
    """Pairs that six steps can learn: the rejected answer carries the placeholder."""
    rows = hub_rows(split, {"train": 900, "validation": 300}[split])
    return [r for r in rows if "[unsafe details omitted]" in r["rejected"]][:count]


def settings(rows: Path, adapter: str, **changes: object) -> dict:
    return {
        "data.source": "hub_layout",
        "data.path": str(rows),
        "data.train_rows": 0,
        "data.validation_rows": 0,
        "model.adapter": adapter,
        "dpo.max_steps": STEPS,
        "dpo.per_device_batch_size": 4,
        "dpo.save_steps": SAVED_EVERY,
        "dpo.warmup_steps": 1,
        "dpo.learning_rate": 1e-3,
        **LOSSES[adapter],
        **{k.replace("__", "."): v for k, v in changes.items()},
    }


def make(overrides: dict, root: Path, *, live: object = None, seed: int = 0) -> Stage:
    """Train; the stage."""
    config = smoke(overrides, seed=seed, run_name="r")
    stage = Run(config, root=root).stage("dpo")
    train_dpo(config, stage, live=live)
    return stage


def weights(stage: Stage) -> str:
    return stage.summary["weights_sha256"]


class At:
    """A live plot that does something when a step is logged."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def update(self, rows: list[dict], **_: object) -> None:
        if rows and rows[-1]["step"] == self.step and "loss" in rows[-1]:
            self.action()


class Crash(Exception):
    """What a test makes a run die of."""


def crash() -> None:
    raise Crash


@pytest.fixture(scope="module")
def straight(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """One uninterrupted run of each kind."""
    root = tmp_path_factory.mktemp("straight")
    return {a: make(settings(rows, a), root / a) for a in ADAPTERS}


def assert_same_run(stage: Stage, other: Stage) -> None:
    assert metric_rows(stage) == metric_rows(other)
    assert stage.summary == other.summary


# --- what a run gives ---------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nothing_has_moved_at_the_first_step(straight: dict[str, Stage], adapter: str) -> None:
    first, *rest = metric_rows(straight[adapter])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) < 1e-5
    assert first["rewards/accuracies"] == 0.0  # equal is no win
    if adapter == "full":
        assert abs(first["loss"] - math.log(2)) < 1e-5
    else:  # and the chosen answer's entropy on top
        assert first["loss"] > math.log(2) + 0.01
    assert first["grad_norm"] > 0
    assert max(abs(r["rewards/margins"]) for r in rest if "rewards/margins" in r) > 1e-3


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_step_is_logged_and_the_folder_is_whole(
    straight: dict[str, Stage], adapter: str
) -> None:
    stage = straight[adapter]
    logged = metric_rows(stage)
    trained = [r for r in logged if "loss" in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in logged if "eval_loss" in r] == [STEPS]
    wanted = {
        "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected",
        "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    }  # fmt: skip
    for row in trained:
        assert wanted <= set(row)
        assert all(math.isfinite(v) for k, v in row.items() if k != "row_ids")
        assert len(set(row["row_ids"])) == 4
        margin = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(margin, abs=1e-5)
    assert trained[0]["learning_rate"] < trained[1]["learning_rate"] == pytest.approx(1e-3)
    assert trained[-1]["learning_rate"] < 5e-4  # the cosine came down
    for name in ("config.yaml", "manifest.json", "summary.json", "model/README.md"):
        assert (stage.path / name).is_file()
    weights = next((stage.path / "model").glob("*.safetensors"))  # others may read them too
    assert weights.stat().st_mode & 0o777 == (stage.path / "model/README.md").stat().st_mode & 0o777
    manifest = json.loads((stage.path / "manifest.json").read_text())
    assert len(manifest["inputs"]["model/model.safetensors"]) == 64
    assert manifest["seed"] == 0 and manifest["wall_time_s"] > 0
    assert {p.name for p in (stage.path / "checkpoints").iterdir()} == {"step-4", "step-6"}
    assert not [p for p in stage.path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    summary = stage.summary
    assert (summary["steps"], summary["train_rows"], summary["validation_rows"]) == (6, 24, 8)
    assert summary["epochs"] == 1.0 and summary["global_batch_size"] == 4
    assert math.isfinite(summary["validation"]["eval_loss"])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_saved_model_is_the_one_that_was_trained(
    straight: dict[str, Stage], adapter: str
) -> None:
    """The last update is in it: its weights hash to what stood in memory at the end."""
    stage = straight[adapter]
    folder = stage.path / "model"
    if adapter == "full":
        model = load_policy(stage.config.model, folder)
        freeze_for_full(model, stage.config.model)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_model(stage.config.model), folder, is_trainable=True)
    assert trainable_parts(model) == stage.summary["trainable_parameters"]
    assert ckpt.tensors_sha256(ckpt.trainable_tensors(model)) == weights(stage)
    newest, _ = ckpt.latest_checkpoint(stage.path / "checkpoints")
    assert newest.name == "step-6"
    assert ckpt.tensors_sha256(ckpt.load_tensors(newest, "trainable")) == weights(stage)


def test_trl_computes_our_loss(rows: Path, tmp_path: Path) -> None:
    """The trainer that is used against the formula that is shown, on a policy that has moved."""
    overrides = settings(rows, "full")
    config = smoke(overrides, run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    train = load_preferences(config.data, "train")
    trainer = build_trainer(config, stage, embedded_processor(), train, train.select(range(4)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    batch = trainer.data_collator([train[i] for i in range(4)])
    batch.pop("row_ids")
    policy = logps_of(trainer.model, batch)
    reference = logps_of(trainer.ref_model, batch)
    assert (policy - reference).abs().min() > 0.01
    terms = dpo_loss(*policy.chunk(2), *reference.chunk(2), beta=config.dpo.beta)
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, dict(batch))
    assert theirs.item() == pytest.approx(terms.loss.mean().item(), abs=1e-5)
    assert abs(theirs.item() - math.log(2)) > 0.01
    logged = trainer._metrics["eval"]
    chosen, rejected = terms.chosen_rewards.mean().item(), terms.rejected_rewards.mean().item()
    assert logged["rewards/chosen"][0] == pytest.approx(chosen, abs=1e-4)
    assert logged["rewards/rejected"][0] == pytest.approx(rejected, abs=1e-4)
    assert logged["logps/chosen"][0] == pytest.approx(policy[:4].mean().item(), abs=1e-3)


def test_the_reference_is_the_base_and_stays_it(
    straight: dict[str, Stage], rows: Path, tmp_path: Path
) -> None:
    """A frozen copy in full fine-tuning, the base under its adapters in LoRA; neither moves."""
    config = smoke(settings(rows, "full", dpo__max_steps=3), run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    train = load_preferences(config.data, "train")
    trainer = build_trainer(config, stage, embedded_processor(), train, train.select(range(4)))
    reference = trainer.ref_model
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    before = ckpt.tensors_sha256(dict(reference.named_parameters()))
    assert before == ckpt.tensors_sha256(dict(trainer.model.named_parameters()))
    trainer.train()
    assert not reference.training
    assert ckpt.tensors_sha256(dict(reference.named_parameters())) == before
    assert ckpt.tensors_sha256(dict(trainer.model.named_parameters())) != before
    batch = trainer.data_collator([train[i] for i in range(2)])
    base = logps_of(embedded_model(), batch)
    # Shared prefixes against the plain path: rounding.
    assert (logps_of(reference, batch) - base).abs().max() < 1e-4
    lora = load_policy(straight["lora"].config.model, straight["lora"].path / "model")
    assert (logps_of(lora, batch) - base).abs().min() > 1e-3
    with lora.disable_adapter():
        assert torch.equal(logps_of(lora, batch), base)


# --- the same again -----------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_run_bit_by_bit(
    straight: dict[str, Stage], rows: Path, tmp_path: Path, adapter: str
) -> None:
    torch.rand(17)  # in a notebook the kernel's generators stand anywhere
    again = make(settings(rows, adapter), tmp_path)
    assert_same_run(again, straight[adapter])


def test_another_seed_gives_another_run(
    straight: dict[str, Stage], rows: Path, tmp_path: Path
) -> None:
    other = make(settings(rows, "full", dpo__max_steps=2), tmp_path, seed=1)
    assert metric_rows(other)[0]["logps/chosen"] != metric_rows(straight["full"])[0]["logps/chosen"]


@pytest.mark.slow
def test_evaluating_on_the_way_changes_nothing(
    straight: dict[str, Stage], rows: Path, tmp_path: Path
) -> None:
    """Evaluation leaves mode and generators as they were: the curve is the same without it."""
    looked = make(settings(rows, "lora", dpo__eval_steps=2), tmp_path)
    own = [r for r in metric_rows(looked) if "loss" in r]
    assert own == [r for r in metric_rows(straight["lora"]) if "loss" in r]
    measured = {r["step"]: r["eval_loss"] for r in metric_rows(looked) if "eval_loss" in r}
    assert list(measured) == [2, 4, 6]
    best = min(measured, key=measured.__getitem__)
    assert looked.summary["best"] == {
        "step": best, "metric": "eval_loss", "value": measured[best],
    }  # fmt: skip
    assert straight["lora"].summary["best"]["step"] == 6  # the only one that was measured
    assert weights(looked) == weights(straight["lora"])


@pytest.mark.slow
def test_recomputing_activations_changes_no_number(
    straight: dict[str, Stage], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, modeling_utils, "checkpoint")
    saving = settings(rows, "lora", model__gradient_checkpointing=True, dpo__max_steps=6)
    stage = make(saving, tmp_path)
    assert len(calls) >= 6 * 4  # every layer of every step
    ours, theirs = ([r for r in metric_rows(s) if "loss" in r] for s in (stage, straight["lora"]))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_accumulated_batches_give_the_gradient_of_the_whole(
    adapter: str, straight: dict[str, Stage], rows: Path, tmp_path: Path
) -> None:
    whole = metric_rows(straight[adapter])[0]
    parts = settings(
        rows, adapter, dpo__max_steps=1, dpo__per_device_batch_size=1,
        dpo__gradient_accumulation_steps=4,
    )  # fmt: skip
    first = metric_rows(make(parts, tmp_path))[0]
    assert first["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert first["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert first["logps/chosen"] == pytest.approx(whole["logps/chosen"], abs=1e-3)


# --- interruption -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_end(
    straight: dict[str, Stage], rows: Path, tmp_path: Path, adapter: str
) -> None:
    stop = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 4 of 6") as caught:
        make(settings(rows, adapter), tmp_path, live=stop)
    assert caught.value.exit_code == 75
    assert not (tmp_path / "r/dpo/summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    torch.rand(3)
    assert_same_run(make(settings(rows, adapter), tmp_path), straight[adapter])


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_crashed_run_goes_on_from_its_last_checkpoint(
    straight: dict[str, Stage], rows: Path, tmp_path: Path, adapter: str
) -> None:
    """Dead after step 5, saved at 4: step 5 is done again and stands once in the metrics."""
    with pytest.raises(Crash):
        make(settings(rows, adapter), tmp_path, live=At(5, crash))
    folder = tmp_path / "r/dpo"
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    newest, _ = ckpt.latest_checkpoint(folder / "checkpoints")
    assert newest.name == "step-4"
    assert_same_run(make(settings(rows, adapter), tmp_path), straight[adapter])


KILLED = """
import os, signal, sys, json
from pathlib import Path
from tests.trainers.test_train_dpo import At, make
kill = At(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
make(json.loads(sys.argv[1]), Path(sys.argv[2]), live=kill)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_in_another(
    straight: dict[str, Stage], rows: Path, tmp_path: Path, repo: Path
) -> None:
    overrides = settings(rows, "lora")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(overrides), str(tmp_path)], cwd=repo,
        env=os.environ | {"PYTHONPATH": str(repo)}, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert_same_run(make(overrides, tmp_path), straight["lora"])


@pytest.mark.parametrize(
    "damaged", [pytest.param(("step-4",), marks=pytest.mark.slow), ("step-4", "step-2")]
)
def test_a_damaged_checkpoint_is_passed_over_and_said(
    straight: dict[str, Stage], rows: Path, tmp_path: Path, damaged: tuple[str, ...]
) -> None:
    with pytest.raises(Crash):
        make(settings(rows, "lora"), tmp_path, live=At(5, crash))
    for name in damaged:
        path = tmp_path / "r/dpo/checkpoints" / name / "trainable.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage = make(settings(rows, "lora"), tmp_path)
    said = [str(w.message) for w in caught if "using an older checkpoint" in str(w.message)]
    assert len(said) == len(damaged)
    for name, text in zip(damaged, said, strict=True):
        assert f"{name}/trainable.safetensors does not match its hash" in text
    assert_same_run(stage, straight["lora"])


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_weight_that_is_no_number_stops_the_run_and_spoils_no_checkpoint(
    straight: dict[str, Stage], rows: Path, tmp_path: Path, adapter: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Poisoned(exact_trainer.StageCallback):
        def on_step_end(self, args, state, control, model=None, **more):
            control = super().on_step_end(args, state, control, model=model, **more)
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = math.nan
            return control

    with monkeypatch.context() as patch:
        patch.setattr(exact_trainer, "StageCallback", Poisoned)
        with pytest.raises(NonFiniteError, match=r"step 4: loss is nan on rows train") as caught:
            make(settings(rows, adapter), tmp_path)
    assert caught.value.exit_code == 3
    folder = tmp_path / "r/dpo"
    assert not (folder / "summary.json").exists() and not (folder / "model").exists()
    newest, skipped = ckpt.latest_checkpoint(folder / "checkpoints")
    assert newest.name == "step-2" and not skipped
    saved = ckpt.load_tensors(newest, "trainable")
    assert all(torch.isfinite(t).all() for t in saved.values())
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3]
    assert_same_run(make(settings(rows, adapter), tmp_path), straight[adapter])


# --- a stage that stands ------------------------------------------------------------------------


def test_a_finished_stage_is_left_as_it_is(straight: dict[str, Stage], rows: Path) -> None:
    stage = straight["lora"]
    before = files_of(stage.path)
    times = {p: p.stat().st_mtime_ns for p in stage.path.rglob("*")}
    config = smoke(settings(rows, "lora"), seed=0, run_name="r")
    assert train_dpo(config, stage, live=At(1, crash)) == stage.summary
    assert files_of(stage.path) == before
    assert {p: p.stat().st_mtime_ns for p in stage.path.rglob("*")} == times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dpo.beta": 0.2}, r"dpo.beta: 0.1 -> 0.2"),
        ({"model.lora_rank": 4}, r"model.lora_rank: 8 -> 4"),
        ({"data.train_rows": 5}, r"data.train_rows: 0 -> 5"),
        ({"seed": 3}, r"seed: 0 -> 3"),
    ],
)
def test_a_finished_stage_of_other_settings_is_refused(
    straight: dict[str, Stage], rows: Path, change: dict, message: str
) -> None:
    stage = straight["lora"]
    before = files_of(stage.path)
    with pytest.raises(InputError, match=message):
        root = stage.path.parent.parent
        config = smoke(settings(rows, "lora") | change, run_name="r")
        train_dpo(config, Run(config, root=root).stage("dpo"))
    assert files_of(stage.path) == before


def test_a_partial_stage_of_other_settings_is_refused(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make(settings(rows, "lora"), tmp_path, live=At(3, crash))
    before = files_of(tmp_path / "r/dpo")
    with pytest.raises(InputError, match=r"dpo.beta: 0.1 -> 0.2\n.*another run_name"):
        make(settings(rows, "lora", dpo__beta=0.2), tmp_path)
    after = files_of(tmp_path / "r/dpo")
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_a_stage_in_use_is_refused(rows: Path, tmp_path: Path) -> None:
    config = smoke(settings(rows, "lora"), run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    with stage.work(), pytest.raises(BusyError, match=f"in use by pid {os.getpid()}") as caught:
        train_dpo(config, Run(config, root=tmp_path).stage("dpo"))
    assert caught.value.exit_code == 73
    assert not (stage.path / "metrics.jsonl").exists()


# --- the right direction ------------------------------------------------------------------------


def test_exchanged_answers_teach_the_opposite(
    straight: dict[str, Stage], rows: Path, tmp_path: Path
) -> None:
    """Followed from file to loss: chosen is pushed up. Swapped in the file, it must go down."""
    train = [
        r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in told_by_words("train", 24)
    ]
    swapped = write_hub_folder(tmp_path / "rows", train, told_by_words("validation", 8))
    stage = make(settings(swapped, "full"), tmp_path)
    name = "eval_rewards/margins"
    right, wrong = straight["full"].summary["validation"][name], stage.summary["validation"][name]
    assert right > 0.05 and wrong < -0.05
    last = [[r for r in metric_rows(x) if "loss" in r][-1] for x in (straight["full"], stage)]
    assert last[0]["rewards/margins"] > 0.05 < last[1]["rewards/margins"]  # each learned its own


def test_beta_scales_the_rewards(straight: dict[str, Stage], rows: Path, tmp_path: Path) -> None:
    """After one equal update of Adam (beta scales its gradient away) rewards are as the betas."""
    stage = make(settings(rows, "full", dpo__beta=0.5, dpo__max_steps=3), tmp_path)
    ours, theirs = metric_rows(straight["full"])[2], metric_rows(stage)[2]
    assert (ours["step"], theirs["step"]) == (3, 3)
    assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], abs=0.05)
    assert abs(ours["rewards/margins"]) > 1e-3
    ratio = theirs["rewards/margins"] / ours["rewards/margins"]
    assert ratio == pytest.approx(5.0, rel=0.05)


# --- other data ---------------------------------------------------------------------------------


def test_the_originals_layout_trains(tmp_path: Path) -> None:
    source = write_hub_folder(tmp_path / "in", hub_rows("train", 6), hub_rows("validation", 2))
    convert(str(source), tmp_path / "rows")
    overrides = settings(tmp_path / "rows", "lora", dpo__max_steps=0, dpo__num_epochs=2.0) | {
        "data.source": "original",
        "data.image_root": str(tmp_path / "rows/images"),
    }
    stage = make(overrides, tmp_path)
    assert stage.summary["steps"] == 4  # two epochs of 4 and 2 rows
    assert (stage.summary["train_rows"], stage.summary["validation_rows"]) == (6, 2)
    assert abs(metric_rows(stage)[0]["rewards/margins"]) < 1e-5


def test_one_row_without_a_picture_trains(tmp_path: Path) -> None:
    """A set smaller than a batch, and text alone, which leaves the projector where it was."""
    folder = write_original_folder(tmp_path / "rows", {"easy": [original_record(0, image=...)]})
    overrides = settings(folder, "full", dpo__max_steps=4) | {"data.source": "original"}
    stage = make(overrides, tmp_path)
    assert (stage.summary["steps"], stage.summary["train_rows"]) == (4, 1)
    assert abs(metric_rows(stage)[0]["loss"] - math.log(2)) < 1e-5


def test_a_row_too_long_is_named_and_binds_nobody(rows: Path, tmp_path: Path) -> None:
    """Nothing was trained, so the same run may go on with the length that the error asked for."""
    with pytest.raises(InputError, match=r"longer than 100 tokens.*train/\d+ chosen: \d+ tokens"):
        make(settings(rows, "lora", dpo__max_length=100), tmp_path)
    assert not list(tmp_path.rglob("step-*")) and not list(tmp_path.rglob("metrics.jsonl"))
    stage = make(settings(rows, "lora", dpo__max_length=400, dpo__max_steps=1), tmp_path)
    assert stage.summary["steps"] == 1


def test_a_long_row_anywhere_is_named_before_the_first_step(tmp_path: Path) -> None:
    """Found when its batch comes round, it would cost the hours until then."""
    train = [dict(r) for r in hub_rows("train", 24)]
    train[17]["rejected"] = "No. " * 120
    folder = write_hub_folder(tmp_path / "rows", train, hub_rows("validation", 8))
    with pytest.raises(InputError, match=r"train/17 rejected: \d{3} tokens") as caught:
        make(settings(folder, "lora", dpo__max_length=300), tmp_path)
    assert str(caught.value).count(" tokens") == 2  # the limit's, and one row's
    assert not list(tmp_path.rglob("metrics.jsonl"))
