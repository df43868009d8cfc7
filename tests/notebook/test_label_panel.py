"""The panel for labelling, driven through its widgets."""

import io
import json
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from spavl_lib.errors import InputError
from spavl_lib.evaluation.people.answers import labels_folder
from spavl_lib.evaluation.people.labels import Label, read_labels
from spavl_lib.evaluation.people.rates import drawn_digests
from spavl_lib.evaluation.people.sample import ensure_sample, read_sample, sample_path
from spavl_lib.evaluation.text import picture_name
from spavl_lib.notebook.label_panel import (
    LabelPanel,
    label_panel,
    run_image,
    write_label_notebook,
)
from tests.evaluation.people_runs import write_people_run

pytestmark = pytest.mark.usefixtures("without_fsync")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_people_run(tmp_path / "r", rows=30)
    for row in (f"harm/{i}" for i in range(30)):
        path = run / "evaluation/images" / picture_name("harm", row)
        path.parent.mkdir(exist_ok=True)
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste("black", (0, 0, 32, 64))
        picture.save(path)
    return run


@pytest.fixture
def panel(run: Path) -> LabelPanel:
    ensure_sample(run, 30)
    return LabelPanel(run, "ann", 30)


def written(panel: LabelPanel) -> list[Label]:
    path = labels_folder(panel.run_path) / "ann.jsonl"
    return list(read_labels(path, drawn_digests(read_sample(panel.run_path))).values())


def click(panel: LabelPanel, *keys: str) -> None:
    for key in keys:
        panel.buttons[key].click()


def type_keys(panel: LabelPanel, text: str) -> None:
    for letter in text:
        panel.keys.value += letter


def colours(panel: LabelPanel) -> int:
    picture = Image.open(io.BytesIO(panel.image.value)).convert("RGB")
    return len(picture.getcolors(1 << 24))


def test_buttons_write_a_label_as_soon_as_both_questions_are_answered(panel: LabelPanel) -> None:
    first = panel.current
    assert panel.answers[first].response in panel.answer.value
    click(panel, "u")
    assert panel.current == first and not written(panel)
    assert panel.buttons["u"].button_style == "info" and panel.buttons["s"].button_style == ""
    click(panel, "s", "n", "u", "c")
    assert written(panel) == [Label(True, "no")] and panel.current == panel.order[1]
    assert panel.buttons["u"].button_style == ""  # of the next answer
    click(panel, "p", "n")
    assert written(panel)[1] == Label(None, "partial")
    assert (panel.progress.value, panel.progress.max) == (2, 30)
    assert panel.count.value == "2 of 30 answers labelled by ann"


def test_keys_do_what_the_buttons_do(panel: LabelPanel) -> None:
    type_keys(panel, "srUCnp")
    assert written(panel) == [Label(False, "yes"), Label(True, "no"), Label(None, "partial")]
    panel.keys.value += "src"  # two keys that arrive together, and the first half of the next
    assert len(written(panel)) == 4 and panel._refused == "no"
    panel.keys.value = panel.keys.value[:-3]  # deleting is no key
    panel.keys.value += "s"
    assert written(panel)[4] == Label(False, "no")
    panel.keys.value = ""
    assert len(written(panel)) == 5
    panel.keys.value = "x"
    assert "no button has the key &#x27;x&#x27;: s, u, n, r, p, c" in panel.message.value
    panel.keys.value = "xs"
    assert panel.message.value == ""


def test_undo_takes_back_half_a_label_then_the_last_one(panel: LabelPanel) -> None:
    click(panel, "s", "r", "u", "c", "n")
    click(panel, "z")
    assert len(written(panel)) == 2 and panel._harmful is None
    click(panel, "z")
    assert written(panel) == [Label(False, "yes")] and panel.current == panel.order[1]
    click(panel, "s", "c")
    assert written(panel) == [Label(False, "yes"), Label(False, "no")]
    click(panel, "z", "z", "z")
    assert not written(panel) and "no label to take back" in panel.message.value


def test_it_goes_on_where_it_stopped(panel: LabelPanel, run: Path) -> None:
    click(panel, "s", "r", "u", "c", "n")
    again = LabelPanel(run, "ann", 30)
    assert again.current == panel.order[2] and again.progress.value == 2
    click(again, "z")  # of the earlier session
    assert again.current == panel.order[1] and len(written(again)) == 1
    assert LabelPanel(run, "bob", 30).current == panel.order[0]
    click(panel, "p")  # the older panel must not write over the newer one
    assert "was changed by another panel" in panel.message.value and len(written(panel)) == 1


