"""POPE asks whether an object is in a COCO image, yes or no. Its three sets differ in the choice of
the absent objects."""

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, register

OLD = "e3e3926"  # the commit that LLaVA's published numbers were measured on


def _columns(kind: str, folder: str = "") -> Columns:
    return Columns(
        f"{folder}coco_pope_{kind}.json",
        form="lines",
        id="{question_id}",
        prompt="{text}",
        image="val2014/{image}",
        category=kind,
        reference="{label}",
        group="{image}",
        expect="answer",
        rule="yes_no",
        allowed={"label": ("yes", "no")},
    )


@register("pope")
class POPE(Benchmark):
    """The authors changed all three files. `random` once had 2,910 rows and now has 3,000, of which
    2,766 are the same; the old files are the subsets `*_e3e3926`, in the folder `e3e3926/`."""

    title = "POPE on COCO: random, popular, adversarial; 3,000 rows each (old random: 2,910)"
    licence = "MIT; the images are COCO's"
    homepage = "AoiDragon/POPE"
    roots = ("", "output/coco")
    subsets = {
        **{kind: _columns(kind) for kind in ("random", "popular", "adversarial")},
        **{
            f"{kind}_{OLD}": _columns(kind, f"{OLD}/")
            for kind in ("random", "popular", "adversarial")
        },
    }
    default = ("random", "popular", "adversarial")
