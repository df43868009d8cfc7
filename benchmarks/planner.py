"""The planner's peak memory held against real training steps, shape by shape.

    python -m benchmarks.planner            all shapes, each in a process of its own
    python -m benchmarks.planner SHAPE      one, as a child: prints its row

Each shape is a LLaVA with random weights and 256 image tokens, stored in 16 bit as the Hub's are,
trained for two optimizer steps by the project's own trainers with every default they have, the
checkpoint and the saved model included. Measured is the peak of anonymous resident memory above
what the process held after its imports.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/planner.json"
IMAGE, PATCH = 128, 8  # pixels a side: 256 image tokens
NARROW = {"hidden": 512, "intermediate": 1408, "layers": 16, "heads": 8, "vocabulary": 8000}
WIDE = {"hidden": 1024, "intermediate": 2816, "layers": 16, "heads": 16, "vocabulary": 8000}
# Name -> trainer, text shape, what trains, pairs (PPO: rows) at once.
SHAPES: dict[str, dict[str, Any]] = {
    "dpo-lora": {"kind": "dpo", "text": NARROW, "adapter": "lora", "batch": 10},
    "dpo-full": {"kind": "dpo", "text": WIDE, "adapter": "full", "batch": 1, "accumulation": 2},
    "ppo-full": {"kind": "ppo", "text": WIDE | {"layers": 6}, "adapter": "full", "batch": 2},
    "reward-lora": {"kind": "reward", "text": NARROW, "adapter": "lora", "batch": 8},
    "dpo-full-checkpointing": {
        "kind": "dpo", "text": WIDE | {"layers": 12}, "adapter": "full", "batch": 2,
        "checkpointing": True,
    },
    "reward-full": {"kind": "reward", "text": WIDE, "adapter": "full", "batch": 2},
    "ppo-lora": {
        "kind": "ppo", "text": NARROW | {"vocabulary": 32000}, "adapter": "lora", "batch": 12,
        "new_tokens": 64,
    },
    "dpo-lora-checkpointing": {
        "kind": "dpo", "text": WIDE | {"layers": 36}, "adapter": "lora", "batch": 2,
        "checkpointing": True,
    },
    "dpo-lora-unshared": {
        "kind": "dpo", "text": NARROW, "adapter": "lora", "batch": 5, "share": "off",
    },
}  # fmt: skip


def overrides(shape: dict[str, Any], name: str) -> dict[str, Any]:
    """The smoke profile's changes for a shape."""
    section, batch = shape["kind"], shape["batch"]
    accumulation = shape.get("accumulation", 1)
    settings = {
        "model.name": name, "model.adapter": shape["adapter"], "model.lora_rank": 16,
        "model.lora_alpha": 32, "model.gradient_checkpointing": shape.get("checkpointing", False),
        "model.share_prefix": shape.get("share", "auto"),
        "data.train_rows": 2 * batch * accumulation, "data.validation_rows": 2,
        f"{section}.max_steps": 2, f"{section}.save_steps": 50,
        f"{section}.per_device_batch_size": batch,
    }  # fmt: skip
    if section == "ppo":
        return settings | {
            "ppo.rollout_batch_size": batch, "ppo.num_minibatches": 1, "ppo.ppo_epochs": 1,
            "ppo.max_new_tokens": shape.get("new_tokens", 32), "ppo.max_steps": 2,
        }  # fmt: skip
    return settings | {f"{section}.gradient_accumulation_steps": accumulation}


