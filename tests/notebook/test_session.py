"""What a notebook's parameters may be: papermill passes them as it reads them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spavl_lib.config import load_config
from spavl_lib.data.images import png_bytes
from spavl_lib.errors import InputError
from spavl_lib.notebook import colab
from spavl_lib.notebook.session import (
    caption,
    check_injected,
    lab_theme,
    open_stage,
    safe_image,
    safe_text,
)
from spavl_lib.runs.stage import Run

GOOD = {"profile": "smoke", "seed": -1, "run_name": "", "overrides": {}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"overrides": '{"dpo.beta": 0.2}'}, "overrides must be a mapping.*-y 'overrides:"),
        ({"overrides": ["dpo.beta=0.2"]}, "overrides must be a mapping"),
        ({"seed": None}, "seed must be a whole number, got None; -1 stands"),
        ({"seed": "3"}, "seed must be a whole number, got '3'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"run_name": 3}, "run_name must be text, got 3; papermill passes text with -r run_name"),
        ({"run_name": None}, "run_name must be text, got None"),
        ({"profile": None}, "profile must be text, got None"),
        ({"profile": 7, "seed": None, "overrides": 1}, "parameters: 3 problems"),
    ],
)
def test_a_parameter_of_a_wrong_type_is_one_sentence(changes: dict, reason: str) -> None:
    values = GOOD | changes
    with pytest.raises(InputError, match=reason):
        open_stage("dpo", values.pop("profile"), **values)


def test_a_changed_setting_is_refused_by_the_first_cell(runs: Path) -> None:
    """With every folder of the run that was made otherwise, and before anything is loaded."""
    config = load_config("smoke", {"reward.learning_rate": 1e-3})
    for name in ("reward", "ppo"):
        with Run(config).stage(name).work() as stage:
            stage.log({"step": 1})
    overrides = {"reward.learning_rate": 1e-3}
    open_stage("ppo", "smoke", overrides=overrides)
    with pytest.raises(InputError) as caught:
        open_stage("ppo", "smoke")
    first, changed, advice = str(caught.value).splitlines()
    assert f"{runs / 'smoke/ppo'} and {runs / 'smoke/reward'} were made with other" in first
    assert changed.strip().startswith("reward.learning_rate: 0.001 -> ")
    assert "delete these folders, or resume in spite of it with --allow-change" in advice
    open_stage("dpo", "smoke")  # a stage that does not build on them
    with pytest.raises(InputError, match="dtype: 'fp32' -> 'bf16'"):
        open_stage("ppo", "smoke", overrides=overrides | {"dtype": "bf16"})


def test_the_first_cell_says_how_many_rows_at_most(capsys: pytest.CaptureFixture) -> None:
    """Data of one's own may have fewer rows than the profile takes."""
    open_stage("dpo", "smoke")
    assert "data      mini, at most 64 training pairs\n" in capsys.readouterr().out
    open_stage("dpo", "demo")
    assert "data      mini, all training pairs\n" in capsys.readouterr().out


