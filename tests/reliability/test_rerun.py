"""A run repeats to the bit from its manifest, and every single change is noticed and named."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
import yaml

from spavl_lib import machine, rerun
from spavl_lib.config import Config
from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.errors import InputError
from spavl_lib.runs import provenance
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import Run
from spavl_lib.stages import stage_names, trainers
from tests.helpers import hub_rows, smoke, write_hub_folder

pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS = (
    "stage run_name run_id profile seed seeds config overridden inputs data git_commit git_dirty "
    "git_diff_sha256 code_sha256 versions packages machine determinism device upstream resumed "
    "notebook started wall_time_before_s wall_time_s cpu_time_before_s cpu_time_s "
    "peak_memory_gib results sealed"
).split()


class Made:
    """A whole small run: reward model, PPO if there, DPO, answers, verdicts."""

    def __init__(self, root: Path):
        self.root = root
        write_hub_folder(root / "rows", hub_rows("train", 12), hub_rows("validation", 4))
        (root / "rows/test").mkdir()
        for name in ("harm", "help"):
            self._sets(name)
        shutil.copytree(ASSETS / "model", root / "base")
        self.data = next((root / "rows/data").iterdir())
        self.base = root / "base"
        sets = {
            "data.source": "hub_layout", "data.path": str(root / "rows"),
            "data.train_rows": 0, "data.validation_rows": 0, "data.test_rows": 4,
            "model.name": str(self.base), "evaluation.judge": "phrases",
            "generation.max_new_tokens": 12,
            "launch.num_threads": 0,  # so that a change of their number is noticed
        }  # fmt: skip
        for kind in ("reward", "dpo"):
            sets |= {f"{kind}.max_steps": 3, f"{kind}.per_device_batch_size": 4}
        if "ppo" in trainers():
            sets |= {"ppo.max_steps": 2, "ppo.rollout_batch_size": 4, "ppo.max_new_tokens": 8}
            sets |= {"ppo.per_device_batch_size": 4}
        self.config: Config = smoke(sets, run_name="made")
        self.run = Run(self.config, root=root / "runs")
        # Scaling and the laboratory are many trainings of the same kinds.
        self.stages = [n for n in stage_names() if n not in ("data", "scaling", "laboratory")]

    def _sets(self, name: str) -> None:
        from spavl_lib.data.embedded.mini_files import mini_folder

        (source,) = (mini_folder() / "test").glob(f"{name}-*.parquet")
        shutil.copy(source, self.root / "rows/test" / source.name)

    def conditions(self) -> str:
        """What a look at the conditions says, in one text."""
        lines: list[str] = []
        rerun.rerun(self.run.path, only=("dpo",), check="conditions", say=lines.append)
        return "\n".join(lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("rerun")
        patch.setenv("SPAVL_RUNS", str(root / "runs"))
        whole = Made(root)
        for name in whole.stages:
            maker_of(name)(whole.config, whole.run.stage(name))
        yield whole


def test_every_stage_records_every_field(made: Made, record: Callable) -> None:
    held = 0
    for name in made.stages:
        stage = made.run.stage(name)
        manifest = read_json(stage.path / "manifest.json")
        assert set(FIELDS) <= set(manifest), set(FIELDS) - set(manifest)
        assert manifest["dtype"] in machine.DTYPES
        assert manifest["config"] == made.config.to_dict() | {"dtype": manifest["dtype"]}
        assert "dpo.max_steps" not in manifest["overridden"] or made.config.dpo.max_steps == 3
        assert {"data.path", "model.name"} <= set(manifest["overridden"])
        assert len(manifest["run_id"]) == 16 and len(manifest["code_sha256"]) == 64
        assert manifest["packages"]["torch"] == importlib.metadata.version("torch")
        assert manifest["machine"]["num_threads"] == torch.get_num_threads()
        assert set(manifest["seeds"].values()) == {0}
        summary = provenance.canonical_sha256(stage.summary)
        assert manifest["results"]["summary_sha256"] == summary
        page = {k: v for k, v in manifest.items() if k != "sealed"}
        assert manifest["sealed"] == provenance.canonical_sha256(page)
        if name in trainers():
            assert {"data/train", "model/model.safetensors", "model/chat_template.jinja"} <= set(
                manifest["inputs"]
            )
            assert manifest["data"]["train"]["rows"] == 12
            assert manifest["results"]["weights_sha256"] == stage.summary["weights_sha256"]
        held += 1
    dpo, reward = (read_json(made.run.path / n / "manifest.json") for n in ("inference", "reward"))
    assert dpo["upstream"]["reward"] == reward["run_id"]
    log = [json.loads(x) for x in made.run.stage("dpo").metrics_path.read_text().splitlines()]
    assert {"step", "loss", "grad_norm", "learning_rate", "row_ids"} <= set(log[0])
    record("P1", held, len(made.stages), f"stages with all {len(FIELDS)} fields")


def test_the_whole_run_comes_again_to_the_bit(made: Made, record: Callable) -> None:
    said: list[str] = []
    # Other tests compare runs that differ, and such second runs are kept.
    kept = set((made.root / "runs").glob(".rerun/*"))
    found = rerun.rerun(made.run.path, say=said.append)
    assert found["equal"], "\n".join(said)
    assert found["conditions"] == {n: [] for n in made.stages}
    assert list(found["results"]) == made.stages
    assert read_json(made.run.path / "rerun.json")["equal"]
    assert set((made.root / "runs").glob(".rerun/*")) == kept
    equal = sum(not lines for lines in found["results"].values())
    record("P2", equal, len(made.stages), ", ".join(made.stages))


@pytest.mark.slow
def test_another_number_is_seen_in_the_results(made: Made, tmp_path: Path) -> None:
    """The comparison has teeth: beta changed in manifest and config, both sealed anew."""
    run_path = tmp_path / "made"
    shutil.copytree(made.run.path / "dpo", run_path / "dpo")
    stage = Run(made.config, root=tmp_path).stage("dpo")
    manifest = read_json(stage.path / "manifest.json")
    manifest["config"]["dpo"]["beta"] = 0.11
    write_yaml(stage.path / "config.yaml", manifest["config"])
    stage.manifest = manifest
    stage.note()
    found = rerun.rerun(run_path)
    assert not found["equal"] and found["records"] == {"dpo": []}
    text = "\n".join(found["results"]["dpo"])
    assert "metrics.jsonl line 1" in text or "metrics.jsonl line 2" in text
    assert "weights_sha256" in text and "other weights" in text


def write_yaml(path: Path, values: dict) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def edited_config(made: Made, **changes: object) -> Callable[[], None]:
    path = made.run.path / "dpo/config.yaml"

    def edit() -> None:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            target = values
            for part in parents:
                target = target[part]
            target[last] = value
        write_yaml(path, values)

    return edit


def edited_rows(made: Made, change: Callable[[list[dict]], list[dict]]) -> Callable[[], None]:
    def edit() -> None:
        table = parquet.read_table(made.data)
        rows = change(table.to_pylist())
        parquet.write_table(type(table).from_pylist(rows, schema=table.schema), made.data)

    return edit


def one_byte(rows: list[dict]) -> list[dict]:
    """In a PNG's text chunk, so that it still opens: the smallest change there is."""
    from spavl_lib.data.images import open_image, png_bytes

    image = open_image(rows[3]["image"]["bytes"])
    image.putpixel((0, 0), tuple(255 - v for v in image.getpixel((0, 0))))
    rows[3]["image"]["bytes"] = png_bytes(image)
    return rows


