"""One set of cases, short in every test run and long with --soak; figures are written down."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spavl_lib.runs.files import read_json, read_jsonl
from spavl_lib.trainers import checkpoint as ckpt
from tests.helpers import SUPERVISED, hub_rows, write_hub_folder
from tests.reliability.processes import Child, ready, spavl

OWN = ("time_s", "peak_memory_gib")
STEPS, SAVE_STEPS = 6, 2
# One line an algorithm: the trainer, and what is set beyond the common.
ALGORITHMS = {
    **SUPERVISED,
    "ppo": (
        "ppo",
        {"ppo.rollout_batch_size": 4, "ppo.max_new_tokens": 8, "ppo.learning_rate": 1e-4},
    ),
}


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the long form was asked for."""
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write a measured figure down, where --figures names a file.

    Called with the row's id, how many came out right, of how many, and a word on what.
    """
    target = request.config.getoption("--figures")

    def write(row: str, right: int, of: int, what: str = "", **more: object) -> None:
        if target:
            line = {"row": row, "right": right, "of": of, "what": what, **more}
            line["soak"] = request.config.getoption("--soak")
            line["at"] = time.strftime("%Y-%m-%d")
            with Path(target).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")

    return write


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training pairs and 4 held-out ones, in the Hub's layout."""
    folder = tmp_path_factory.mktemp("rows")
    return write_hub_folder(folder, hub_rows("train", 16), hub_rows("validation", 4))


@dataclass
class Case:
    """How one algorithm is trained here, again and again, each time in a folder of its own."""

    name: str
    rows: Path
    root: Path
    kind: str = ""
    sets: dict = field(default_factory=dict)
    straight: "Ended | None" = None
    took_s: float = 0.0

    def __post_init__(self) -> None:
        self.kind, more = ALGORITHMS[self.name]
        section = {
            "max_steps": STEPS, "save_steps": SAVE_STEPS, "per_device_batch_size": 4,
            "learning_rate": 1e-3, "warmup_steps": 1,
        }  # fmt: skip
        self.sets = {
            "data.source": "hub_layout",
            "data.path": str(self.rows),
            "data.train_rows": 0,
            "data.validation_rows": 0,
            **{f"{self.kind}.{k}": v for k, v in section.items()},
            **more,
        }

    def words(self, changes: dict | None = None, seed: int = 0) -> list[str]:
        """The command."""
        sets = [w for k, v in (self.sets | (changes or {})).items() for w in ("--set", f"{k}={v}")]
        return ["train", self.kind, "-p", "smoke", "--seed", str(seed), "--run-name", "r", *sets]

    def start(
        self,
        name: str,
        *,
        fault: str = "",
        changes: dict | None = None,
        seed: int = 0,
        more: tuple = (),
        **env: str,
    ) -> Child:
        """Train in the runs folder of that name, in a process."""
        runs = self.root / name
        words = [*self.words(changes, seed), *more]
        env = {"SPAVL_KIND": self.kind} | env
        return spavl(words, runs, self.root / f"{name}.log", fault=fault, env=env)

    def stage(self, name: str) -> Path:
        """The stage's folder there."""
        return self.root / name / "r" / self.kind

    def ended(self, name: str) -> "Ended":
        """What a finished training left."""
        return Ended.read(self.stage(name))

    def newest(self, name: str) -> int:
        """Step of the newest whole checkpoint, 0 for none."""
        found, _ = ckpt.latest_checkpoint(self.stage(name) / "checkpoints")
        return int(found.name[5:]) if found else 0

    def logged(self, name: str) -> int:
        """The last logged step, 0 for none."""
        return max((r["step"] for r in read_jsonl(self.stage(name) / "metrics.jsonl")), default=0)


@dataclass(frozen=True)
class Ended:
    """What two runs must share: weights, log and summary, but for clock and memory."""

    weights: str
    summary: str
    log: str

    @classmethod
    def read(cls, stage: Path) -> "Ended":
        summary = read_json(stage / "summary.json")
        log = [
            {k: v for k, v in row.items() if k not in OWN}
            for row in read_jsonl(stage / "metrics.jsonl")
        ]
        return cls(summary["weights_sha256"], json.dumps(summary), json.dumps(log))


@pytest.fixture(scope="session")
def cases(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A case by its algorithm's name, with its uninterrupted run; made once."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            case = Case(name, rows, tmp_path_factory.mktemp(name))
            if case.kind == "ppo":
                case.sets["ppo.reward_model"] = str(get("reward").stage("straight") / "model")
            ready()  # the clock is not to count the imports
            began = time.monotonic()
            child = case.start("straight")
            assert child.wait() == 0, child.said[-3000:]
            case.took_s = time.monotonic() - began
            case.straight = case.ended("straight")
            made[name] = case
        return made[name]

    return get


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Seeded by the test's name: the same moments every time."""
    return random.Random(request.node.name)
