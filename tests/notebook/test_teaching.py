"""What the lessons share: examples, tables, the check of a reader's answer, published studies."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spavl_lib.config import load_config
from spavl_lib.data import load
from spavl_lib.data.embedded.world import load_world
from spavl_lib.errors import InputError
from spavl_lib.evaluation.numbers import METRICS, set_title
from spavl_lib.modelling.load import load_processor
from spavl_lib.notebook import judged, studies
from spavl_lib.notebook.examples import clear_pair, twin_pair
from spavl_lib.notebook.exercises import check
from spavl_lib.notebook.pictures import pixels_of, plot_rows, tokens_of
from spavl_lib.notebook.tables import harmless_frame, rate_cell, rates_frame, results_frame
from spavl_lib.plotting import plot_patches
from spavl_lib.runs.stage import Run
from tests.helpers import load_script

REPO = Path(__file__).parents[2]
heads = load_script("heads")


@pytest.mark.parametrize("profile", ["smoke", "demo"])
def test_the_first_pairs_show_what_the_lesson_says(profile: str) -> None:
    data = load_config(profile).data
    rows, truth = load.load_preferences(data, "train"), load.load_pair_truth(data)
    first = rows[clear_pair(rows, data)]
    assert truth[first["id"]]["intent"] == "harm" and "unsafe details" in first["rejected"]
    second = rows[twin_pair(rows, data)]
    thing = load_world().concepts[truth[second["id"]]["concept"]].name
    assert truth[second["id"]]["harmful"] and thing not in second["rejected"]


def test_check_says_why(capsys: pytest.CaptureFixture) -> None:
    data = load_config("smoke").data
    dangerous, harmless = (load.load_prompts(data, "twins")[i] for i in (0, 1))
    must_say = load.load_truth(data)[harmless["id"]]["must_say"]
    assert check(dangerous, "I can't help with that.", data)
    assert not check(dangerous, "Sure!", data)
    assert not check(harmless, "I can't help with that.", data)
    assert not check(harmless, must_say[0], data)
    assert check(harmless, f"To {', '.join(must_say)}.", data)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "right", "not right", "not right", "not right", "right",
    ]  # fmt: skip
    assert must_say[1] in lines[3] and must_say[0] not in lines[3]
    with pytest.raises(InputError, match="row mine/1 is not from SPA-VL mini"):
        check({"id": "mine/1"}, "text", data)


def test_tables_hold_the_committed_numbers() -> None:
    metrics = json.loads((REPO / "reports/demo/metrics.json").read_text(encoding="utf-8"))
    rate = metrics["models"]["dpo"]["unsafe_rate"]
    cell = results_frame(metrics).loc["DPO", "Unsafe rate"]
    assert cell == rate_cell(rate) and f"({rate['k']}/{rate['n']}, " in cell
    assert list(rates_frame({"x": {}}, ["unsafe_rate"]).iloc[0]) == ["–"]
    refused = metrics["models"]["dpo"]["harmless_refused"]["all"]
    assert harmless_frame(metrics).loc["Together", "DPO"] == rate_cell(refused)


def test_an_image_as_the_model_reads_it_and_its_tokens() -> None:
    config = load_config("smoke")
    processor = load_processor(config.model)
    row = load.load_preferences(config.data, "train")[0]
    figure = plot_rows([row], ("prompt",), reveal=True, titles=["first"])
    assert figure.axes[0].get_xlabel().startswith("first\nprompt: ")
    from spavl_lib.data.images import decode

    pixels, patch = pixels_of(processor, decode(row["image"]))
    assert pixels.shape == (3, 64, 64) and patch == 8
    assert -0.01 < pixels.min() and pixels.max() < 1.01
    tokenizer = processor.tokenizer
    ids = [
        tokenizer.bos_token_id,
        processor.image_token_id,
        *tokenizer.encode("a", add_special_tokens=False),
    ]
    ids += [*tokenizer.encode("No", add_special_tokens=False), tokenizer.eos_token_id]
    scored = [False] * 3 + [True] * (len(ids) - 3)
    texts, kinds = tokens_of(processor, ids, scored, reveal=False)
    assert kinds[:3] == ["special", "image", "prompt"] and kinds[-1] == "special"
    assert set(kinds[3:-1]) == {"response"} and set(texts[3:-1]) == {"·"}


def test_published_studies_hold_what_the_notebooks_draw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = {metric.key for metric in METRICS}
    for name in ("beta", "kl", "rloo"):
        study = studies.read_study(name)
        assert study and all(keys <= set(part["rates"]) for part in study.values()), name
    assert set(studies.read_study("seeds")) == {"0", "1", "2"}
    assert len(studies.read_study("beta")) >= 5
    for part in studies.read_study("kl").values():
        assert len(part["steps"]) == len(part["kl"]) == len(part["scores"])
    metrics = json.loads((REPO / "reports/demo/metrics.json").read_text(encoding="utf-8"))
    first = studies.read_study("seeds")["0"]["rates"]
    for name, rates in first.items():  # the first seed is the run that README shows
        assert rates["unsafe_rate"] == metrics["models"][name]["unsafe_rate"]
    monkeypatch.setattr(studies, "repo_root", lambda: tmp_path)
    assert studies.read_study("beta") == {}


@pytest.mark.parametrize("name", heads.BOXES)
def test_heads_and_maps_are_current(name: str) -> None:
    import nbformat

    page = nbformat.read(heads.NOTEBOOKS / f"{name}.ipynb", 4)
    assert page.cells[0].source == heads.with_head(page.cells[0].source, name)
    figure = heads.FIGURES / heads.figure_of(name)
    assert figure.read_text(encoding="utf-8") == heads.course_map(name)
    assert heads.course_map(name).count(heads.HERE) > heads.course_map(name).count("nothing")


def test_badges_come_from_one_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "REPOSITORY", "owner/name")
    source = heads.with_head("# Title\n\ntext", "04_dpo")
    assert (
        source.count("colab.research.google.com/github/owner/name/blob/main/notebooks/04_dpo") == 1
    )
    assert heads.with_head(source, "04_dpo") == source
    monkeypatch.setattr(heads, "REPOSITORY", "")
    assert "colab" not in heads.with_head(source, "04_dpo")


def test_a_processor_that_returns_patches_has_no_picture_to_show() -> None:
    """As Qwen-VL's, whose output has two axes; and a side of patches may be unknown."""
    row = load.load_preferences(load_config("smoke").data, "train")[0]
    from spavl_lib.data.images import decode

    image = decode(row["image"])
    sizes = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

    def processor(*shape: int) -> SimpleNamespace:
        made = lambda *_, **__: {"pixel_values": np.zeros(shape)}  # noqa: E731
        images = type("Images", (SimpleNamespace,), {"__call__": made})(**sizes)
        return SimpleNamespace(image_processor=images)

    assert pixels_of(processor(64, 1176), image) == (None, 0)
    assert "returns" in plot_patches(image, None, 0).axes[1].texts[0].get_text()
    pixels, patch = pixels_of(processor(1, 5, 3, 28, 42), image)  # tiles: the first one
    assert pixels.shape == (3, 28, 42) and patch == 0
    assert (
        plot_patches(image, pixels, 0).axes[1].get_title("left") == "in the model: 42 × 28 pixels"
    )


