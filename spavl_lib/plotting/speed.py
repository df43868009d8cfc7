"""Figures of training speed, drawn from the results of the benchmarks."""

from pathlib import Path

from matplotlib.figure import Figure

from spavl_lib.plotting.style import BASE_COLOUR, PALETTE, legend_above, new_figure, styled
from spavl_lib.runs.files import read_json

PANELS = (("image_tokens", "Image tokens"), ("answer_tokens", "Tokens of each answer"))


@styled
def plot_growth(source: Path | str | dict) -> Figure:
    """Seconds of a DPO step by image tokens and by response length, for trl and for this library.

    Args:
        source: The path of `growth.json`, or its contents.
    """
    page = source if isinstance(source, dict) else read_json(Path(source))
    metrics = page["metrics"]
    fig = new_figure(9.0, 3.8)
    for ax, (key, title) in zip(fig.subplots(1, 2), PANELS, strict=True):
        rows = metrics[key]
        x = [r["tokens"] for r in rows]
        series = (("trl", "trl 1.16", BASE_COLOUR), ("ours", "this library", PALETTE[0]))
        for name, label, colour in series:
            y = [r[name] for r in rows]
            ax.plot(x, y, marker="o", color=colour, label=label)
        for row in rows[1:]:
            ratio = f"{row['trl'] / row['ours']:.1f}×"
            ax.annotate(ratio, (row["tokens"], row["trl"]), (0, 5), textcoords="offset points",
                        ha="right", fontsize=8)  # fmt: skip
        ax.set_xlabel(title)
        ax.set_ylabel("Seconds per step, one pair")
        ax.set_ylim(bottom=0)
        legend_above(ax)
    return fig