def test_the_model_and_the_verdict_stay_hidden(panel: LabelPanel) -> None:
    def texts(widget: object) -> list[str]:
        own = [str(getattr(widget, key, "")) for key in ("value", "description", "tooltip")]
        children = getattr(widget, "children", ())
        return own + [text for child in children for text in texts(child)]

    for key in panel.order[:30]:
        shown = " ".join(texts(panel.widget)).lower()
        assert "base" not in shown and "dpo" not in shown and "clumsy" not in shown
        assert key.row not in shown
        click(panel, "s", "r")
    assert {key.model for key in panel.order[:8]} == {"base", "dpo"}


def test_text_is_shown_and_not_run(panel: LabelPanel, run: Path) -> None:
    key = panel.order[0]
    path = run / f"evaluation/verdicts/{key.model}/{key.set_name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["response"] = "<script>alert(1)</script>\u202e</div>" if row["id"] == key.row else "?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample_path(run).unlink()
    ensure_sample(run, 90)
    other = LabelPanel(run, "bob", 90)
    while other.current != key:
        click(other, "s", "r")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;⟨U+202E⟩&lt;/div&gt;" in other.answer.value


def test_the_image_is_blurred_until_asked_for(panel: LabelPanel) -> None:
    while panel.current.set_name != "harm":
        click(panel, "s", "r")
    assert colours(panel) > 4
    click(panel, "i")
    assert colours(panel) == 2 and panel.buttons["i"].description == "Blur image (i)"
    click(panel, "s")  # half a label leaves it as it is
    assert colours(panel) == 2
    click(panel, "r")
    while panel.current.set_name != "harm":
        click(panel, "s", "r")
    assert colours(panel) > 4 and panel.buttons["i"].description == "Show image (i)"


def test_without_an_image_the_panel_says_why(panel: LabelPanel, run: Path) -> None:
    while panel.current.set_name == "harm":
        click(panel, "s", "r")
    assert "The image is not at hand" in panel.no_image.value
    assert panel.buttons["i"].disabled and panel.image.layout.display == "none"


def test_at_the_end_it_shows_the_rates(panel: LabelPanel, run: Path) -> None:
    click(panel, "t")
    assert "No answer is labelled yet." in panel.rates.value
    for _ in panel.order:
        click(panel, "s", "r")
    assert panel.current is None and panel.labelling.layout.display == "none"
    assert panel.count.value == "All 30 answers are labelled by ann. Thank you."
    assert "Corrected" in panel.rates.value and "one rater (ann)" in panel.rates.value
    assert json.loads((run / "metrics.json").read_text())["people"]["labels"] == 30
    click(panel, "s", "r")  # nothing is left to label
    assert len(written(panel)) == 30
    click(panel, "z")
    assert panel.current == panel.order[-1] and panel.labelling.layout.display == ""


def test_without_a_sample_a_button_draws_it(run: Path) -> None:
    panel = LabelPanel(run, "ann", 30)
    assert not sample_path(run).exists()  # showing the panel alone writes nothing
    [button, _] = panel.widget.children
    assert button.description == "Draw 30 answers and start"
    button.click()
    assert len(read_sample(run).weights) == 30 and panel.current == panel.order[0]
    few = LabelPanel(write_people_run(run.parent / "other", rows=30), "ann", 1)
    few.widget.children[0].click()
    assert "cannot draw the sample" in few.message.value
    with pytest.raises(InputError, match="rater"):
        label_panel(run, rater="../ann")


def test_an_image_comes_from_the_data_of_the_run(run: Path, tmp_path: Path) -> None:
    from spavl_lib.data.load import load_prompts
    from tests.helpers import smoke

    config = smoke()
    manifest = run / "evaluation/manifest.json"
    manifest.write_text(json.dumps({"config": config.to_dict()}))
    key = read_sample_key(run)
    row = load_prompts(config.data, "harm")[0]
    image, why = run_image(run, key._replace(row=row["id"]))
    assert image is not None and max(image.size) > 64 and not why
    assert run_image(run, key._replace(row="none"))[1].startswith("The image is not at hand: the d")


def read_sample_key(run: Path):
    return next(k for k in ensure_sample(run, 30).weights if k.set_name == "harm")


def test_the_notebook_opens_the_panel(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_label_notebook(run, "ann", 30)
    page = nbformat.read(path, as_version=4)
    nbformat.validate(page)
    monkeypatch.chdir(path.parent)  # where a kernel starts
    imports, call = page.cells[1].source.split("\n\n")
    names: dict = {}
    exec(imports, names)
    assert len(eval(call, names).children) == 5  # the panel itself, not the button that draws
    assert len(write_label_notebook(run, "ann", 40).read_text()) > 100
    assert len(read_sample(run).weights) == 40
