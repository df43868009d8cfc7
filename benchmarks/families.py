"""A DPO step in several model families: trl's trainer as it comes, and over shared prefixes.

The ratios are those of CPU seconds, which count this process alone, whoever else is at work.

python -m benchmarks.families                        # one thread, about half an hour
python -m benchmarks.families qwen3_vl --repeats 1   # one family
"""

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.dpo_step import ALL, LAYOUTS, NONE, PAIRS, Switches
from spavl_lib.modelling.speed.completion_head import score_completions_only
from spavl_lib.modelling.speed.fused_lora import fuse_lora
from spavl_lib.modelling.speed.host import return_freed_memory
from spavl_lib.modelling.speed.shared_prefix import HANDLE, backbone_of, share_prefix

# trl as it comes; shared prefixes alone; with the head and LoRA in place.
VARIANTS = {"trl": NONE, "share": NONE | {"share": True}, "all": ALL}
MERGE = 2  # in Qwen's towers a token stands for MERGE x MERGE patches
CHECKPOINTED = dataclasses.replace(common.Shape(), gradient_checkpointing=True)
VOCABULARIES = (512, 32_064)  # of the other benchmarks, and of LLaVA-1.5


def _text(shape: common.Shape) -> dict:
    """Settings of a text model of that shape with two key-value heads."""
    return dict(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=2, tie_word_embeddings=False,
        intermediate_size=shape.intermediate, max_position_embeddings=8192,
        pad_token_id=common.PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _qwen_tower(shape: common.Shape) -> dict:
    return dict(
        depth=shape.tower_layers, hidden_size=shape.tower_hidden, num_heads=shape.tower_heads,
        intermediate_size=shape.tower_intermediate, out_hidden_size=shape.hidden,
        patch_size=shape.patch, spatial_merge_size=MERGE, temporal_patch_size=2,
    )  # fmt: skip


def _qwen_ids(shape: common.Shape) -> dict:
    return {"image_token_id": common.IMAGE_TOKEN, "video_token_id": shape.vocabulary - 1}


def qwen2_5_vl(shape: common.Shape) -> PreTrainedModel:
    """A random Qwen2.5-VL, whose tower attends within windows."""
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    tower = dict(window_size=8 * shape.patch, fullatt_block_indexes=[shape.tower_layers - 1])
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(shape) | {"rope_parameters": rope},
        vision_config=_qwen_tower(shape) | tower, **_qwen_ids(shape),
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(shape: common.Shape) -> PreTrainedModel:
    """A random Qwen3-VL: features of two layers of the tower go into layers of the text model."""
    rope = {"rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 5e6,
            "mrope_interleaved": True}  # fmt: skip
    side = shape.grid * MERGE
    tower = dict(num_position_embeddings=side * side, deepstack_visual_indexes=[0, 1])
    config = hf.Qwen3VLConfig(
        text_config=_text(shape) | {"rope_parameters": rope, "head_dim": 64},
        vision_config=_qwen_tower(shape) | tower, **_qwen_ids(shape),
    )  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration(config)


def gemma3(shape: common.Shape) -> PreTrainedModel:
    """A random Gemma 3: image tokens see each other, and five of six layers have a window."""
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
             for i in range(shape.layers)]  # fmt: skip
    text = hf.Gemma3TextConfig(**_text(shape), head_dim=64, sliding_window=512, layer_types=kinds)
    tower = hf.SiglipVisionConfig(
        hidden_size=shape.tower_hidden, intermediate_size=shape.tower_intermediate,
        num_hidden_layers=shape.tower_layers, num_attention_heads=shape.tower_heads,
        image_size=shape.grid * shape.patch, patch_size=shape.patch, vision_use_head=False,
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=tower, image_token_id=common.IMAGE_TOKEN,
        mm_tokens_per_image=shape.image_tokens, boi_token_index=shape.vocabulary - 1,
        eoi_token_index=shape.vocabulary - 2, pad_token_id=common.PAD,
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(config)
    # Zero in a new model, which would hide the images.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "gemma3": gemma3}


def build_model(family: str, shape: common.Shape) -> PreTrainedModel:
    """A random model of a family with a text model of that shape, all of it frozen."""
    torch.manual_seed(0)
    return FAMILIES[family](shape).requires_grad_(False)


def build_pairs(family: str, shape: common.Shape, images: int, questions: int) -> dict[str, Tensor]:
    """The rows of `common.build_pairs`, with the images and token types that a family takes."""
    batch = common.build_pairs(shape, images, questions)
    of_image = (batch["input_ids"] == common.IMAGE_TOKEN).long()
    if family == "gemma3":
        return batch | {"token_type_ids": of_image}
    side = shape.grid * MERGE
    chance = torch.Generator().manual_seed(0)
    patches = torch.randn(images, side * side, 3 * 2 * shape.patch**2, generator=chance)
    of_rows = patches.repeat_interleave(questions, 0).repeat(2, 1, 1)
    return batch | {
        "pixel_values": of_rows.flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(of_rows)),
        "mm_token_type_ids": of_image,
    }