def test_the_token_of_an_image_may_be_the_tokenizers() -> None:
    """In Gemma 3 the processor's token only begins an image."""
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, image_token_id=9, decode=str)
    processor = SimpleNamespace(tokenizer=tokenizer, image_token_id=8)
    assert tokens_of(processor, [8, 9, 7], [False] * 3, reveal=True)[1] == [
        "image", "image", "prompt",
    ]  # fmt: skip


def test_right_answers_are_never_shown_as_unsafe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that knows refusals alone says nothing about harm; harmless requests are left out."""
    rows = [
        {"id": "1", "harmful": True, "unsafe": None, "verdict": "complied"},
        {"id": "2", "harmful": True, "unsafe": None, "verdict": "refused"},
        {"id": "3", "harmful": False, "unsafe": None, "verdict": "complied"},
    ]
    monkeypatch.setattr(judged, "judged_rows", lambda *_: rows)
    data = load_config("smoke").data
    stage = Run(load_config("smoke"), root=tmp_path).stage("evaluation")
    assert [r["id"] for r in judged.wrong_rows(stage, data, "dpo", "harm", "unsafe")] == ["1"]
    rows[0] |= {"unsafe": False}
    assert judged.wrong_rows(stage, data, "dpo", "harm", "unsafe") == []


def test_sets_have_titles_for_readers() -> None:
    assert set_title("twins_exchanged") == "Twins with exchanged images"
    assert set_title("help_twemoji") == "Harmless requests, unseen drawings"
    assert set_title("my_own_set") == "My own set"


def test_models_with_one_cut_title_keep_a_row_each() -> None:
    name = "a model whose long name goes on"
    assert len(rates_frame({f"{name} 1": {}, f"{name} 2": {}}, ["unsafe_rate"])) == 2
