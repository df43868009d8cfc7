"""Run folders: files appear whole, settings are guarded, one process at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spavl_lib.config import load_config
from spavl_lib.errors import BusyError, InputError
from spavl_lib.runs import provenance
from spavl_lib.runs import stage as module
from spavl_lib.runs.files import read_json, read_jsonl, write_json, write_text
from spavl_lib.runs.paths import repo_root, runs_root
from spavl_lib.runs.signals import stop_on_signals
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.stages import FREE_KEYS, all_stages

# --- files --------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"new": float("nan")})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk"):
        patched.setattr(module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk")))
        write_text(path, "half")
    assert read_json(path) == {"old": 1}


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    assert read_jsonl(tmp_path / "none") == []


def test_runs_go_where_the_environment_says(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPAVL_RUNS", str(tmp_path))
    assert runs_root() == tmp_path
    monkeypatch.delenv("SPAVL_RUNS")
    assert runs_root() == repo_root() / "runs"


def test_the_checkout_is_found_from_inside_it_only(repo: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(repo / "tests" / "notebooks")
    assert repo_root() == repo
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert repo_root() == tmp_path


@pytest.mark.parametrize("name", ["a/b", "../a", "..", ".hidden", "/tmp/x"])
def test_a_run_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(InputError, match="plain folder name"):
        Run(load_config("smoke", run_name=name))


# --- stages -------------------------------------------------------------------------------------


def test_a_stage_is_done_when_its_summary_stands(runs: Path) -> None:
    run = Run(load_config("smoke"))
    assert run.path == runs / "smoke"
    stage = run.stage("dpo")
    with stage.work({"rows": "abc"}):
        assert not stage.done
        stage.log({"step": 1})
        stage.log({"step": 2})
    assert not stage.done
    assert run.done_stages() == []
    stage.finish({"x": 1})
    assert stage.done
    assert stage.summary == {"x": 1}
    assert [s.name for s in run.done_stages()] == ["dpo"]
    assert [r["step"] for r in read_jsonl(stage.metrics_path)] == [1, 2]
    with pytest.raises(InputError, match="unknown stage .dop.; did you mean .dpo"):
        run.stage("dop")


def test_a_signal_while_the_summary_is_written_ends_nothing_and_is_not_lost(
    runs: Path, monkeypatch
) -> None:
    stage, conclude = Run(load_config("smoke")).stage("scaling"), Stage._conclude

    def signalled(self: Stage, summary: dict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        conclude(self, summary)

    monkeypatch.setattr(Stage, "_conclude", signalled)
    with stage.work(), stop_on_signals() as around:
        stage.finish({"x": 1})
    assert stage.summary == {"x": 1} and around.reason == "SIGTERM"


def test_the_manifest_says_what_made_it_and_sums_the_time(runs: Path) -> None:
    stage = Run(load_config("smoke", seed=4)).stage("data")
    with pytest.raises(RuntimeError, match="cut"), stage.work({"rows": "abc"}):
        stage.log({"step": 1})
        raise RuntimeError("cut")
    first = read_json(stage.path / "manifest.json")
    assert first["inputs"] == {"rows": "abc"}
    assert first["seed"] == 4
    assert first["versions"]["torch"].startswith("2.13.0")
    assert first["peak_memory_gib"] > 0
    first["wall_time_s"] = 100.0
    write_json(stage.path / "manifest.json", first)
    with stage.work():
        pass
    second = read_json(stage.path / "manifest.json")
    assert second["wall_time_before_s"] == pytest.approx(100.0)
    assert second["wall_time_s"] < 100 and 0 <= second["cpu_time_s"] < 100


def test_work_that_came_to_nothing_leaves_nothing_and_binds_nobody(runs: Path) -> None:
    with pytest.raises(RuntimeError), Run(load_config("smoke")).stage("dpo").work():
        raise RuntimeError("before the first step")
    assert not (runs / "smoke").exists()
    with Run(load_config("smoke", {"dpo.beta": 0.2})).stage("dpo").work() as stage:
        stage.log({"step": 1})
    with pytest.raises(InputError, match="dpo.beta: 0.2 -> 0.1"):
        Run(load_config("smoke")).stage("dpo").check_config()


def test_changed_settings_are_refused_with_old_and_new(runs: Path) -> None:
    with Run(load_config("smoke")).stage("dpo").work() as stage:
        stage.log({"step": 1})
    changed = load_config("smoke", {"dpo.beta": 0.2, "model.lora_rank": 16}, seed=1)
    with pytest.raises(InputError) as caught:
        Run(changed).stage("dpo").check_config()
    for line in ("dpo.beta: 0.1 -> 0.2", "model.lora_rank: 8 -> 16", "seed: 0 -> 1", "run_name"):
        assert line in str(caught.value)
    with pytest.raises(InputError, match="dpo.beta"), Run(changed).stage("dpo").work():
        pytest.fail("worked on under other settings")
    saved = yaml.safe_load((runs / "smoke/dpo/config.yaml").read_text(encoding="utf-8"))
    assert saved["dpo"]["beta"] == 0.1


def test_settings_that_leave_a_stage_as_it_is_may_change(runs: Path) -> None:
    for name in ("data", "dpo"):
        with Run(load_config("smoke")).stage(name).work() as stage:
            stage.finish({})
    free = load_config("smoke", {"dpo.save_steps": 1, "launch.num_processes": 2})
    Run(free).stage("dpo").check_config()
    Run(load_config("smoke", {"generation.batch_size": 1})).stage("dpo").check_config()
    Run(load_config("smoke", {"dpo.beta": 0.2})).stage("data").check_config()
    with pytest.raises(InputError, match="data.train_rows"):
        Run(load_config("smoke", {"data.train_rows": 8})).stage("data").check_config()


def test_a_saved_figure_does_not_fill_the_record_of_changes(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    notebook = tmp_path / "04_dpo.ipynb"
    notebook.write_text("beta = 0.1\n")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    notebook.write_text("beta = 0.2\n" + "A" * 200_000 + "\n")
    patch = provenance.git_diff(tmp_path)
    assert "-beta = 0.1" in patch and "+beta = 0.2" in patch
    assert len(patch) < 1000 and "[... 200,001 characters]" in patch


def test_a_fresh_clone_is_read_once_through_a_slow_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as old as git's index could have changed since, so git reads them; `status` ends it."""

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "04_dpo.ipynb").write_text("beta = 0.1\n")
    (tmp_path / ".gitattributes").write_text("*.ipynb filter=strip\n")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    calls = tmp_path.parent / f"{tmp_path.name}-calls"
    git("config", "filter.strip.clean", f"echo >> {calls}; cat")
    for path in (tmp_path / ".git/index", tmp_path / "04_dpo.ipynb"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    first = provenance.environment(tmp_path)
    read = len(calls.read_text()) if calls.is_file() else 0
    assert first["git_dirty"] is False and first["git_commit"]
    assert provenance.environment(tmp_path) == first
    assert (len(calls.read_text()) if calls.is_file() else 0) == read
    (tmp_path / "04_dpo.ipynb").write_text("beta = 0.2\n")
    changed = provenance.environment(tmp_path)
    assert changed["git_dirty"] is True and changed["git_diff_sha256"]
    monkeypatch.setattr(provenance, "GIT_TIMEOUT_S", 1e-9)
    assert provenance.environment(tmp_path)["git_dirty"] is None  # not known is not clean


def test_stage_keys_name_real_stages_and_settings() -> None:
    values = load_config("smoke").to_dict()
    for spec in all_stages().values():
        for section, _, field in (key.partition(".") for key in spec.config_keys):
            assert section in values and (not field or field in values[section])
    for key in FREE_KEYS:
        section, _, field = key.partition(".")
        assert section in values
        assert not field or field in values[section]


HOLD = """\
import sys
from spavl_lib.config import load_config
from spavl_lib.runs.stage import Run
with Run(load_config("smoke")).stage("dpo").work():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_stage_and_a_dead_one_frees_it(
    runs: Path, repo: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=repo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        before = {p: p.read_bytes() for p in (runs / "smoke/dpo").iterdir()}
        stage = Run(load_config("smoke")).stage("dpo")
        with pytest.raises(BusyError, match=rf"pid {holder.pid} on .*run smoke"), stage.work():
            pytest.fail("both work")
        assert {p: p.read_bytes() for p in (runs / "smoke/dpo").iterdir()} == before
        holder.kill()
        holder.wait()
    with stage.work():
        holder_text = (runs / "smoke/dpo/.lock").read_text(encoding="utf-8")
    assert str(holder.pid) not in holder_text.split()


def test_every_json_we_write_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"missing": None, "n": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["missing"] is None
