"""What a notebook's parameters may be: papermill passes them as it reads them."""

import pytest

from spavl_lib.errors import InputError
from spavl_lib.notebook import colab
from spavl_lib.notebook.session import open_stage

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
