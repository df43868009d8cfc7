"""A DPO step of a Qwen2.5-VL: trl's trainer as it comes, and the same over shared prefixes.

The ratios are those of CPU seconds, which count this process alone, whoever else is at work.

python -m benchmarks.family_step            # two cores, ten minutes
"""

import os
import statistics
import tempfile
import time

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks import common
from benchmarks.dpo_step import ALL, LAYOUTS, NONE, PAIRS, Switches
from spavl_lib.modelling.speed.shared_prefix import HANDLE, backbone_of

# trl as it comes; shared prefixes alone; with the head and LoRA in place.
VARIANTS = {"trl": NONE, "share": NONE | {"share": True}, "all": ALL}
MERGE = 2  # a token stands for MERGE x MERGE patches


def build_model(shape: common.Shape) -> PreTrainedModel:
    """A random Qwen2.5-VL with a text model of that shape, and two key-value heads."""
    torch.manual_seed(0)
    tokens = {"image_token_id": common.IMAGE_TOKEN, "video_token_id": shape.vocabulary - 1}
    text = dict(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=2, tie_word_embeddings=False,
        intermediate_size=shape.intermediate, max_position_embeddings=8192,
        pad_token_id=common.PAD, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
    )  # fmt: skip
    tower = dict(
        depth=shape.tower_layers, hidden_size=shape.tower_hidden, num_heads=shape.tower_heads,
        intermediate_size=shape.tower_intermediate, out_hidden_size=shape.hidden,
        patch_size=shape.patch, spatial_merge_size=MERGE, temporal_patch_size=2,
        window_size=8 * shape.patch, fullatt_block_indexes=[shape.tower_layers - 1],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config).requires_grad_(False)


def build_pairs(shape: common.Shape, images: int, questions: int) -> dict[str, Tensor]:
    """The rows of `common.build_pairs`, with patches in place of its images."""
    batch = common.build_pairs(shape, images, questions)
    side = shape.grid * MERGE
    chance = torch.Generator().manual_seed(0)
    patches = torch.randn(images, side * side, 3 * 2 * shape.patch**2, generator=chance)
    of_rows = patches.repeat_interleave(questions, 0).repeat(2, 1, 1)
    return batch | {
        "pixel_values": of_rows.flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(of_rows)),
        "mm_token_type_ids": (batch["input_ids"] == common.IMAGE_TOKEN).long(),
    }


def measure(shape: common.Shape, repeats: int) -> dict:
    """Seconds, ratios and errors of both layouts.

    Args:
        shape: Of model and rows.
        repeats: Timed turns.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        policy = common.adapted(build_model(shape), shape)
        trainer = common.dpo_trainer(policy, shape, PAIRS, folder)
        switches = Switches(trainer)
        for layout, (images, questions) in LAYOUTS.items():
            batch = build_pairs(shape, images, questions)

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


def main() -> None:
    """Measure, write, print."""
    options = common.parser(__doc__).parse_args()
    before = os.getloadavg()[0]
    metrics = measure(common.Shape(), options.repeats)
    # One process at work adds 1 to the load; more than that is others' work.
    load = {"before": before, "after": os.getloadavg()[0]}
    common.finish("family_step", metrics | {"load_average": load}, results=options.results)


if __name__ == "__main__":
    main()
