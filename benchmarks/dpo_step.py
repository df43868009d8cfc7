"""A DPO step of a LLaVA: trl's trainer as it comes, and the same trainer over shared prefixes.

python -m benchmarks.dpo_step            # two cores, some minutes
python -m benchmarks.dpo_step --full     # LLaVA-1.5-7B's shape, random weights; one large GPU
"""

import dataclasses
import tempfile
from collections.abc import Callable

from trl import DPOTrainer

from benchmarks import common
from spavl_lib.modelling.speed.completion_head import score_completions_only
from spavl_lib.modelling.speed.fused_lora import fuse_lora
from spavl_lib.modelling.speed.host import return_freed_memory
from spavl_lib.modelling.speed.shared_prefix import share_prefix

PAIRS = 3
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# Two ways the same number of pairs comes: three images with a question each, one with three.
LAYOUTS = {"pairs": (3, 1), "tree": (1, 3)}


class Switches:
    """One trainer over one set of weights, with each technique on or off."""

    def __init__(self, trainer: DPOTrainer):
        self.trainer, self.undo = trainer, []

    def set(self, *, share: bool, head: bool, lora: bool) -> None:
        """Take everything off, then put on what is asked for."""
        for restore in reversed(self.undo):
            restore()
        self.undo = []
        if share:
            self.undo.append(share_prefix(self.trainer.model, strict=True).restore)
        if head:
            self.undo.append(score_completions_only(self.trainer.model.get_base_model()))
        if lora:
            self.undo.append(fuse_lora(self.trainer.model))


# trl as it comes; each technique alone; all of them; and the last with a cached reference.
TECHNIQUES = ("share", "head", "lora")
ALL = dict.fromkeys(TECHNIQUES, True)
NONE = dict.fromkeys(TECHNIQUES, False)
VARIANTS = {
    "trl": NONE | {"cached": False},
    **{t: NONE | {t: True, "cached": False} for t in TECHNIQUES},
    "cached": NONE | {"cached": True},
    "all": ALL | {"cached": False},
    "all_cached": ALL | {"cached": True},
    "all_cached_but_lora": ALL | {"lora": False, "cached": True},
}
MAIN = ("trl", "all", "all_cached")


def measure(shape: common.Shape, repeats: int, *, techniques: bool) -> dict:
    """Ratios, bounds and errors of one shape, both layouts.

    Args:
        shape: Of model and rows.
        repeats: Timed turns.
        techniques: Also each technique alone, over a pair an image.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        policy = common.adapted(common.build_model(shape), shape)
        trainer = common.dpo_trainer(policy, shape, PAIRS, folder)
        switches = Switches(trainer)
        for layout, (images, questions) in LAYOUTS.items():
            batch = common.build_pairs(shape, images, questions)
            switches.set(**NONE)
            trainer.precompute_ref_logps = False
            loss, gradient = common.gradients(trainer, batch)
            pair = trainer.compute_ref_log_probs(trainer.model, dict(batch))
            known = dict(zip(REFERENCE, pair, strict=True))
            switches.set(**ALL)
            other_loss, other = common.gradients(trainer, batch)
            names = tuple(VARIANTS) if techniques and layout == "pairs" else MAIN
            steps = [_step(switches, VARIANTS[n], batch, known) for n in names]
            medians = common.median_seconds(steps, repeats=repeats)
            seconds = dict(zip(names, medians, strict=True))
            found[layout] = _ratios(shape, batch, images, seconds) | {
                "loss_rel_err": abs(other_loss - loss) / abs(loss),
                "grad_rel_err": float((other - gradient).norm() / gradient.norm()),
            }
    return found


def _step(
    switches: Switches, variant: dict[str, bool], batch: dict, known: dict
) -> Callable[[], float]:
    def run() -> float:
        switches.set(**{t: variant[t] for t in TECHNIQUES})
        switches.trainer.precompute_ref_logps = variant["cached"]
        # Pixels in a tensor of their own: what the tower remembers must not outlive a step.
        own = batch | {"pixel_values": batch["pixel_values"].clone()}
        return common.dpo_step(switches.trainer, own | (known if variant["cached"] else {}))

    return run


def _ratios(shape: common.Shape, batch: dict, images: int, seconds: dict[str, float]) -> dict:
    plain, ours = common.plain_work(batch), common.tree_work(batch, images)
    reference = plain.flops(shape, backward=False)
    needed = ours.flops(shape, backward=True), ours.flops(shape, backward=False)
    # The frozen tower gives the reference what it gave the policy.
    again = dataclasses.replace(ours, images=0).flops(shape, backward=False)
    total = plain.flops(shape, backward=True) + reference
    bounds = {"all": total / (needed[0] + again), "all_cached": total / needed[0]}
    ratios = {n: seconds["trl"] / s for n, s in seconds.items() if n != "trl"}
    rate = common.matmul_rate(shape)
    return {
        "seconds": seconds,
        "speedup": ratios,
        "bound": bounds,
        "fraction_of_bound": {n: ratios[n] / b for n, b in bounds.items()},
        "floor_s": {"all": (needed[0] + again) / rate, "all_cached": needed[0] / rate},
        "matmul_flop_per_s": rate,
        "tokens": {"trl": plain.tokens, "ours": ours.tokens},
    }


def peak_of(variant: str, shape: common.Shape) -> int:
    """Bytes above the imports over two steps of one variant, with freed tensors handed back."""
    return_freed_memory()
    before = common.baseline_bytes()
    name, layout = variant.split("-")
    images, questions = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        policy = common.adapted(common.build_model(shape), shape)
        trainer = common.dpo_trainer(policy, shape, PAIRS, folder)
        if name == "ours":
            share_prefix(policy, strict=True)
            score_completions_only(policy.get_base_model())
            fuse_lora(policy)
        batch = common.build_pairs(shape, images, questions)
        for _ in range(2):
            common.dpo_step(trainer, batch)
    return common.peak_bytes() - before


def main() -> None:
    """Measure, write, print."""
    options = common.parser(__doc__).parse_args()
    shape = common.SEVEN_B if options.full else common.Shape()
    if options.peak_of:
        print(peak_of(options.peak_of, shape))
        return
    small = measure(shape, options.repeats, techniques=True)
    metrics = {
        "speedup": small["pairs"]["speedup"]["all"],
        "speedup_cached_reference": small["pairs"]["speedup"]["all_cached"],
        "speedup_tree": small["tree"]["speedup"]["all"],
        "speedup_tree_cached_reference": small["tree"]["speedup"]["all_cached"],
        "grad_rel_err": max(v["grad_rel_err"] for v in small.values()),
        "loss_rel_err": max(v["loss_rel_err"] for v in small.values()),
    }
    extra = ["--full"] if options.full else []
    peaks = {
        v: common.peak_in_child("dpo_step", v, *extra)
        for v in ("trl-pairs", "ours-pairs", "trl-tree", "ours-tree")
    }
    metrics |= {
        "peak_ratio": peaks["ours-pairs"] / peaks["trl-pairs"],
        "peak_ratio_tree": peaks["ours-tree"] / peaks["trl-tree"],
        "peak_bytes": peaks,
        "vocabulary": shape.vocabulary,
        **small,
    }
    if not options.full:
        large = dataclasses.replace(shape, vocabulary=32_000)
        metrics["vocabulary_32000"] = measure(large, options.repeats, techniques=False)
    common.finish("dpo_step", metrics, results=options.results)


if __name__ == "__main__":
    main()
