"""SPA-VL mini as a source: the embedded data set, built on first use in the Hub's layout."""

import json
from pathlib import Path

from spavl_lib.data.embedded.mini import mini_folder
from spavl_lib.data.sources.base import register_source
from spavl_lib.data.sources.hub import HubLayout

EVAL_SETS = ("harm", "help", "look_alikes", "twins", "twins_exchanged")


@register_source("mini")
class Mini(HubLayout):
    """The embedded data set, which has ground-truth labels for every row."""

    eval_sets = EVAL_SETS
    held_out_drawings = EVAL_SETS[:4]

    @property
    def folder(self) -> Path:
        """The built data set's folder."""
        return mini_folder()

    def truth(self) -> dict[str, dict]:
        """Row id -> ground-truth labels of the row."""
        path = self.folder / "meta_files" / "truth.json"
        return json.loads(path.read_text(encoding="utf-8"))
