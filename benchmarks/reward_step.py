"""A reward-model step of a LLaVA: two plain forwards, and one over shared prefixes.

python -m benchmarks.reward_step
python -m benchmarks.reward_step --full
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import common
from spavl_lib.modelling.heads import ScalarHeadModel
from spavl_lib.modelling.speed.fused_lora import fuse_lora
from spavl_lib.modelling.speed.host import return_freed_memory
from spavl_lib.modelling.speed.shared_prefix import share_prefix
from spavl_lib.objectives.reward import bradley_terry_loss

PAIRS = 3
LAYOUTS = {"pairs": (3, 1), "tree": (1, 3)}


def build(shape: common.Shape) -> tuple[ScalarHeadModel, torch.optim.Optimizer]:
    """The backbone under LoRA with a scalar head, and AdamW over what trains; rate 0."""
    model = ScalarHeadModel(common.adapted(common.build_model(shape), shape))
    model.to(common.device()).train()
    if shape.gradient_checkpointing:
        model.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        model.vlm.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.0)


def two_forwards(model: ScalarHeadModel, batch: dict[str, Tensor]) -> Tensor:
    """The peer: chosen rows, then rejected rows."""
    halves = [{k: v.chunk(2)[i] for k, v in batch.items()} for i in (0, 1)]
    return bradley_terry_loss(*(model(**half) for half in halves)).mean()


def one_forward(model: ScalarHeadModel, batch: dict[str, Tensor]) -> Tensor:
    """Ours: both at once, as the trainer does."""
    return bradley_terry_loss(*model(**batch).chunk(2)).mean()


def step(
    model: ScalarHeadModel, optimizer: torch.optim.Optimizer, batch: dict, *, shared: bool
) -> tuple[float, Tensor]:
    """A whole step; its loss, and the gradient as one vector."""
    own = {k: v for k, v in batch.items() if k != "completion_mask"}
    own["pixel_values"] = own["pixel_values"].clone()
    if shared:
        undo = [share_prefix(model, strict=True).restore, fuse_lora(model)]
    loss = (one_forward if shared else two_forwards)(model, own)
    loss.backward()
    if shared:
        for restore in undo:
            restore()
    optimizer.step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.zero_grad()
    return float(loss), gradient


def peak_of(variant: str, shape: common.Shape) -> int:
    """Bytes above the imports over two steps of one variant, with freed tensors handed back."""
    return_freed_memory()
    before = common.baseline_bytes()
    name, layout = variant.split("-")
    model, optimizer = build(shape)
    batch = common.build_pairs(shape, *LAYOUTS[layout])
    for _ in range(2):
        step(model, optimizer, batch, shared=name == "ours")
    return common.peak_bytes() - before


def measure(shape: common.Shape, repeats: int) -> dict:
    """Ratios, bounds and errors of both layouts."""
    model, optimizer = build(shape)
    found = {}
    for layout, (images, questions) in LAYOUTS.items():
        batch = common.build_pairs(shape, images, questions)
        plain, ours = (step(model, optimizer, batch, shared=s) for s in (False, True))

        def run(shared: bool, batch: dict = batch) -> Callable[[], object]:
            return lambda: step(model, optimizer, batch, shared=shared)

        seconds = common.median_seconds([run(False), run(True)], repeats=repeats)
        bound = _bound(shape, batch, images)
        found[layout] = {
            "seconds": dict(zip(("plain", "ours"), seconds, strict=True)),
            "speedup": seconds[0] / seconds[1],
            "bound": bound,
            "fraction_of_bound": seconds[0] / seconds[1] / bound,
            "loss_rel_err": abs(plain[0] - ours[0]) / abs(plain[0]),
            "grad_rel_err": float((plain[1] - ours[1]).norm() / plain[1].norm()),
        }
    return found


def _bound(shape: common.Shape, batch: dict, images: int) -> float:
    """FLOPs of the plain forwards over those of the tree; neither multiplies a vocabulary."""
    plain, ours = (
        dataclasses.replace(w, scored=0).flops(shape, backward=True)
        for w in (common.plain_work(batch), common.tree_work(batch, images))
    )
    return plain / ours


def main() -> None:
    """Measure, write, print."""
    options = common.parser(__doc__).parse_args()
    shape = common.SEVEN_B if options.full else common.Shape()
    if options.peak_of:
        print(peak_of(options.peak_of, shape))
        return
    found = measure(shape, options.repeats)
    extra = ["--full"] if options.full else []
    peaks = {
        v: common.peak_in_child("reward_step", v, *extra)
        for v in ("plain-pairs", "ours-pairs", "plain-tree", "ours-tree")
    }
    metrics = {
        "speedup": found["pairs"]["speedup"],
        "speedup_tree": found["tree"]["speedup"],
        "peak_ratio": peaks["ours-pairs"] / peaks["plain-pairs"],
        "peak_ratio_tree": peaks["ours-tree"] / peaks["plain-tree"],
        "grad_rel_err": max(v["grad_rel_err"] for v in found.values()),
        "peak_bytes": peaks,
        **found,
    }
    common.finish("reward_step", metrics, results=options.results)


if __name__ == "__main__":
    main()
