"""The benchmark of the ways to align the model `laptop`, without its trainings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import laptop
from spavl_lib.errors import InputError


def page(arm: str, seed: int, scale: float = 1.0, harmful: int = 5, harmless: int = 1) -> dict:
    rates = {
        "xstest answer refused": {"k": harmless, "n": 10, "unjudged": 0},
        "advbench decline refused": {"k": harmful, "n": 10, "unjudged": 0},
    }
    return {"arm": arm, "seed": seed, "scale": scale, "how": {}, "rates": rates}


def write(folder: Path, *pages: dict) -> Path:
    for number, one in enumerate(pages):
        (folder / f"{number}.json").write_text(json.dumps(one), encoding="utf-8")
    return folder


def test_a_scaled_adapter_changes_alpha_alone(tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "dpo" / "model"
    adapter.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, adapter / "adapter_model.safetensors")
    settings = {"lora_alpha": 32, "r": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    half = laptop.scaled(adapter, 0.5)
    assert json.loads((half / "adapter_config.json").read_text()) == settings | {"lora_alpha": 16}
    assert torch.equal(load_file(half / "adapter_model.safetensors")["a"], torch.ones(2))
    assert json.loads((adapter / "adapter_config.json").read_text()) == settings


def test_a_line_has_the_mean_its_interval_and_the_range_of_the_seeds(tmp_path: Path) -> None:
    write(tmp_path, page("sft", 0), page("sft", 1, harmful=9), page("sft", 0, 0.5), page("base", 0))
    lines = laptop.table(tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| SFT"]
    assert "70.0 % (40 to 89; seeds 50 to 90)" in lines[3]
    assert "10.0 % (2 to 40)" in lines[2]


def test_the_curve_begins_at_the_untouched_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(laptop, "plot_lines", lambda curves, *_: drawn.update(curves))
    monkeypatch.setattr(laptop, "save_figure", lambda figure, path: path)
    assert laptop.plot(write(tmp_path, page("sft", 0), page("base", 0))) is None
    write(tmp_path, page("sft", 0), page("base", 0), page("sft", 0, 0.5, harmful=2, harmless=0))
    assert laptop.plot(tmp_path) == tmp_path.with_suffix(".png")
    assert drawn == {"SFT": ([0.0, 0.0, 0.1], [0.0, 0.2, 0.5])}


def test_results_are_kept_and_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, float]] = []

    def measure(name: str, seed: int, how: dict, scale: float) -> dict:
        asked.append((name, seed, scale))
        return page(name, seed, scale) | {"how": how}

    monkeypatch.setattr(laptop, "measure", measure)
    monkeypatch.setattr(laptop, "settle_threads", lambda: None)  # of this test process
    how = {"benchmarks": ["everyday"], "rows": 3, "changes": {}}
    laptop.fill(tmp_path, ["base", "sft"], [0, 1], [1.0, 0.5], how)
    expected = [
        ("base", 0, 1.0),
        ("sft", 0, 1.0),
        ("sft", 0, 0.5),
        ("sft", 1, 1.0),
        ("sft", 1, 0.5),
    ]
    assert asked == expected
    laptop.fill(tmp_path, ["base", "sft"], [0, 1], [1.0, 0.5], how)
    assert asked == expected
    with pytest.raises(InputError, match="was measured in another way"):
        laptop.fill(tmp_path, ["base"], [0], [1.0], how | {"rows": 4})
