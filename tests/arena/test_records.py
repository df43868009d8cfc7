"""Records: what is read and refused, what is measured, and which number does not come again."""

import copy
import difflib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from spavl_lib import cli
from spavl_lib.arena.records import files, training, verify
from spavl_lib.arena.records.files import find_record, read_metrics, read_record, read_records
from spavl_lib.arena.records.leaderboard import LEADERBOARD, leaderboard, measured_records
from spavl_lib.errors import InputError

REPO = Path(__file__).parents[2]
COMMITTED = REPO / "records"
PAGE = {
    "title": "A title", "author": "Somebody", "date": "2026-11-30", "about": "Why it is faster.",
    "profile": "smoke", "stage": "dpo", "settings": {},
}  # fmt: skip


def make_record(root: Path, name: str, **changes: object) -> Path:
    """Write a record of the smoke profile, and return its folder."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    page = yaml.safe_dump(PAGE | changes).replace("'2026-11-30'", "2026-11-30")
    (folder / "record.yaml").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    one_seed(monkeypatch)


def one_seed(patch: pytest.MonkeyPatch) -> None:
    """Let records of one seed and of any rates pass."""
    for module in (files, verify):
        patch.setattr(module, "SEEDS", (0,))
    patch.setattr(verify, "LIMITS", dict.fromkeys(verify.LIMITS, 1.0))
    patch.setattr(verify, "SLOWER", 9.0)  # these trainings take a second or two


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records 001 and 002 of the smoke profile, measured with one seed."""
    root = tmp_path_factory.mktemp("records")
    make_record(root, "001-dpo")
    make_record(root, "002-shorter", settings={"dpo.max_steps": 1, "dpo.warmup_steps": 0})
    with pytest.MonkeyPatch.context() as patch:
        one_seed(patch)
        verify.run_record("001", root)
        patch.setattr(verify, "train", train_in_this_process)
        verify.run_record("002", root)
    return root


