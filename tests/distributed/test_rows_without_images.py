"""ZeRO-3, where one process's batch has images and the other's has none."""

import json
from pathlib import Path

import pytest

from spavl_lib.runs.files import read_jsonl
from tests.distributed.conftest import Result, config_of, train
from tests.helpers import hub_rows


def write(folder: Path) -> Path:
    """Pairs of which every other one has no image."""
    folder.mkdir()
    lines = []
    for number, row in enumerate(hub_rows("train", 48)):
        name = f"{number}.png"
        (folder / name).write_bytes(row["image"]["bytes"])
        texts = {"prompt": row["question"], "chosen": row["chosen"], "rejected": row["rejected"]}
        picture = name if number % 2 else None
        lines.append(json.dumps({"id": f"{number}", "image": picture, **texts}))
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def trained(kind: str, name: str, data: Path, **changes: object) -> Result:
    settings = {
        "data__source": "datasets", "data__path": str(data), "data__train_rows": 0,
        f"{kind}__per_device_batch_size": 1, "launch__timeout_s": 300,
    }  # fmt: skip
    if kind == "ppo":
        settings |= {"ppo__max_steps": 2, "ppo__sft_coef": 0.0, "ppo__rollout_batch_size": 8}
    return train(kind, config_of(kind, name, **settings | changes))


def has_image(row_id: str) -> bool:
    return bool(int(row_id) % 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "reward", "ppo"])
@pytest.mark.filterwarnings("ignore")
def test_a_process_without_an_image_trains_with_one_that_has_some(
    kind: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    pytest.importorskip("deepspeed", reason="the optional extra is not installed")
    if kind != "dpo" and not pytestconfig.getoption("--soak"):
        pytest.skip("only in the soak")
    data = write(tmp_path / "rows")
    expected = trained(kind, f"mixed-{kind}-alone", data)
    result = trained(
        kind, f"mixed-{kind}-zero3", data, launch__num_processes=2, launch__engine="zero3"
    )
    assert result.summary["launch"] == {"engine": "zero3", "world_size": 2}
    assert result.losses.keys() == expected.losses.keys()
    for step, loss in expected.losses.items():
        assert result.losses[step] == pytest.approx(loss, abs=1e-5), step
    assert len(set(expected.losses.values())) > 1
    if kind == "ppo":
        return
    # Two pairs make a step, one of each process.
    steps = [row["row_ids"] for row in read_jsonl(result.stage.metrics_path) if "loss" in row]
    kinds = {tuple(map(has_image, ids)) for ids in steps}
    assert {(True, False), (False, True)} & kinds and len(steps) == 5
