"""A model family from another package: found by its entry point, then loaded and trained."""

import sys
from pathlib import Path

import pytest
import torch

from spavl_lib.config import ModelConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import assert_freeze_plan, freeze_for_full, lora_config
from spavl_lib.modelling.families import FAMILIES, Family, family_of, register_family, tower_of
from spavl_lib.modelling.load import load_model, load_processor
from spavl_lib.modelling.speed.shared_prefix import share_prefix
from spavl_lib.modelling.speed.tower_cache import TowerCache
from tests.helpers import embedded_model, embedded_processor, mini_rows
from tests.packages import install

# A package with a family is two files: this module, and a pyproject.toml that names its class.
PACKAGE = ("glance_vlm", "spavl.families glance = glance_vlm:Glance")
MODULE = '''
from transformers import (
    AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration, LlavaModel,
)

from spavl_lib.modelling.families import Family, register_family


class GlanceConfig(LlavaConfig):
    model_type = "glance"


class GlanceModel(LlavaModel):
    """A LLaVA whose tower has another name."""

    def __init__(self, config):
        super().__init__(config)
        self.eye = self.vision_tower
        del self.vision_tower

    @property
    def vision_tower(self):
        return self.eye


class GlanceForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = GlanceConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = GlanceModel(config)
        self.post_init()


AutoConfig.register("glance", GlanceConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    GlanceConfig, GlanceForConditionalGeneration, exist_ok=True
)


@register_family("glance")
class Glance(Family):
    tower = ("eye",)
    shares_prefixes = picks_hidden_states = True

    @classmethod
    def prepare_processor(cls, processor):
        processor.glances = True
        return processor
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch):
    """Forget what a test registers."""
    monkeypatch.setattr(FAMILIES, "known", dict(FAMILIES.known))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model as one of that family, in a folder."""
    install(tmp_path / "site", *PACKAGE, MODULE, monkeypatch)
    import glance_vlm

    embedded = embedded_model()
    config = glance_vlm.GlanceConfig(**embedded.config.to_dict() | {"model_type": "glance"})
    model = glance_vlm.GlanceForConditionalGeneration(config)
    weights = embedded.state_dict()
    model.load_state_dict({k.replace("vision_tower", "eye"): v for k, v in weights.items()})
    model.save_pretrained(tmp_path / "model")
    embedded_processor().save_pretrained(tmp_path / "model")
    del FAMILIES.known["glance"], sys.modules["glance_vlm"]
    return tmp_path / "model"


def test_a_package_adds_a_family(saved: Path) -> None:
    assert "glance" not in FAMILIES.known and "glance" in FAMILIES.names()
    config = ModelConfig(name=str(saved), adapter="lora", lora_rank=4, lora_alpha=8)
    processor, model = load_processor(config), load_model(config)
    assert processor.glances and family_of(model).__name__ == "Glance"
    assert tower_of(model) is model.model.eye
    freeze_for_full(model, ModelConfig(name=str(saved), adapter="full"))
    assert not any(p.requires_grad for p in model.model.eye.parameters())
    assert not any(".eye." in name for name in lora_config(model, config).target_modules)
    parts = assert_freeze_plan(model, ModelConfig(name=str(saved), adapter="full"))
    assert set(parts) == {"language", "head", "projector"}
    # The same numbers as the embedded model, and again with the speed-ups.
    batch = PreferenceCollator(processor)([mini_rows()[i] for i in (0, 1)])
    batch.pop("completion_mask")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = embedded_model()(**batch).logits[real]
        torch.testing.assert_close(model(**batch).logits[real], expected)
        handle = share_prefix(model, strict=True)
        torch.testing.assert_close(model(**batch).logits[real], expected, atol=1e-4, rtol=1e-4)
    assert handle.stats["shared"] == 1
    assert TowerCache(model, [tower_of(model)]).works
    assert family_of(embedded_model()).__name__ == "Llava"


def test_a_package_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, *PACKAGE, "import nothing_of_that_name", monkeypatch)
    with pytest.raises(InputError, match="cannot load model family 'glance' from glance_vlm:Gl"):
        load_processor(ModelConfig(name="embedded", adapter="lora"))


def test_a_name_stands_for_one_family() -> None:
    with pytest.raises(InputError, match="model family 'llava' exists already"):
        register_family("llava")(type("Other", (Family,), {}))
    assert family_of(torch.nn.Linear(1, 1)) is Family
