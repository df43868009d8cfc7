"""The training of the embedded base: resumes to the bit, and its tower sees what it should."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from spavl_lib.data.embedded import drawings, scenes
from spavl_lib.data.embedded.world import load_world
from spavl_lib.errors import InputError
from spavl_lib.trainers import embedded_base, embedded_tower
from spavl_lib.trainers.embedded_tower import PATCHES, Recipe, TowerClassifier, tower_batch
from spavl_lib.trainers.pretrain import _optimizers, pretrain

DRAWN_STEPS = 130  # of which the first 100 are saved


class Small(nn.Module):
    """Two hidden matrices in `layers`, which Muon trains, and a head, which AdamW trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(2))})
        self.head = nn.Linear(6, 1)

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.body["layers"]:
            rows = torch.tanh(layer(rows))
        return self.head(rows)[:, 0]


def draw(rng: random.Random) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([[rng.gauss(0, 1) for _ in range(6)] for _ in range(16)])
    return rows, rows[:, 0] * rows[:, 1]


def trained(work: Path, stop: int = 10**9, *, muon: bool = True) -> tuple[Small, list[dict]]:
    module = Small()

    def loss_of(step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict]:
        if step == stop:
            raise KeyboardInterrupt
        rows, wanted = batch
        return ((module(rows) - wanted) ** 2).mean(), {}

    return module, pretrain(
        "small", module, draw, loss_of, DRAWN_STEPS, work, 3, rate=1e-3, muon=muon
    )


@pytest.mark.parametrize("muon", [True, False])
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, muon: bool) -> None:
    whole, log = trained(tmp_path / "whole", muon=muon)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=117, muon=muon)
    parts, again = trained(tmp_path / "parts", muon=muon)
    assert again == log and len(log) == DRAWN_STEPS
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
        assert not torch.equal(value, Small().state_dict()[name]), name


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop=117)
    with pytest.raises(InputError, match="'muon': True.*'muon': False.*--work"):
        trained(tmp_path, muon=False)


def test_muon_trains_the_matrices_of_hidden_layers_alone() -> None:
    module = Small()
    first, second = _optimizers(module, 1e-3, muon=True, slower={})
    assert [p.shape for g in first.param_groups for p in g["params"]] == [(6, 6)] * 2
    assert sum(len(g["params"]) for g in second.param_groups) == 4
    [only] = _optimizers(module, 1e-3, muon=False, slower={})
    assert sum(len(g["params"]) for g in only.param_groups) == 6
    assert [g["weight_decay"] for g in only.param_groups] == [0.05, 0.0]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(embedded_base.MODEL_DIR)


@pytest.mark.parametrize("distorted", [0.0, 0.5, 1.0])
def test_a_batch_has_its_share_of_distorted_images(
    processor, distorted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(("noto", "fluent_flat"), distorted=distorted)
    pixels, concepts, colours = tower_batch(random.Random(1), processor, 8, recipe)
    again = tower_batch(random.Random(1), processor, 8, recipe)
    assert pixels.shape == (8, 3, 64, 64) and torch.equal(pixels, again[0])
    assert concepts.max() < len(load_world().concepts) and colours.max() < len(scenes.COLOURS)
    monkeypatch.setattr(embedded_tower, "distort", lambda shown, *_: shown[:, :3] * 0 + 9.0)
    marked = tower_batch(random.Random(1), processor, 8, recipe)[0].flatten(1).min(1).values > 20
    assert marked.tolist() == [True] * round(8 * distorted) + [False] * round(8 * (1 - distorted))


def test_styles_are_drawn_as_the_recipe_says() -> None:
    rng = random.Random(0)
    drawn = [embedded_tower.random_style(rng, "cat") for _ in range(600)]
    assert set(drawn) == set(drawings.styles_of("cat"))
    assert drawn.count("noto") > drawn.count("noto_v1") > drawn.count("fluent_3d") > 0
    few = {embedded_tower.random_style(rng, "axe", ("noto", "fxemoji")) for _ in range(20)}
    assert few == {"noto"}  # FxEmojis has no axe


def test_left_out_patches_do_not_count(processor) -> None:
    torch.manual_seed(0)
    tower = embedded_base.build_model(processor.tokenizer).model.vision_tower
    classifier = TowerClassifier(tower).eval()
    pixels = torch.randn(2, 3, 64, 64)
    every = torch.arange(PATCHES).expand(2, -1)
    for whole, kept in zip(classifier(pixels), classifier(pixels, every), strict=True):
        torch.testing.assert_close(whole, kept)
    features = tower(pixels).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(classifier(pixels)[0], classifier.concept_head(features))
    some = torch.tensor([[0, 1, 2], [0, 1, 2]])
    before = classifier(pixels, some)[0]
    pixels[:, :, 8:] += 1.0  # all rows of patches but the first
    assert torch.equal(classifier(pixels, some)[0], before)
    assert not torch.equal(classifier(pixels, every)[0], before)


@pytest.mark.slow
def test_a_whole_build_is_a_model_in_the_hubs_layout(tmp_path: Path) -> None:
    sizes = {"tower_steps": 3, "facts_steps": 2, "language_steps": 2}
    embedded_base.build(tmp_path / "work", tmp_path / "model", seed=0, **sizes)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float16
    assert AutoProcessor.from_pretrained(tmp_path / "model").chat_template
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert "for 3 steps of 128 scenes" in card and "flat, by Microsoft Corporation (MIT)" in card
