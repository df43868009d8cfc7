"""The planner's peak memory held against real training steps, shape by shape.

    python benchmarks/planner.py            all shapes, each in a process of its own
    python benchmarks/planner.py SHAPE      one, as a child: prints its measured GiB

Each shape is a LLaVA with random weights, trained for two optimizer steps by the project's own
trainers. Measured is the peak resident memory above what the process held after its imports.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Name -> trainer, text shape, changes of the smoke profile.
BASE = {"hidden": 1024, "intermediate": 2816, "layers": 8, "heads": 16, "vocabulary": 8000}
SHAPES: dict[str, dict[str, Any]] = {
    "dpo-full": {"kind": "dpo", "text": BASE | {"layers": 6}, "adapter": "full", "batch": 2},
    "dpo-full-wide": {
        "kind": "dpo", "adapter": "full", "batch": 1,
        "text": {"hidden": 1536, "intermediate": 4096, "layers": 4, "heads": 16,
                 "vocabulary": 16000},
    },
    "dpo-lora": {"kind": "dpo", "text": BASE, "adapter": "lora", "batch": 12},
    "dpo-lora-checkpointing": {
        "kind": "dpo", "text": BASE | {"layers": 24}, "adapter": "lora", "batch": 12,
        "checkpointing": True,
    },
    "reward-lora": {"kind": "reward", "text": BASE | {"layers": 10}, "adapter": "lora",
                    "batch": 10},
    "reward-full": {"kind": "reward", "text": BASE | {"layers": 10}, "adapter": "full",
                    "batch": 2},
    "dpo-full-accumulated": {
        "kind": "dpo", "text": BASE | {"layers": 5}, "adapter": "full", "batch": 4,
        "accumulation": 2,
    },
}  # fmt: skip
ROWS = 16


def overrides(shape: dict[str, Any], name: str) -> dict[str, Any]:
    """The smoke profile's changes for a shape."""
    section, batch = shape["kind"], shape["batch"]
    return {
        "model.name": name, "model.adapter": shape["adapter"], "model.lora_rank": 16,
        "model.lora_alpha": 32, "model.gradient_checkpointing": shape.get("checkpointing", False),
        "data.train_rows": max(ROWS, 2 * batch * shape.get("accumulation", 1)),
        "data.validation_rows": 2, f"{section}.max_steps": 2, f"{section}.save_steps": 50,
        f"{section}.per_device_batch_size": batch,
        f"{section}.gradient_accumulation_steps": shape.get("accumulation", 1),
    }  # fmt: skip


def text_config(shape: dict[str, Any], base: Any) -> Any:
    """The embedded model's config with another language model."""
    text = shape["text"]
    config = type(base).from_dict(base.to_dict())
    values = {
        "hidden_size": text["hidden"], "intermediate_size": text["intermediate"],
        "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"],
        "num_key_value_heads": text["heads"], "head_dim": text["hidden"] // text["heads"],
        "vocab_size": text["vocabulary"], "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }  # fmt: skip
    for key, value in values.items():
        setattr(config.text_config, key, value)
    config.tie_word_embeddings = False
    return config


def planned_gib(name: str) -> float:
    """What the planner says of a shape, at the tokens its longest batch has."""
    from transformers import AutoConfig

    from spavl_lib import planner, shapes
    from spavl_lib.config import load_config
    from spavl_lib.modelling.load import model_path

    shape = SHAPES[name]
    config = load_config("smoke", overrides(shape, "embedded"))
    shaped = text_config(shape, AutoConfig.from_pretrained(model_path(config.model)))
    counted = shapes.shape_of(shaped, config.model.lora_targets)
    device = shapes.Device("cpu", 1e9, 0.1, 20, "none")
    page = json.loads((Path(__file__).parent / "results/planner.json").read_text())
    tokens = next(r["tokens"] for r in page["metrics"]["shapes"] if r["shape"] == name)
    return planner._plan(shape["kind"], config, device, counted, tokens).total_gib


def measure(name: str) -> dict[str, Any]:
    """Train a shape here; peak GiB above the imports, and the longest batch's tokens."""
    import torch

    from spavl_lib.config import load_config
    from spavl_lib.data.collate import PreferenceCollator
    from spavl_lib.modelling.load import load_processor, model_path
    from spavl_lib.run import Run, reset_peak_memory
    from spavl_lib.trainers import dpo, reward

    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        plain = load_config("smoke")
        processor = load_processor(plain.model)
        _write_model(shape, Path(folder) / "model", model_path(plain.model), processor)
        os.environ["SPAVL_RUNS"] = folder
        config = load_config("smoke", overrides(shape, str(Path(folder) / "model")))
        tokens: list[int] = []
        plain_call = PreferenceCollator.__call__

        def call(self: Any, rows: list[dict]) -> dict:
            batch = plain_call(self, rows)
            if len(rows) == shape["batch"]:
                tokens.append(batch["input_ids"].shape[1])
            return batch

        PreferenceCollator.__call__ = call
        # A random model does not look at pictures as a trained one does, nor is that asked here.
        dpo.reference_probe = lambda *args, **kwargs: {"ids": [], "logps": []}
        torch.manual_seed(0)
        reset_peak_memory()
        before = _resident_gib()
        train = {"dpo": dpo.train_dpo, "reward": reward.train_reward}[shape["kind"]]
        stage = Run(config).stage(shape["kind"])
        peak = _Peak()
        with peak:
            train(config, stage)
        return {
            "shape": name, "tokens": max(tokens), "measured_gib": round(peak.gib - before, 3),
            "imports_gib": round(before, 3),
        }  # fmt: skip


class _Peak:
    """The highest resident memory inside the block, whoever resets the system's own mark."""

    def __enter__(self) -> "_Peak":
        import threading

        self.gib, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.gib = max(self.gib, _resident_gib())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _resident_gib() -> float:
    """Anonymous memory: pages of mapped files are the system's to drop."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(x for x in lines if x.startswith("RssAnon")).split()[1]) / 2**20


def _write_model(shape: dict[str, Any], target: Path, source: str, processor: Any) -> None:
    """In a process of its own: building leaves traces in memory."""
    code = (
        "import sys, torch; sys.path.insert(0, '.')\n"
        "from benchmarks.planner import SHAPES, text_config\n"
        "from transformers import AutoConfig, LlavaForConditionalGeneration\n"
        f"config = text_config(SHAPES[{[k for k, v in SHAPES.items() if v is shape][0]!r}], "
        f"AutoConfig.from_pretrained({source!r}))\n"
        "torch.manual_seed(0)\n"
        f"LlavaForConditionalGeneration(config).save_pretrained({str(target)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    processor.save_pretrained(target)


def main() -> None:
    """All shapes, each in a process of its own; the last line is one JSON object."""
    import importlib.metadata

    from spavl_lib.run import device_name

    if len(sys.argv) > 1 and sys.argv[1] in SHAPES:
        print(json.dumps(measure(sys.argv[1])))
        return
    target = Path(__file__).parent / "results/planner.json"
    rows = []
    for name in SHAPES:
        done = subprocess.run(
            [sys.executable, __file__, name], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        page = {
            "name": "planner",
            "device": device_name(),
            "versions": {
                n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl")
            },
            "metrics": {"shapes": rows},
        }
        target.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
        rows[-1]["planned_gib"] = round(planned_gib(name), 3)
        rows[-1]["error"] = round(rows[-1]["planned_gib"] / rows[-1]["measured_gib"] - 1, 4)
        print(rows[-1])
    page["metrics"]["largest_error"] = max(abs(r["error"]) for r in rows)
    target.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(page))


if __name__ == "__main__":
    main()
