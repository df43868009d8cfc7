"""The command line: one clear message and the right exit code, thin calls into the library."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib import cli, machine, pipeline
from spavl_lib.config import load_config, profile_names
from spavl_lib.errors import DiskError, InputError, Interrupted, NonFiniteError, Preempted
from spavl_lib.notebook import execute, sequence
from spavl_lib.planning import doctor
from spavl_lib.runs.stage import Run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, make_notebook: Callable) -> list[tuple]:
    """What would have been launched."""
    seen: list[tuple] = []
    folder = make_notebook("04_dpo").parent
    monkeypatch.setenv("SPAVL_NOTEBOOKS", str(folder))

    def run_all(*args: object, **options: object) -> str:
        seen.append(("all", *args, options))
        return "the run"

    monkeypatch.setattr(sequence, "run_all", run_all)
    monkeypatch.setattr(cli, "_report", lambda path: seen.append(("report", path)))

    def run_notebook(*args: object, **options: object) -> Path:
        seen.append(("one", *args, options))
        return Path("executed.ipynb")

    monkeypatch.setattr(execute, "run_notebook", run_notebook)
    monkeypatch.setattr(pipeline, "train", lambda *a: seen.append(("train", *a)))
    return seen


# --- what is called -----------------------------------------------------------------------------


def test_run_one_hands_over_name_config_and_overrides(spavl: Callable, calls: list) -> None:
    words = "run dpo --profile smoke --set dpo.beta=0.2 --set model.name=a=b --seed 3 --run-name r"
    code, _, err = spavl(*words.split())
    assert (code, err) == (0, "")
    overrides = {"dpo.beta": "0.2", "model.name": "a=b"}
    config = load_config("smoke", overrides, seed=3, run_name="r")
    [(kind, name, given, given_overrides, run, options)] = calls
    assert (kind, name, given, given_overrides) == ("one", "04_dpo", config, overrides)
    assert run.name == "r"
    assert options == {"profile": "smoke"}


def test_run_all_hands_over_the_path_of_ones_own_profile(
    spavl: Callable, calls: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    text = (repo / "spavl_lib/config/profiles/smoke.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert spavl("run", "all", "-p", "mine.yaml", "--lanes", "1")[0] == 0
    [(kind, config, overrides, options), reported] = calls
    assert (kind, config.profile, overrides) == ("all", "mine", {})
    assert reported == ("report", "the run")
    assert options == {"profile": str(tmp_path / "mine.yaml"), "lanes": 1}


def test_train_goes_to_the_stage_of_that_name(spavl: Callable, calls: list, runs: Path) -> None:
    code, out, _ = spavl("train", "dpo", "--profile", "colab", "--set", "dpo.beta=0.2")
    assert code == 0
    [(_, kind, config, stage)] = calls
    assert (kind, config.dpo.beta, stage.path) == ("dpo", 0.2, runs / "colab" / "dpo")
    assert str(stage.path) in out


def test_report_takes_a_folder_or_a_name(
    spavl: Callable, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spavl_lib.report

    seen = []
    monkeypatch.setattr(spavl_lib.report, "write_report", seen.append)
    folder = runs / "paper"
    folder.mkdir(parents=True)
    assert spavl("report", "paper")[0] == 0
    assert spavl("report", str(folder))[0] == 0
    assert seen == [folder, folder]
    code, _, err = spavl("report", "papper")
    assert code == 2
    assert "existing runs: paper" in err


def test_a_done_command_says_what_comes_next(spavl: Callable, calls: list) -> None:
    _, out, _ = spavl(
        "run", "dpo", "--profile", "smoke", "--set", "dpo.beta=0.2", "--run-name", "r"
    )
    assert out.splitlines()[1:] == [
        "next: spavl run inference --profile smoke --set dpo.beta=0.2 --run-name r",
        '      spavl ask r IMAGE "QUESTION"',
        "      spavl report r",
    ]
    _, out, _ = spavl("train", "reward", "--profile", "smoke")
    assert "next: spavl run ppo --profile smoke" in out and "spavl ask" not in out
    run = Run(load_config("smoke"))
    for name in ("ppo", "practice", "inference"):  # what is there already is not to be done
        (run.path / name).mkdir(parents=True)
        (run.path / name / "summary.json").write_text("{}")
    assert pipeline.next_commands("reward", run.config) == ["spavl report smoke"]
    assert pipeline.next_commands("inference", run.config)[0].startswith("spavl run evaluation")


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("run dop --profile smoke", "did you mean 'dpo'"),
        ("run dpo --profile smok", "did you mean 'smoke'"),
        ("run dpo --profile smoke --set dpo.betta=1", "did you mean 'dpo.beta'"),
        ("run dpo --profile smoke --set dpo.beta=high", "beta must be a valid number, got 'high'"),
        ("run dpo --profile smoke --set dpo.beta", "expected KEY=VALUE"),
        ("run dpo --profile smoke --set =1", "expected KEY=VALUE"),
        ("run dpo --profile smoke --set seed=1 --set seed=1", "seed is given twice"),
        ("run dpo --profile smoke --set seed=1 --seed 2", "seed is given twice"),
        ("run dpo --profile smoke --set run_name=a --run-name b", "run_name is given twice"),
        ("run dpo --profile smoke --run-name a/b", "plain folder name"),
        ("run dpo --profile smoke --seed x", "--seed"),
        ("run dpo --profil smoke", "--profile"),
        ("run dpo", "'-p'. One of colab, demo, full, laptop, laptop-hub, smoke, or the path of a"),
        ("run", "'name'. A notebook, such as dpo, 04 or 04_dpo, or all."),
        ("rnu dpo --profile smoke", "'run'"),
        ("train dop --profile smoke", "did you mean 'dpo'"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    spavl: Callable, calls: list, monkeypatch: pytest.MonkeyPatch, words: str, says: str
) -> None:
    if words.startswith("train"):
        monkeypatch.undo()
    code, out, err = spavl(*words.split())
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("spavl: ")
    assert "Traceback" not in err
    assert err.count("spavl: ") == 1
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("mend it"), 2),
        (NonFiniteError("mend it"), 3),
        (DiskError("mend it"), 74),
        (Preempted("mend it"), 75),
        (execute.NotebookError("mend it"), 1),
        (Interrupted("mend it"), 130),
        (OSError(28, "mend it"), 74),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_its_message_and_its_exit_code(
    spavl: Callable,
    calls: list,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sequence, "run_all", fail)
    got, _, err = spavl("run", "all", "--profile", "smoke")
    assert got == code
    message = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    assert err.strip() == f"spavl: {message}"


def test_a_bug_keeps_its_traceback(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "run_all", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError):
        cli.main(["run", "all", "--profile", "smoke"])


def test_version(spavl: Callable) -> None:
    code, out, err = spavl("--version")
    assert (code, err) == (0, "") and re.match(r"spavl \d+\.\d+\.\d+", out)


@pytest.mark.parametrize("words", [[], ["data"], ["model"], ["judge"]])
def test_help_cuts_no_sentence(spavl: Callable, monkeypatch, words: list[str]) -> None:
    for columns in ("60", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = spavl(*words, "--help")
        commands = out.partition("Commands:")[2]
        assert "..." not in commands and len(commands.split()) > 10
    if not words:
        text = " ".join(commands.split())
        assert "the profiles that can run. plan" in text and "results are bit-identical." in text


def test_outside_of_a_checkout_the_installed_notebooks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    monkeypatch.delenv("SPAVL_NOTEBOOKS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert execute.find_notebook("dpo") == repo / "notebooks" / "04_dpo.ipynb"
    (tmp_path / "notebooks").mkdir()  # a folder of that name comes first
    with pytest.raises(InputError, match="run this in a checkout, or set SPAVL_NOTEBOOKS"):
        execute.find_notebook("dpo")


# --- help and doctor ----------------------------------------------------------------------------


def test_help_shows_examples_that_parse(spavl: Callable, calls: list, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    examples = []
    for words in ([], ["run"], ["train"]):
        code, out, _ = spavl(*words, "--help")
        assert code == 0
        for line in out.splitlines():
            if line.strip().startswith("spavl ") and "my.yaml" not in line:
                examples.append(line.split("  spavl ")[1].split("   ")[0])
    assert len(examples) >= 7
    for example in examples:
        if example.split()[0] in ("run", "train"):
            code, _, err = spavl(*example.split())
            assert code == 0, (example, err)
    started = [call for call in calls if call[0] != "report"]
    assert len(started) == sum(e.split()[0] in ("run", "train") for e in examples)


def test_the_module_is_a_command(repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spavl_lib.cli", "run", "all", "--profile", "smok"],
        cwd=repo, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("spavl: unknown profile 'smok'; did you mean 'smoke'")
    assert done.stderr.count("\n") == 1


def test_doctor_says_what_runs_here_and_why_not(
    spavl: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 8 * machine.GIB)
    assert spavl("doctor")[0] == 0
    assert set(doctor.NEEDS) == set(profile_names())
    assert doctor.cannot_run("demo") == []
    assert doctor.cannot_run("colab") == ["needs a CUDA GPU of 16 GiB, this machine has none"]
    # A T4 says 14.7 GiB; it is what the colab profile is made for.
    monkeypatch.setattr(machine, "gpus", lambda: [("Tesla T4", int(14.7 * machine.GIB))])
    assert doctor.cannot_run("colab") == []
    assert "the largest here has 15" in doctor.cannot_run("full")[-1]
    monkeypatch.setattr(machine, "memory_bytes", lambda: machine.GIB)
    code, out, _ = spavl("doctor")
    assert code == 1
    assert "needs 4 GiB of memory, this machine has 1.0" in out
    assert "Tesla T4 (15 GiB)" in out


def test_doctor_compares_with_the_pins() -> None:
    pins = doctor.read_pins()
    assert pins["torch"] == "2.13.0"
    assert len(pins) > 20
    lines = doctor.differing_pins({"pytest": "0.0.1", "no-such-package-here": "1.0"})
    assert lines[0] == "no-such-package-here: 1.0 pinned, missing"
    assert lines[1].startswith("pytest: 0.0.1 pinned, ")
    assert doctor.differing_pins({"torch": pins["torch"]}) == []
