"""What needs a GPU: does LLaVA-1.5 fit where it must, how fast is it, do weights really move.

    python benchmarks/gpu_full_scale.py                    every case that the GPU has memory for
    python benchmarks/gpu_full_scale.py --dry              the same code on the CPU, tiny shapes
    python benchmarks/gpu_full_scale.py CASE               one case, as a child

Models have the true shapes and random weights, made on the spot: speed and memory do not depend on
what was learnt. Each case trains through the project's own trainers, in a process of its own, and
writes its row at once, so that an interrupted run keeps what it has. The precision is $SPAVL_DTYPE,
which each case sets: fp16 is the T4's. The whole list has 30 minutes: what has not begun by then is
left out and named.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spavl_lib.machine import DTYPE

RESULTS = Path(__file__).parent / "results"
COLAB_GIB = 15.0
SEVEN, THIRTEEN = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
# Case -> trainer, shape, precision, memory cap, what of the model trains.
CASES: dict[str, dict[str, Any]] = {
    f"{kind}-7b-qlora-{half}-15gib": {
        "kind": kind, "shape": SEVEN, "half": half, "cap_gib": COLAB_GIB,
        "set": {"model.adapter": "qlora", "model.gradient_checkpointing": True,
                "model.lora_rank": 64, "model.lora_alpha": 128},
    }
    for kind in ("reward", "dpo", "ppo")
    for half in ("bf16", "fp16")
} | {
    "dpo-7b-full-80gib": {
        "kind": "dpo", "shape": SEVEN, "half": "bf16", "cap_gib": 79.0,
        "set": {"model.adapter": "full", "model.gradient_checkpointing": True,
                "dpo.learning_rate": 1e-6},
        "moved": True,
    },
    "dpo-13b-lora-80gib": {
        "kind": "dpo", "shape": THIRTEEN, "half": "bf16", "cap_gib": 79.0,
        "set": {"model.adapter": "lora", "model.gradient_checkpointing": True,
                "model.lora_rank": 256, "model.lora_alpha": 512},
    },
}  # fmt: skip
STEPS, ROWS = 4, 16
FP16_STEPS = 12  # the first are skipped, until the loss scale is small enough
LIMIT_S = 25 * 60  # no case begins later, so that the list ends within half an hour


def shaped_model(name: str, target: Path, half: torch.dtype, *, tiny: bool) -> None:
    """A folder with the shape's random weights, written shard by shard, and LLaVA's processor."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from spavl_lib.config import ModelConfig, load_config
    from spavl_lib.modelling.families import llava_images
    from spavl_lib.modelling.load import load_processor
    from spavl_lib.planning import shapes

    embedded = load_processor(load_config("smoke").model)
    config = shapes.model_config(ModelConfig(name=name, adapter="lora"))
    text, vision = config.text_config, config.vision_config
    if tiny:
        text.update(
            {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
            | {"num_attention_heads": 4, "num_key_value_heads": 4}
        )
        vision.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "image_size": 56})  # fmt: skip
    tokenizer = embedded.tokenizer
    text.update({"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                 "pad_token_id": tokenizer.pad_token_id})  # fmt: skip
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(half)
    with where:
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(before)
    model.save_pretrained(target, max_shard_size="2GB")
    LlavaProcessor(
        image_processor=llava_images(vision.image_size),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=embedded.chat_template,
    ).save_pretrained(target)


def model_of(shape: str, models: Path, *, dry: bool) -> Path:
    """The folder of a shape's model, made if it is missing; those of other shapes are deleted."""
    target = models / shape.replace("/", "_")
    if not target.exists():
        for other in models.iterdir():  # two do not fit on a small disk
            shutil.rmtree(other)
        # In a process of its own: building needs the memory that training is measured in.
        build = (
            "import sys, torch; sys.path.insert(0, '.'); from pathlib import Path\n"
            "from benchmarks.gpu_full_scale import shaped_model\n"
            f"shaped_model({shape!r}, Path({str(target)!r} + '.new'), torch.bfloat16, tiny={dry})\n"
        )
        subprocess.run([sys.executable, "-c", build], check=True)
        target.with_name(f"{target.name}.new").rename(target)
    return target


def run_case(name: str, models: Path, *, dry: bool) -> dict[str, Any]:
    """Train a case here; peak memory, tokens a second, share of the matmul rate."""
    from spavl_lib.config import load_config
    from spavl_lib.modelling import load
    from spavl_lib.runs.stage import Run

    case = CASES[name]
    cuda = torch.cuda.is_available()
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, case["cap_gib"] / total))
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(case["shape"], models, dry=dry)
        config = load_config("smoke", _settings(case, model, dry), run_name=name)
        rate = matmul_tflops(load.compute_dtype())
        stage = Run(config, root=Path(folder) / "runs").stage(case["kind"])
        before = _weights(config) if case.get("moved") else {}
        started = time.perf_counter()
        summary, peaks = _train(case["kind"], config, stage, folder, cuda)
        row = {
            "case": name, "fits": True, "steps": summary["steps"],
            "seconds": round(time.perf_counter() - started, 1), "peak_gib": peaks,
            "dtype": stage.dtype,
            "matmul_tflops": round(rate, 1), **_speed(config, case, stage, rate),
        }  # fmt: skip
        if before:
            row["moved_share"] = _moved(before, stage.path / "model")
        return row


