"""The picture must count: a model that answers from the words alone passes every other test."""

import torch
from PIL import Image

from spavl_lib.config import DataConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.embedded.world import load_world
from spavl_lib.data.images import png_bytes
from spavl_lib.data.load import load_prompts, load_truth
from tests.helpers import MINI, embedded_model, embedded_processor, logps_of, mini_rows, spread


def named_pictures(count: int) -> list[dict]:
    """Test pictures with a question of fact; chosen names the thing, rejected another."""
    truth, concepts = load_truth(MINI), load_world().concepts
    rows = []
    for r in load_prompts(DataConfig(**vars(MINI)), "help"):
        known = truth[r["id"]]
        if known["intent"] == "fact:name":
            rows.append(dict(r) | {"prompt": "What do you see?", "concept": known["concept"]})
    rows = rows[:: max(1, len(rows) // count)][:count]
    names = [concepts[r["concept"]].name for r in rows]
    for i, r in enumerate(rows):
        other = next(n for n in names[i + 1 :] + names if n != names[i])
        r["chosen"] = f"The picture shows a {names[i]}."
        r["rejected"] = f"The picture shows a {other}."
    return rows


def test_blanking_or_exchanging_the_image_moves_every_log_probability() -> None:
    model, collate = embedded_model(), PreferenceCollator(embedded_processor())
    rows = [dict(r) for r in spread(mini_rows(), 16)]
    right = logps_of(model, collate(rows))
    blank = {"bytes": png_bytes(Image.new("RGB", (64, 64), (122, 116, 104))), "path": None}
    blanked = logps_of(model, collate([r | {"image": blank} for r in rows]))
    turned = [r | {"image": rows[i - 1]["image"]} for i, r in enumerate(rows)]
    exchanged = logps_of(model, collate(turned))
    for other in (blanked, exchanged):
        assert (right - other).abs().median() > 0.05
        assert ((right - other).abs() > 1e-3).float().mean() >= 0.9


def test_the_base_model_sees_what_is_pictured() -> None:
    """It finds the shown thing's name likelier than another's, on pictures it never saw."""
    model, collate = embedded_model(), PreferenceCollator(embedded_processor())
    rows = named_pictures(24)
    assert len(rows) == 24 and len({r["concept"] for r in rows}) > 12

    def accuracy(rows: list[dict]) -> float:
        logps = logps_of(model, collate(rows))
        chosen, rejected = logps.chunk(2)
        return (chosen > rejected).float().mean().item()

    shown = accuracy(rows)
    shuffled = accuracy([r | {"image": rows[i - 5]["image"]} for i, r in enumerate(rows)])
    assert shown >= 0.8
    assert shuffled <= 0.7 and shown - shuffled >= 0.2


def test_a_gradient_reaches_the_image() -> None:
    model = embedded_model(own=True)
    batch = PreferenceCollator(embedded_processor())(spread(mini_rows(), 2))
    pixels = batch["pixel_values"].requires_grad_()
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    logits = model(**inputs | {"pixel_values": pixels}).logits
    logits[batch["completion_mask"].bool()].logsumexp(-1).sum().backward()
    per_image = pixels.grad.abs().amax(dim=(1, 2, 3))
    assert torch.isfinite(per_image).all() and (per_image > 1e-5).all()
