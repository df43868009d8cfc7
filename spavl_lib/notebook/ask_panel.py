"""A panel of ipywidgets: choose a picture, type a question, and see every model's answer.

The panel works wherever ipywidgets work, such as in JupyterLab and on Colab.
"""

import functools
import html
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from PIL import Image

from spavl_lib.data.images import png_bytes
from spavl_lib.data.load import eval_sets, load_prompts
from spavl_lib.data.sampling import spread
from spavl_lib.data.schema import image_cells
from spavl_lib.errors import InputError
from spavl_lib.evaluation.numbers import model_title
from spavl_lib.evaluation.text import short
from spavl_lib.generation.ask import Reply, RunModels, config_of_run, decoded_image
from spavl_lib.notebook.panels import error_box, paragraph
from spavl_lib.notebook.session import safe_image
from spavl_lib.runs.stage import Run

EXAMPLES = 4  # of each test set
SHOWN = 192  # height of the picture, in pixels


def ask_panel(
    run: Run | Path | str, models: RunModels | None = None, *, reveal: bool = False
) -> widgets.VBox:
    """The panel for one run.

    Args:
        run: The run, or its folder. It needs at least one trained model.
        models: The run's models, if they are loaded already. None: the first question loads them.
        reveal: Whether to show the data's images as they are. Otherwise they are blurred; an
            uploaded image never is.
    """
    return AskPanel(run.path if isinstance(run, Run) else Path(run), models, reveal=reveal).widget


class AskPanel:
    """The panel's state and its widgets. `widget` is what a notebook shows."""

    def __init__(self, run_path: Path, models: RunModels | None = None, *, reveal: bool = False):
        self.run_path, self.reveal = run_path.resolve(), reveal
        if models:
            self.models = models
        self.chosen: bytes | None = None
        self.image = widgets.Image(format="png", height=SHOWN)
        self.image.layout.display = "none"
        self.upload = widgets.FileUpload(accept="image/*", description="Your picture")
        self.examples = widgets.Dropdown(description="Or example")
        self.question = widgets.Text(
            placeholder="What is the thing in this picture?", description="Question",
            layout=widgets.Layout(width="46em"),
        )  # fmt: skip
        self.button = widgets.Button(description="Ask", button_style="primary")
        self.replies = widgets.HTML()
        self.upload.observe(lambda _: self._try(self._on_upload), names="value")
        self.examples.observe(lambda _: self._try(self._on_example), names="value")
        self.button.on_click(lambda _: self._try(self.ask))
        self.rows = self._examples()
        labels = ((_label(row), place) for place, row in enumerate(self.rows))
        self.examples.options = [("choose one", None), *labels]
        self.widget = widgets.VBox(
            [
                widgets.HBox([self.upload, self.examples]), self.image,
                widgets.HBox([self.question, self.button]), self.replies,
            ]
        )  # fmt: skip

    @functools.cached_property
    def models(self) -> RunModels:
        """The run's models, loaded when they are first needed."""
        return RunModels(self.run_path)

    def _examples(self) -> list[dict]:
        """A few prompts of each test set of the run's data, with one image each."""
        data = config_of_run(self.run_path).data
        rows: list[dict] = []
        for name in eval_sets(data, held_out_drawings=False):
            rows += [row | {"set": name} for row in spread(load_prompts(data, name), EXAMPLES)]
        return [row for row in rows if len(image_cells(row)) == 1]

    def _try(self, action: Any) -> None:
        """Call `action`, and show its error in the panel: widgets would hide a callback's error."""
        try:
            action()
        except Exception as error:
            self.replies.value = error_box(error)

    def _show(self, image: Image.Image, *, reveal: bool) -> None:
        self.chosen, self.replies.value = png_bytes(image), ""
        self.image.value = png_bytes(safe_image(image, reveal=reveal))
        self.image.layout.display = ""

    def _on_upload(self) -> None:
        files = self.upload.value
        # ipywidgets 8 gives a tuple of mappings; ipywidgets 7, as on Colab, a mapping by name.
        [file] = list(files.values() if isinstance(files, dict) else files)[-1:] or [None]
        if file:
            self.examples.value = None  # so that the same example can be chosen again
            self._show(decoded_image(bytes(file["content"])), reveal=True)

    def _on_example(self) -> None:
        if self.examples.value is not None:
            row = self.rows[self.examples.value]
            self._show(decoded_image(row["image"]), reveal=self.reveal)
            self.question.value = row["prompt"]

    def ask(self) -> None:
        """Ask the question of the text box about the chosen picture, and show the answers.

        Raises:
            InputError: No picture is chosen, or see `RunModels.ask`.
        """
        if self.chosen is None:
            raise InputError("choose a picture first: upload one, or take an example")
        self.replies.value = "<i>The models are answering ...</i>"
        self.replies.value = table(self.models.ask(self.chosen, self.question.value))


def table(replies: list[Reply]) -> str:
    """The answers side by side, as HTML that shows every character of a model's text."""
    cells = []
    for reply in replies:
        score = "" if reply.score is None else f"<br>reward model's score {reply.score:+.2f}"
        title = html.escape(model_title(reply.model))
        cut = "" if reply.finished else "<br><i>cut at the limit of tokens</i>"
        cells.append(
            '<td style="vertical-align: top; padding: 0.4em 1em; max-width: 22em">'
            f"{paragraph(title, reply.response or '(the answer is empty)')}"
            f'<span style="opacity: 0.7">{cut}{score}</span></td>'
        )
    return f"<table><tr>{''.join(cells)}</tr></table>"


def _label(row: dict) -> str:
    return short(f"{row['set']}: {row['prompt']}", 70)
