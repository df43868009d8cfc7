"""What a notebook's parameters may be: papermill passes them as it reads them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spavl_lib.data.images import png_bytes
from spavl_lib.errors import InputError
from spavl_lib.notebook import colab
from spavl_lib.notebook.session import caption, open_stage, safe_image, safe_text

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
    stripes = Image.fromarray(np.tile([0, 255], (32, 16)).astype(np.uint8)).convert("RGB")
    cell = {"bytes": png_bytes(stripes), "path": None}
    blurred, plain = np.asarray(safe_image(cell)), np.asarray(safe_image(cell, reveal=True))
    assert np.array_equal(plain, np.asarray(stripes)) and plain.std() > 100
    assert blurred.shape == plain.shape and blurred[8:24, 8:24].std() < 20


def test_notebooks_reveal_the_embedded_set_alone(repo: Path) -> None:
    """Whatever they show of a row goes through a preview, which asks whose rows they are."""
    trained, measured = 'config.data.source == "mini"', 'origin["mini"]'
    for path in sorted((repo / "notebooks").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        # 05 and 06 show prompts of evaluation sets, which may be others than the training rows.
        whose = f"{trained} and {measured}" if path.name[:2] in ("05", "06") else trained
        shown = re.findall(r"\breveal=([^,)]+)", code)
        set_to = re.findall(r"^(?:.+, )?reveal = (.+?)(?:  #.*)?$", code, re.MULTILINE)
        assert set_to == [whose] * bool(shown), path.name
        narrower = re.findall(rf"(\w+) = .*\breveal and {re.escape(measured)}$", code, re.MULTILINE)
        assert set(shown) <= {"reveal", *narrower}, path.name