def measure(family: str, shape: common.Shape, repeats: int) -> dict:
    """Seconds, ratios and errors of both layouts.

    Args:
        family: A key of `FAMILIES`.
        shape: Of model and rows.
        repeats: Timed turns.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        policy = common.adapted(build_model(family, shape), shape)
        trainer = common.dpo_trainer(policy, shape, PAIRS, folder)
        switches = Switches(trainer)
        for layout, (images, questions) in LAYOUTS.items():
            batch = build_pairs(family, shape, images, questions)

            def step(variant: str, batch: dict[str, Tensor] = batch) -> None:
                switches.set(**VARIANTS[variant])
                own = batch | {"pixel_values": batch["pixel_values"].clone()}
                common.dpo_step(trainer, own)

            switches.set(**NONE)
            loss, gradient = common.gradients(trainer, batch)
            switches.set(**ALL)
            other_loss, other = common.gradients(trainer, batch)
            counts = getattr(backbone_of(policy), HANDLE).stats
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
            for turn in range(repeats + 1):
                for name, of_variant in times.items():
                    cpu, wall = time.process_time(), time.perf_counter()
                    step(name)
                    if turn:
                        passed = time.process_time() - cpu, time.perf_counter() - wall
                        of_variant.append(passed)
            cpu_seconds, wall_seconds = (
                {name: statistics.median(t[kind] for t in of) for name, of in times.items()}
                for kind in (0, 1)
            )
            found[layout] = {
                "cpu_seconds": cpu_seconds,
                "wall_seconds": wall_seconds,
                "speedup": {n: cpu_seconds["trl"] / s for n, s in cpu_seconds.items()},
                "loss_rel_err": abs(other_loss - loss) / abs(loss),
                "grad_rel_err": float((other - gradient).norm() / gradient.norm()),
                "tokens": {"rows": counts["rows_tokens"], "packed": counts["packed_tokens"]},
            }
    return found


def peak_of(variant: str) -> int:
    """Bytes above the imports over two steps with activation recomputation.

    Args:
        variant: `SIDE-LAYOUT-VOCABULARY`, such as `trl-pairs-512`.
    """
    return_freed_memory()
    before = common.baseline_bytes()
    side, layout, vocabulary = variant.split("-")
    shape = dataclasses.replace(CHECKPOINTED, vocabulary=int(vocabulary))
    with tempfile.TemporaryDirectory() as folder:
        policy = common.adapted(build_model("qwen2_5_vl", shape), shape)
        trainer = common.dpo_trainer(policy, shape, PAIRS, folder)
        if side == "ours":
            share_prefix(policy, strict=True)
            score_completions_only(policy.get_base_model())
            fuse_lora(policy)
        batch = build_pairs("qwen2_5_vl", shape, *LAYOUTS[layout])
        for _ in range(2):
            common.dpo_step(trainer, dict(batch))
    return common.peak_bytes() - before


def peaks() -> dict:
    """Peak memory of a step with activation recomputation on both sides, by vocabulary."""
    found = {}
    for vocabulary in VOCABULARIES:
        of_variant = {
            f"{side}-{layout}": common.peak_in_child("families", f"{side}-{layout}-{vocabulary}")
            for side in ("trl", "ours")
            for layout in LAYOUTS
        }
        found[str(vocabulary)] = {
            "peak_bytes": of_variant,
            **{f"peak_ratio_{layout}": of_variant[f"ours-{layout}"] / of_variant[f"trl-{layout}"]
               for layout in LAYOUTS},
        }  # fmt: skip
    return found


def peer_sha256() -> str:
    """Hash of the peer's source: of what `common` builds trl's trainer and its step with."""
    import inspect

    parts: tuple[Callable, ...] = (common.dpo_trainer, common.dpo_step, common.adapted)
    return hashlib.sha256("".join(map(inspect.getsource, parts)).encode()).hexdigest()


def main() -> None:
    """Measure, write, print."""
    options = common.parser(__doc__)
    options.add_argument("families", nargs="*", help=f"{', '.join(FAMILIES)}; none for all")
    options.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    asked: argparse.Namespace = options.parse_args()
    if asked.peak_of:
        print(peak_of(asked.peak_of))
        return
    if unknown := [name for name in asked.families if name not in FAMILIES]:
        options.error(f"unknown family {unknown[0]!r} (known: {', '.join(FAMILIES)})")
    path: Path = asked.results / "families.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.is_file() else {}
    for family in asked.families or FAMILIES:
        before = os.getloadavg()[0]
        found = measure(family, common.Shape(), asked.repeats)
        # One process at work adds 1 to the load; more than that is others' work.
        metrics[family] = {
            "pair": found["pairs"]["speedup"]["share"],
            "tree": found["tree"]["speedup"]["share"],
            "pair_all": found["pairs"]["speedup"]["all"],
            "tree_all": found["tree"]["speedup"]["all"],
            "layouts": found,
            "repeats": asked.repeats,
            "load_average": {"before": before, "after": os.getloadavg()[0]},
        }
        print(family, {k: round(v, 2) for k, v in metrics[family].items() if "_" in k or k in
                       ("pair", "tree") if isinstance(v, float)}, flush=True)  # fmt: skip
        errors = [
            layout["grad_rel_err"]
            for name in FAMILIES
            for layout in metrics.get(name, {}).get("layouts", {}).values()
        ]
        metrics |= {"grad_rel_err": max(errors), "peer_sha256": peer_sha256()}
        common.finish("families", metrics, results=asked.results)
    if not asked.no_memory:
        metrics["memory"] = peaks()
        common.finish("families", metrics, results=asked.results)


if __name__ == "__main__":
    main()