def swapped(rows: list[dict]) -> list[dict]:
    rows[5]["chosen"], rows[5]["rejected"] = rows[5]["rejected"], rows[5]["chosen"]
    return rows


def flipped(path: Path) -> Callable[[], None]:
    def edit() -> None:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    return edit


def patched(owner: object, name: str, value: object) -> Callable[[], None]:
    def edit() -> None:
        CURRENT.setattr(owner, name, value)

    return edit


CURRENT = pytest.MonkeyPatch()


def changes(made: Made) -> dict[str, tuple[Callable[[], None], str]]:
    """Twelve single changes, and what must be named."""
    version, git = importlib.metadata.version, provenance._git
    template = made.base / "chat_template.jinja"
    newer = {"trl": "1.16.1"}

    def another(root: Path, *words: str) -> str:
        return "f" * 40 if words[0] == "rev-parse" else git(root, *words)

    return {
        "image byte": (edited_rows(made, one_byte), "the bytes of an image changed"),
        "row swapped": (edited_rows(made, swapped), "the text of a row changed"),
        "row order": (edited_rows(made, lambda r: r[::-1]), "the order of rows"),
        "seed": (edited_config(made, seed=1), "config.yaml seed: 0 -> 1"),
        "rate": (edited_config(made, dpo__learning_rate=1e-4), "config.yaml dpo.learning_rate: "),
        "beta": (edited_config(made, dpo__beta=0.2), "config.yaml dpo.beta: 0.1 -> 0.2"),
        "template": (
            lambda: template.write_text(template.read_text() + " "), "model/chat_template.jinja: ",
        ),
        "package": (
            patched(importlib.metadata, "version", lambda n: newer.get(n) or version(n)),
            "versions.trl: '1.16.0' -> '1.16.1'",
        ),
        "commit": (
            patched(provenance, "_git", another),
            f"-> '{'f' * 40}'",
        ),
        "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "num_threads: "),
        "dtype": (
            patched(machine, "dtype_name", lambda: "bf16"),
            "dtype: 'fp32' -> 'bf16'",
        ),
        "base bit": (flipped(made.base / "model.safetensors"), "model/model.safetensors: "),
    }  # fmt: skip


def test_each_of_twelve_changes_is_named(made: Made, record: Callable) -> None:
    kept = {p: p.read_bytes() for p in (
        made.data, made.run.path / "dpo/config.yaml", *(p for p in made.base.iterdir()),
    )}  # fmt: skip
    threads, before = torch.get_num_threads(), made.conditions()
    assert before == "dpo: no condition has changed"
    named = 0
    for name, (edit, says) in changes(made).items():
        try:
            edit()
            said = made.conditions()
        finally:
            CURRENT.undo()
            torch.set_num_threads(threads)
            for path, content in kept.items():
                path.write_bytes(content)
        assert says in said, f"{name}: {said}"
        assert len(said.splitlines()) <= 3, f"{name}: {said}"  # named, not drowned
        named += 1
    assert made.conditions() == before
    record("P3", named, 12)


def test_a_changed_record_is_noticed(made: Made) -> None:
    for name, change in (("manifest.json", {"seed": 3}), ("summary.json", {"steps": 9})):
        path = made.run.path / "dpo" / name
        whole = path.read_bytes()
        write_json(path, read_json(path) | change)
        said = made.conditions()
        path.write_bytes(whole)
        assert f"dpo: {name}: " in said


def test_what_cannot_be_repeated_says_why(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage is complete here"):
        rerun.rerun(tmp_path)
    with pytest.raises(InputError, match="data is not complete here"):
        rerun.rerun(made.run.path, only=("data",))
