"""The scalar head: read at the last real token, and saved so that it comes back whole."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.heads import (
    HEAD_FILE,
    ScalarHeadModel,
    has_cost_head,
    in_fp32,
    last_token_index,
    load_reward_model,
    save_reward_model,
)
from spavl_lib.objectives.logps import sequence_logps
from tests.helpers import embedded_model, embedded_processor, mini_rows, smoke, spread, tiny

FAMILIES = ("embedded", "llava", "llava_next", "qwen2_5_vl", "idefics3")


def batch_of(processor: object, rows: list[dict], side: str = "right") -> dict:
    batch = PreferenceCollator(processor, padding_side=side)(rows)
    batch.pop("completion_mask")
    return batch


def test_the_last_token_is_found_by_the_mask() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert last_token_index(mask).tolist() == [2, 4, 3]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_gives_the_score_of_the_row_alone(family: str) -> None:
    if family == "embedded":
        model, processor = embedded_model(), embedded_processor()
    else:
        model, processor = tiny(family)
    torch.manual_seed(0)
    scorer = ScalarHeadModel(model).eval()
    rows = spread(mini_rows(), 3)
    right = scorer(**batch_of(processor, rows))
    torch.testing.assert_close(
        scorer(**batch_of(processor, rows, "left")), right, atol=1e-4, rtol=1e-4
    )
    alone = [scorer(**batch_of(processor, [row])) for row in rows]
    together = torch.stack([torch.stack([right[i], right[i + 3]]) for i in range(3)])
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)
    assert right.std() > 1e-3  # rows differ, or nothing was shown


@torch.no_grad()
def test_the_head_at_the_last_token_gives_the_scores() -> None:
    torch.manual_seed(0)
    scorer = ScalarHeadModel(embedded_model()).eval()
    batch = batch_of(embedded_processor(), spread(mini_rows(), 2))
    values = in_fp32(scorer.score, scorer.hidden_states(**batch))
    last = last_token_index(batch["attention_mask"])
    torch.testing.assert_close(values[torch.arange(4), last], scorer(**batch))


@torch.no_grad()
def test_the_answers_log_probabilities_come_beside_the_scores() -> None:
    scorer = ScalarHeadModel(embedded_model()).eval()
    rows = spread(mini_rows(), 2)
    whole = PreferenceCollator(embedded_processor())(rows)
    mask = whole["completion_mask"].bool()
    mask[3] = False  # a row that is left out
    batch = {k: v for k, v in whole.items() if k != "completion_mask"}
    scores, logps = scorer(completion_mask=mask, **batch)
    torch.testing.assert_close(scores, scorer(**batch))
    logits = embedded_model()(**batch).logits
    expected = sequence_logps(logits, batch["input_ids"], mask) / mask.sum(1).clamp(min=1)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    assert logps[3] == 0 and (logps[:3] < -1e-3).all()


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_head_adapter_and_projector_come_back_together(adapter: str, tmp_path: Path) -> None:
    config = smoke({"model.adapter": adapter}).model
    vlm = embedded_model(own=True)
    if adapter == "lora":
        vlm = get_peft_model(vlm, lora_config(vlm, config))
    scorer = ScalarHeadModel(vlm).eval()
    batch = batch_of(embedded_processor(), spread(mini_rows(), 2))
    with torch.no_grad():
        before = scorer(**batch)
        for name, parameter in scorer.named_parameters():
            if "lora_B" in name or "projector" in name or "score" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        shaken = scorer(**batch)
    assert (shaken - before).abs().min() > 1e-3
    save_reward_model(scorer, tmp_path, config)
    with torch.no_grad():
        again = load_reward_model(config, tmp_path)(**batch)
    torch.testing.assert_close(again, shaken, atol=1e-5, rtol=1e-5)


def test_a_missing_head_and_another_base_are_refused(tmp_path: Path) -> None:
    config = smoke({"model.adapter": "full"}).model
    save_reward_model(ScalarHeadModel(embedded_model()), tmp_path, config)
    (tmp_path / "other").touch()  # others may read the weights too, unlike what safetensors writes
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    with pytest.raises(InputError, match="same base"):
        load_reward_model(dataclasses.replace(config, name="org/other"), tmp_path)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(InputError, match=HEAD_FILE):
        load_reward_model(config, tmp_path)


def test_a_cost_head_changes_no_score_and_comes_back(tmp_path: Path) -> None:
    config = smoke({"model.adapter": "full"}).model
    torch.manual_seed(3)
    plain = ScalarHeadModel(embedded_model()).eval()
    torch.manual_seed(3)
    scorer = ScalarHeadModel(embedded_model(), with_cost=True).eval()
    assert plain.cost is None and torch.equal(plain.score.weight, scorer.score.weight)
    whole = PreferenceCollator(embedded_processor())(spread(mini_rows(), 2))
    mask = whole.pop("completion_mask")
    with torch.no_grad():
        scores, costs = scorer(costs=True, **whole)
        assert torch.equal(scores, plain(**whole)) and torch.equal(scores, scorer(**whole))
        assert (scores - costs).abs().min() > 1e-4
        _, logps = plain(completion_mask=mask, **whole)
        every = scorer(completion_mask=mask, costs=True, **whole)
        assert all(map(torch.equal, every, (scores, costs, logps)))
        for model, name in ((plain, "plain"), (scorer, "cost")):
            save_reward_model(model, tmp_path / name, config)
        again = load_reward_model(config, tmp_path / "cost")(costs=True, **whole)
    torch.testing.assert_close(again, (scores, costs), atol=1e-5, rtol=1e-5)
    assert has_cost_head(tmp_path / "cost") and not has_cost_head(tmp_path / "plain")
    assert load_reward_model(config, tmp_path / "plain").cost is None