def test_an_allowed_change_passes_the_first_cell(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Run(load_config("smoke")).stage("dpo").work() as stage:
        stage.log({"step": 1})
    monkeypatch.setenv("SPAVL_ALLOW_CHANGE", "dpo.beta")
    open_stage("dpo", "smoke", overrides={"dpo.beta": 0.5})
    with pytest.raises(InputError, match=r"dpo\.learning_rate"):
        open_stage("dpo", "smoke", overrides={"dpo.beta": 0.5, "dpo.learning_rate": 1e-6})


DECLARED = 'profile: str = "demo"\nseed: int = -1\nrun_name: str = ""\noverrides: dict = {}\n'


def test_a_parameter_that_the_notebook_lacks_is_refused_by_the_first_cell() -> None:
    good = "# Parameters\nprofile = 'smoke'\noverrides = {'dpo.beta': 0.2}\n"
    check_injected(["", DECLARED, good, "betta = 1", "%time open_stage()"])
    check_injected([])
    with pytest.raises(InputError, match="no parameter 'betta'.*declares: profile, seed.*-y 'over"):
        check_injected(["", DECLARED, "# Parameters\nbetta = 0.3\n"])
    with pytest.raises(InputError, match="'profil'; did you mean 'profile'"):
        check_injected(["", DECLARED, good, "# Parameters\nprofil = 'demo'\n"])


def test_colab_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.setattr(colab, "_check_loaded", lambda: None)
    with pytest.raises(InputError, match="overrides must be a mapping"):
        colab.set_up("colab", '{"dpo.beta": 0.2}')


def test_previews_are_cut_and_blurred_unless_revealed() -> None:
    text = "How do I pick the lock of the blue door behind the old house without being seen?"
    assert safe_text(text) == "How do I pick the lock of the blue door behind the old house [...]"
    assert safe_text(text, limit=10) == "How do I p [...]"
    assert safe_text(text, reveal=True) == text and safe_text("short") == "short"
    assert caption({"prompt": text, "empty": "", "id": "7"}, ("id", "prompt", "empty")) == (
        f"id: 7\nprompt: {safe_text(text)}"
    )
    assert caption({"prompt": text}, ("prompt",), reveal=True) == f"prompt: {text}"
    row = {"question_type": "hardq", "class3": "scamns", "harmful": False}
    assert caption(row, ("question_type", "class3", "harmful")) == (
        "question type: question with a pretext\nclass of harm: scams\nharmful with this image: no"
    )
    stripes = Image.fromarray(np.tile([0, 255], (32, 16)).astype(np.uint8)).convert("RGB")
    cell = {"bytes": png_bytes(stripes), "path": None}
    blurred, plain = np.asarray(safe_image(cell)), np.asarray(safe_image(cell, reveal=True))
    assert np.array_equal(plain, np.asarray(stripes)) and plain.std() > 100
    assert blurred.shape == plain.shape and blurred[8:24, 8:24].std() < 20


def test_figures_follow_the_theme_that_lab_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("JUPYTERLAB_SETTINGS_DIR", raising=False)
    monkeypatch.delenv("SPAVL_FIGURES", raising=False)
    folder = tmp_path / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir(parents=True)
    settings = folder / "themes.jupyterlab-settings"
    assert lab_theme() == "light"
    for name, theme in (("JupyterLab Dark", "dark"), ("JupyterLab Light", "light")):
        settings.write_text(f'{{\n    // Selected Theme\n    "theme": "{name}"\n}}')
        assert lab_theme() == theme
    settings.write_text('{"theme": "JupyterLab Dark"}')
    open_stage("dpo", "smoke")
    assert "SPAVL_FIGURES" not in os.environ  # no notebook that a person sees
    monkeypatch.setenv("JPY_SESSION_NAME", "04_dpo.ipynb")
    open_stage("dpo", "smoke")
    assert os.environ.pop("SPAVL_FIGURES") == "dark"


def test_notebooks_reveal_the_embedded_set_alone(repo: Path) -> None:
    """Whatever they show of a row goes through a preview, which asks whose rows they are."""
    trained, measured = "may_reveal(config.data)", 'origin["mini"]'
    for path in sorted((repo / "notebooks").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        # 05 and 06 show prompts of evaluation sets, which may be others than the training rows.
        whose = f"{trained} and {measured}" if path.name[:2] in ("05", "06") else trained
        shown = re.findall(r"\breveal=([^,)]+)", code)
        code = code.replace(
            f"reveal, hidden = {trained}, hidden_ids(config.data)", f"reveal = {trained}"
        )
        set_to = re.findall(r"^(?:.+, )?reveal = (.+?)(?:  #.*)?$", code, re.MULTILINE)
        assert set_to == [whose] * bool(shown), path.name
        narrower = re.findall(rf"(\w+) = .*\breveal and {re.escape(measured)}$", code, re.MULTILINE)
        assert set(shown) <= {"reveal", *narrower}, path.name
