"""Every figure of the project: `plot_*(file, frame or rows) -> Figure`, in one style.

Figures do not use pyplot, so there is no global state, and they display themselves in a notebook.
Figures need no model: everything that they draw is in the run folder. A missing number is left out,
never drawn as 0.
"""

from spavl_lib.plotting.arena import (
    plot_harm_over_budget,
    plot_harm_over_kl,
    plot_laboratory,
    plot_under_attack,
)
from spavl_lib.plotting.data import (
    plot_class_counts,
    plot_counts_by_type,
    plot_image_grid,
    plot_length_bias,
    plot_length_histogram,
)
from spavl_lib.plotting.lessons import (
    plot_harmless_refused,
    plot_lines,
    plot_patches,
    plot_per_drawing,
    plot_rates_over,
    plot_sequence,
    plot_token_values,
)
from spavl_lib.plotting.results import (
    plot_rates,
    plot_refusal_balance,
    plot_safety_helpfulness,
    plot_unsafe_by_class,
)
from spavl_lib.plotting.scaling import plot_ablations, plot_scaling
from spavl_lib.plotting.speed import plot_growth
from spavl_lib.plotting.style import model_colours, png_bytes, save_figure, shown
from spavl_lib.plotting.training import (
    LivePlot,
    plot_calibration,
    plot_margin_histogram,
    plot_training,
)

__all__ = [
    "LivePlot",
    "model_colours",
    "plot_ablations",
    "plot_calibration",
    "plot_class_counts",
    "plot_counts_by_type",
    "plot_growth",
    "plot_harm_over_budget",
    "plot_harm_over_kl",
    "plot_harmless_refused",
    "plot_laboratory",
    "plot_per_drawing",
    "plot_image_grid",
    "plot_length_bias",
    "plot_length_histogram",
    "plot_lines",
    "plot_margin_histogram",
    "plot_patches",
    "plot_rates",
    "plot_rates_over",
    "plot_refusal_balance",
    "plot_safety_helpfulness",
    "plot_scaling",
    "plot_sequence",
    "plot_token_values",
    "plot_training",
    "plot_under_attack",
    "plot_unsafe_by_class",
    "png_bytes",
    "save_figure",
    "shown",
]