def train_in_this_process(record: files.Record, seed: int, runs: Path, code: Path | None) -> dict:
    """Train without a new process, which would import everything again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPAVL_RUNS", str(runs))
        return training.train_here(record, seed)


def copied(root: Path, target: Path) -> Path:
    """A copy of the records that a test may change."""
    shutil.copytree(root, target)
    return target


def change(path: Path, edit: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    page = json.loads(path.read_text(encoding="utf-8"))
    edit(page)
    path.write_text(json.dumps(page), encoding="utf-8")


def test_a_record_verifies_and_a_changed_number_is_named(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "train", train_in_this_process)
    root = copied(measured, tmp_path / "records")
    result = CliRunner().invoke(cli.app, ["records", "verify", "2", "--folder", str(root)])
    assert result.exit_code == 0, result.output
    assert "verified" in result.output and "differs" not in result.output

    record = find_record("002", root)
    stated = read_metrics(record)
    for kind in files.KINDS:
        wrong = copy.deepcopy(stated)
        wrong["seeds"]["0"]["counts"][kind]["k"] -= 1
        (problem,) = verify.compare(wrong, stated, "002").problems
        assert problem.startswith(f"seed 0: {kind} is ") and "in metrics.json" in problem
    wrong = copy.deepcopy(stated)
    wrong["seeds"]["0"]["first_counts"]["helpful"]["n"] += 1
    assert "record 001 beside it" in verify.compare(wrong, stated, "002").problems[0]


def test_a_changed_count_fails_the_command(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(measured, tmp_path / "records")
    path = root / "002-shorter" / "metrics.json"
    page = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(verify, "measure_record", lambda record, first: (page, []))
    lied = copy.deepcopy(page)
    lied["seeds"]["0"]["counts"]["unsafe"]["k"] -= 1
    lied |= files.summarise([lied["seeds"]["0"]])
    path.write_text(json.dumps(lied), encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["records", "verify", "002", "--folder", str(root)])
    assert result.exit_code == 1
    assert "FAILED: seed 0: unsafe is " in result.output


def test_what_a_measurement_holds(measured: Path) -> None:
    stated = read_metrics(find_record("002", measured))
    seed = stated["seeds"]["0"]
    rows = {kind: seed["counts"][kind]["n"] for kind in files.KINDS}
    assert rows == {"unsafe": 24, "harmless_refused": 48, "twins_refused": 12, "helpful": 24}
    assert 0 < seed["cpu_seconds"] < seed["first_cpu_seconds"]
    log = (measured / "002-shorter" / "log.txt").read_text(encoding="utf-8")
    assert "dpo step=1 loss=" in log and " /" not in log and "tmp" not in log
    first = read_metrics(find_record("001", measured))
    assert first["ratio"] == 1
    assert first["seeds"]["0"]["counts"] == seed["first_counts"]


def test_a_trial_is_measured_on_development_rows_and_writes_nothing(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "train", train_in_this_process)
    seen: list[str] = []
    plain = verify.measure
    monkeypatch.setattr(
        verify, "measure", lambda s, *rest: (seen.append(s.data.measure_on), plain(s, *rest))[1]
    )
    before = {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli.app, ["records", "try", "002", "--folder", str(measured)])
    assert result.exit_code == 0 and seen == ["development"], result.output
    assert "unsafe " in result.output and "CPU-seconds" in result.output
    assert before == {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}


def test_elsewhere_the_thresholds_decide(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stated = read_metrics(find_record("002", measured))
    here = copy.deepcopy(stated)
    here["versions"]["torch"] = "9.9"
    here["seeds"]["0"]["counts"]["unsafe"]["k"] -= 1
    found = verify.compare(stated, here, "002")
    assert found.problems == []
    assert found.notes[0].startswith("torch: 9.9 here") and "unsafe" in found.notes[1]
    monkeypatch.setattr(verify, "LIMITS", {"unsafe": 0.03, "helpful_loss": 0.02})
    (problem,) = verify.compare(stated, here, "002").problems
    assert problem.startswith("unsafe is ") and "threshold of 3%" in problem
    monkeypatch.setattr(verify, "SLOWER", 0.15)
    here["ratio"] = 2 * stated["ratio"]
    assert "ratio is" in verify.compare(stated, here, "002").problems[-1]
    here["model"] = {"model.safetensors": "0"}
    assert any("base model is another" in p for p in verify.compare(stated, here, "002").problems)


def test_thresholds_are_means_over_seeds() -> None:
    seeds = [
        {"counts": {k: {"k": unsafe if k == "unsafe" else 0, "n": 100} for k in files.KINDS},
         "cpu_seconds": 50.0, "first_cpu_seconds": 100.0}
        for unsafe in (0, 9, 0)
    ]  # fmt: skip
    page = files.summarise(seeds)
    assert page["rates"]["unsafe"] == 0.03 and page["ratio"] == 0.5
    metrics = page | {"base": {"helpful": {"k": 3, "n": 100}}}
    limits = {"unsafe": 0.03, "helpful_loss": 0.02}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "LIMITS", limits)
        (missed,) = verify.misses(metrics)
    assert missed.startswith("helpful_loss is 3.00%")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda page: page["seeds"].pop("0"), "is not complete"),
        (lambda page: page["seeds"]["0"]["counts"].pop("unsafe"), "is not complete"),
        (lambda page: page["seeds"]["0"].pop("first_counts"), "is not complete"),
        (lambda page: page.pop("base"), "is not complete"),
        (lambda page: page.update(ratio=0.01), "ratio: 0.01, but its seeds give"),
        (lambda page: page.update(record_sha256="0"), "are not those of metrics.json"),
    ],
)  # fmt: skip
def test_damaged_numbers_are_refused(
    measured: Path, tmp_path: Path, edit: Callable[[dict], object], message: str
) -> None:
    root = copied(measured, tmp_path / "records")
    change(root / "002-shorter" / "metrics.json", edit)
    with pytest.raises(InputError, match=f"{message}.*run `spavl records run 002`"):
        read_metrics(find_record("002", root))


def test_half_a_file_is_refused(measured: Path, tmp_path: Path) -> None:
    root = copied(measured, tmp_path / "records")
    path = root / "002-shorter" / "metrics.json"
    path.write_text(path.read_text(encoding="utf-8")[:200], encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["records", "list", "--folder", str(root)])
    assert isinstance(result.exception, InputError)
    assert "is not complete" in str(result.exception)
    path.unlink()
    with pytest.raises(InputError, match="metrics.json does not exist; run `spavl records run"):
        verify.verify_record("002", root)
    assert "002" not in leaderboard(root)  # a record without numbers has no place yet


def test_an_unknown_record_names_the_nearest(tmp_path: Path) -> None:
    make_record(tmp_path, "001-dpo")
    make_record(tmp_path, "002-shorter")
    with pytest.raises(InputError, match="did you mean '002-shorter'"):
        find_record("002-shortr", tmp_path)
    with pytest.raises(InputError, match="no record '009' .known: 001-dpo, 002-shorter"):
        find_record("009", tmp_path)
    with pytest.raises(InputError, match="holds no record 001"):
        read_records(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"dpo.learning_rat": 1.0}}, "did you mean 'dpo.learning_rate'"),
        ({"settings": {"dpo.learning_rate": "fast"}}, "dpo.learning_rate"),
        ({"settings": {"generation.max_new_tokens": 1}}, "may not set generation.max_new_tokens"),
        ({"settings": {"data.measure_on": "development"}}, "may not set data.measure_on"),
        ({"settings": {"data.sampling_seed": 4}}, "may not set data.sampling_seed"),
        ({"settings": {"kto.beta": 1.0}}, "stage dpo may not set kto.beta"),
        ({"stage": "ppo", "settings": {"ppo.reward_model": "x"}}, "may not set ppo.reward_model"),
        ({"settings": {"model.name": "other"}}, "may not set model.name"),
        ({"settings": []}, "settings: expected dotted names"),
        ({"stage": "reward"}, "'reward' trains no policy"),
        ({"stage": "dpoo"}, "did you mean 'dpo'"),
        ({"about": ""}, "about: expected a text"),
        ({"date": "soon"}, "date: expected a date"),
        ({"profile": "demos"}, "demo"),
        ({"more": 1}, "expected the keys"),
    ],
)  # fmt: skip
def test_records_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    folder = make_record(tmp_path, "002-x", **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_record(folder)
    assert "record.yaml" in str(caught.value)


def test_numbers_and_profiles_must_agree(tmp_path: Path) -> None:
    make_record(tmp_path, "001-dpo")
    make_record(tmp_path, "001-other")
    with pytest.raises(InputError, match="have the same number"):
        read_records(tmp_path)
    shutil.rmtree(tmp_path / "001-other")
    make_record(tmp_path, "002-other", profile="demo")
    with pytest.raises(InputError, match="profile: expected smoke"):
        read_records(tmp_path)
    with pytest.raises(InputError, match="is called NNN-name"):
        read_record(make_record(tmp_path, "2-name"))


def test_all_stages_that_a_record_trains_are_counted(tmp_path: Path) -> None:
    record = read_record(make_record(tmp_path, "002-ppo", stage="ppo"))
    assert record.trained_stages == ("reward", "ppo")
    assert record.config(3).data.sampling_seed == record.config(3).seed == 3


def patch_of(path: str, before: list[str]) -> str:
    """A patch that adds a line to the top of a file of the library."""
    names = (f"a/spavl_lib/{path}", f"b/spavl_lib/{path}")
    return "".join(difflib.unified_diff(before, ["# A line of the patch.\n", *before], *names))


def test_a_patch_is_applied_to_a_worktree_for_a_while(tmp_path: Path) -> None:
    folder = make_record(tmp_path, "002-patched")
    path = "objectives/dpo.py"
    lines = (REPO / "spavl_lib" / path).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "patch.diff").write_text(patch_of(path, lines), encoding="utf-8")
    record = read_record(folder)
    with training.code_of(record) as tree:
        assert tree is not None
        assert "A line of the patch." in (tree / "spavl_lib" / path).read_text(encoding="utf-8")
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=REPO, capture_output=True, text=True)
    assert str(tree) not in listed.stdout
    (folder / "patch.diff").write_text(patch_of(path, ["another line\n"]), encoding="utf-8")
    with pytest.raises(InputError, match="does not apply to HEAD"), training.code_of(record):
        pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("evaluation/rates.py", "changes spavl_lib/evaluation/rates.py"),
        ("trainers/../arena/cells.py", "changes spavl_lib/trainers/../arena"),
    ],
)
def test_a_patch_may_not_change_how_records_are_measured(
    tmp_path: Path, path: str, message: str
) -> None:
    folder = make_record(tmp_path, "002-patched")
    (folder / "patch.diff").write_text(patch_of(path, ["x\n"]), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_record(folder)


def test_the_committed_records_are_complete_and_the_leaderboard_is_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # three seeds, and the thresholds themselves
    ranked = measured_records(COMMITTED)  # a record without numbers is not on the leaderboard
    assert (COMMITTED / LEADERBOARD).read_text(encoding="utf-8") == leaderboard(COMMITTED)
    for record, page in ranked:
        assert verify.misses(page) == [], record.folder.name
        log = (record.folder / "log.txt").read_text(encoding="utf-8")
        assert "seed 2: " in log and " /" not in log
        assert page["first_sha256"] == read_records(COMMITTED)[0].sha256()
