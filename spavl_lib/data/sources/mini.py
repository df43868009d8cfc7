"""SPA-VL mini as a source: the embedded data set, built on first use in the Hub's layout."""

import dataclasses
import hashlib
import json
from pathlib import Path

import datasets
from datasets import Dataset, Features

from spavl_lib.data.embedded.mini import uncertain_images
from spavl_lib.data.embedded.mini_files import DEVELOPMENT, TRUTH, mini_folder
from spavl_lib.data.problems import Loaded
from spavl_lib.data.set_names import CHOSEN_ON, UNSEEN
from spavl_lib.data.sources.base import EVAL_SETS, register_source
from spavl_lib.data.sources.hub import HubLayout


@register_source("mini")
class Mini(HubLayout):
    """The embedded data set, which has ground-truth labels for every row."""

    eval_sets = EVAL_SETS
    held_out_drawings = EVAL_SETS[:4]

    @property
    def unseen_style(self) -> str:  # type: ignore[override]
        """The test rows' unseen style is never measured while settings are chosen."""
        return CHOSEN_ON if self.config.measure_on == "development" else UNSEEN

    @property
    def folder(self) -> Path:
        """The built data set's folder."""
        return mini_folder()

    def folder_of(self, split: str) -> Path:
        """The folder of a split.

        If `data.measure_on` is `development`, held-out rows come from a folder of their own, and
        settings are chosen on these rows.
        """
        chosen_on = self.config.measure_on == "development" and split != "train"
        return self.folder / DEVELOPMENT if chosen_on else self.folder

    def preferences(self, split: str) -> Loaded:
        """Load rows as every source does. `data.uncertain_share` replaces training images."""
        loaded, share = super().preferences(split), self.config.uncertain_share
        if split != "train" or not share:
            return loaded
        rows, uncertain = loaded.rows, uncertain_images(share)
        cells = [
            cell | {"bytes": uncertain.get(cell["path"], cell["bytes"])} for cell in rows["image"]
        ]
        images = Dataset.from_dict(
            {"image": cells}, features=Features({"image": rows.features["image"]})
        )
        changed = datasets.concatenate_datasets([rows.remove_columns("image"), images], axis=1)
        return dataclasses.replace(loaded, rows=changed.select_columns(rows.column_names))

    def sha256(self, split: str) -> str:
        """As for every source, with the distorted images of `train`."""
        whole, share = super().sha256(split), self.config.uncertain_share
        if split != "train" or not share:
            return whole
        digest = hashlib.sha256(whole.encode())
        for name, content in sorted(uncertain_images(share).items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def truth(self) -> dict[str, dict]:
        """Row id -> ground-truth labels of the row."""
        # One file has the labels of the training rows and of the usual held-out rows. Development
        # rows have the ids of usual held-out rows, so their labels replace the labels of these.
        labels = _read_truth(self.folder)
        held_out = self.folder_of("harm")
        return labels if held_out == self.folder else labels | _read_truth(held_out)


def _read_truth(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "meta_files" / TRUTH).read_text(encoding="utf-8"))