def model_config(shape: dict[str, Any], base: Any) -> Any:
    """The embedded model's config with another language model and larger pictures."""
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
    config.vision_config.image_size, config.vision_config.patch_size = IMAGE, PATCH
    config.image_seq_length = (IMAGE // PATCH) ** 2
    config.tie_word_embeddings = False
    return config


def write_model(name: str, target: Path) -> None:
    """A shape's random weights and processor, as `from_pretrained` takes them."""
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    from spavl_lib.config import load_config
    from spavl_lib.modelling.families import llava_images
    from spavl_lib.modelling.load import load_processor, model_path

    plain = load_config("smoke").model
    torch.manual_seed(0)
    config = model_config(SHAPES[name], AutoConfig.from_pretrained(model_path(plain)))
    LlavaForConditionalGeneration(config).half().save_pretrained(target)
    processor = load_processor(plain)
    processor.image_processor = llava_images(IMAGE)
    processor.save_pretrained(target)


def write_reward_model(name: str, model: Path, target: Path) -> None:
    """What a reward trainer would have saved, untrained."""
    from spavl_lib.config import load_config
    from spavl_lib.modelling.heads import save_reward_model
    from spavl_lib.trainers.reward import build_model

    config = load_config("smoke", overrides(SHAPES[name], str(model)))
    target.mkdir()
    save_reward_model(build_model(config), target, config.model)


def planned(name: str, model: str, batch: Any) -> Any:
    """What the planner says of a shape and the batch it met."""
    from spavl_lib.config import load_config
    from spavl_lib.planning import plan as planner
    from spavl_lib.planning.devices import Device

    config = load_config("smoke", overrides(SHAPES[name], model))
    device = Device("cpu", 1e9, 0.1, 20, "none")
    return planner.plan(SHAPES[name]["kind"], config, device, batch=batch)


def measure(name: str) -> dict[str, Any]:
    """Train a shape here; planned and measured peak, GiB."""
    import torch

    from spavl_lib.config import load_config
    from spavl_lib.planning.memory import Batch
    from spavl_lib.runs.stage import Run
    from spavl_lib.trainers import ppo

    kind = SHAPES[name]["kind"]
    trainer = importlib.import_module(f"spavl_lib.trainers.{kind}")
    for module in (trainer, ppo):
        # A random model does not look at pictures as a trained one does, nor is that asked here.
        module.reference_probe = lambda *args, **kwargs: {"ids": [], "logps": []}
    with tempfile.TemporaryDirectory() as folder:
        # In processes of their own: building leaves traces in memory.
        model, rewarding = Path(folder) / "model", Path(folder) / "reward_model"
        _in_child(f"write_model({name!r}, Path({str(model)!r}))")
        settings = overrides(SHAPES[name], str(model))
        if kind == "ppo":
            _in_child(
                f"write_reward_model({name!r}, Path({str(model)!r}), Path({str(rewarding)!r}))"
            )
            settings["ppo.reward_model"] = str(rewarding)
        os.environ["SPAVL_RUNS"] = folder
        config = load_config("smoke", settings)
        met: list[Batch] = []
        _note_batches(SHAPES[name], met)
        torch.manual_seed(0)
        before = _resident_gib()
        with _Peak() as peak:
            getattr(trainer, f"train_{kind}")(config, Run(config).stage(kind))
        batch = max(met, key=lambda b: b.rows * b.tokens)
        made = planned(name, str(model), batch)
    return {
        "shape": name, "rows": batch.rows, "tokens": batch.tokens, "answer": batch.answer,
        "imports_gib": round(before, 3), "measured_gib": round(peak.gib - before, 3),
        "planned_gib": round(made.total_gib, 3),
        "error": round(made.total_gib / (peak.gib - before) - 1, 4),
        "parts_gib": {k: round(v, 3) for k, v in made.parts_gib.items()},
    }  # fmt: skip


def _note_batches(shape: dict[str, Any], met: list) -> None:
    """Keep the shape of every batch that is trained on."""
    from spavl_lib.planning.memory import Batch
    from spavl_lib.trainers.exact_trainer import CheckedMixin
    from spavl_lib.trainers.ppo import PPOTrainer

    if shape["kind"] == "ppo":
        plain = PPOTrainer._batch

        def batch_of(self: Any, prompts: Any, responses: Any, rows: list[int]) -> Any:
            batch = plain(self, prompts, responses, rows)
            width = max(len(responses[i]) for i in rows)
            met.append(Batch(*batch["input_ids"].shape, width))
            return batch

        PPOTrainer._batch = batch_of
        return
    step = CheckedMixin.training_step

    def training_step(self: Any, model: Any, inputs: dict, *args: Any) -> Any:
        (rows, width), real = inputs["input_ids"].shape, inputs["attention_mask"].sum(1)
        answer = inputs["completion_mask"].sum(1).float().mean().item()
        # Shared prefixes run no padding.
        tokens = width if shape.get("share") == "off" else real.float().mean().item()
        met.append(Batch(rows, round(tokens), round(answer)))
        return step(self, model, inputs, *args)

    CheckedMixin.training_step = training_step


class _Peak:
    """The highest resident memory inside the block, whoever resets the system's own mark."""

    def __enter__(self) -> "_Peak":
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


def _in_child(call: str) -> None:
    code = f"from pathlib import Path\nfrom benchmarks.planner import *\n{call}\n"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def write(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write what was measured so far; the page."""
    import importlib.metadata

    from spavl_lib.machine import device_name

    page = {
        "name": "planner",
        "device": device_name(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl")},
        "metrics": {"largest_error": max(abs(r["error"]) for r in rows), "shapes": rows},
    }
    RESULTS.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return page


def main() -> None:
    """All shapes, each in a process of its own; the last line is one JSON object."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows, page = [], {}
    for name in SHAPES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.planner", name],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
        page = write(rows)
    print(json.dumps(page))


if __name__ == "__main__":
    main()