def _settings(case: dict[str, Any], model: Path, dry: bool) -> dict[str, Any]:
    settings = {"model.name": str(model), "data.train_rows": ROWS,
                "data.validation_rows": 2, "ppo.rollout_batch_size": 4, "ppo.max_steps": 2,
                "ppo.per_device_batch_size": 1, "ppo.max_new_tokens": 64}  # fmt: skip
    steps = FP16_STEPS if case["half"] == "fp16" else STEPS
    for section in ("reward", "dpo"):
        settings |= {
            f"{section}.max_steps": steps, f"{section}.save_steps": 1000,
            f"{section}.per_device_batch_size": 1, f"{section}.gradient_accumulation_steps": 2,
        }  # fmt: skip
    settings |= case["set"]
    if dry:
        settings |= {"model.lora_rank": 4, "model.lora_alpha": 8, "ppo.max_new_tokens": 4}
        if settings["model.adapter"] == "qlora":  # bitsandbytes has CPU kernels too
            settings["model.gradient_checkpointing"] = False
    return settings


def _train(kind: str, config: Any, stage: Any, folder: str, cuda: bool) -> tuple[dict, Any]:
    from spavl_lib.runs.maker import maker_of
    from spavl_lib.trainers import dpo, ppo

    # The probe needs a model that uses its images, and one with random weights does not.
    for module in (dpo, ppo):
        module.reference_probe = lambda *args, **kwargs: {"ids": [], "logps": []}
    if kind == "ppo":
        maker_of("reward")(config, stage.run.stage("reward"))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    summary = maker_of(kind)(config, stage)
    if not cuda:
        return summary, None
    peaks = {
        "allocated": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }
    return summary, peaks


def matmul_tflops(dtype: torch.dtype) -> float:
    """The device's matmul rate, measured now."""
    cuda = torch.cuda.is_available()
    size, repeats = (8192, 20) if cuda else (512, 5)
    a = torch.randn(size, size, device="cuda" if cuda else "cpu").to(dtype)
    a @ a
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        a @ a
    if cuda:
        torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - started) / 1e12


def _speed(config: Any, case: dict[str, Any], stage: Any, rate: float) -> dict[str, Any]:
    """From the log's clock, the first step left out; work counted as the planner counts it."""
    from spavl_lib.planning import shapes
    from spavl_lib.planning.devices import Device
    from spavl_lib.planning.time import step_time
    from spavl_lib.runs.files import read_jsonl

    rows = [r for r in read_jsonl(stage.metrics_path) if "time_s" in r]
    if len(rows) < 2 or case["kind"] == "ppo":
        return {}
    step = (rows[-1]["time_s"] - rows[0]["time_s"]) / (rows[-1]["step"] - rows[0]["step"] or 1)
    shape = shapes.shape_of(shapes.model_config(config.model), config.model.lora_targets)
    tokens = shape.image_tokens + 100
    device = Device("measured", 1e9, rate, 1e9, "none")
    ideal, _ = step_time(case["kind"], config, shape, device, 2, tokens)
    section = getattr(config, case["kind"])
    done = 2 * section.per_device_batch_size * section.gradient_accumulation_steps * tokens
    return {
        "step_s": round(step, 3),
        "tokens_per_s": round(done / step, 1) if step else None,
        "share_of_matmul_rate": round(0.7 * ideal / step, 3) if step else None,
    }


def _weights(config: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    named = {}
    for path in sorted(Path(config.model.name).glob("*.safetensors")):
        named |= {k: v for k, v in load_file(path).items() if "layers.0." in k and "mlp" in k}
    return named


def _moved(before: dict[str, torch.Tensor], folder: Path) -> float:
    """Share of the first layer's MLP values that differ after training, in the masters' fp32."""
    from safetensors.torch import load_file

    after: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        after |= {k: v for k, v in load_file(path).items() if k in before}
    moved = sum((after[k].float() != v.float()).sum().item() for k, v in before.items())
    return round(moved / sum(v.numel() for v in before.values()), 4)


def main() -> None:
    """Every case; the last line is one JSON object, as in every benchmark here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", choices=CASES)
    parser.add_argument("--models", help="folder that keeps the models of other cases")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, also on the CPU")
    options = parser.parse_args()
    if options.case:
        os.environ[DTYPE] = CASES[options.case]["half"]
        with tempfile.TemporaryDirectory() as folder:
            models = Path(options.models or folder)
            print(json.dumps(run_case(options.case, models, dry=options.dry)))
        return
    if not torch.cuda.is_available() and not options.dry:
        sys.exit("no GPU here: --dry runs the same code on tiny shapes")
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    dry = ["--dry"] if options.dry else []
    with tempfile.TemporaryDirectory() as models:
        for name, case in CASES.items():
            if torch.cuda.is_available():
                have = torch.cuda.get_device_properties(0).total_memory / 2**30
                if case["cap_gib"] > have + 1:
                    rows.append(
                        {"case": name, "skipped": f"needs {case['cap_gib']} GiB, has {have:.0f}"}
                    )
                    continue
            if time.monotonic() - began > LIMIT_S:
                rows.append(
                    {"case": name, "skipped": f"not begun within {LIMIT_S / 60:.0f} minutes"}
                )
                continue
            done = subprocess.run(
                [sys.executable, __file__, name, *dry, "--models", models],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no words"
                rows.append(
                    {"case": name, "fits": "out of memory" not in last.lower(), "error": last}
                )
            else:
                rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(rows[-1], flush=True)
            _write(rows, options.dry)
    print(json.dumps(_write(rows, options.dry)))


def _write(rows: list[dict[str, Any]], dry: bool) -> dict[str, Any]:
    from spavl_lib.machine import device_name

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    page = {
        "name": "gpu_full_scale",
        "device": device_name(),
        "versions": {n: importlib.metadata.version(n) for n in names},
        "metrics": {"dry": dry, "cases": rows},
    }
    if not dry:
        target = RESULTS / "gpu_full_scale.json"
        target.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return page


if __name__ == "__main__":
    main()
