"""The table of log-probabilities in lesson 04."""

import torch

from spavl_lib.data.collate import PreferenceCollator, PromptCollator
from spavl_lib.generation.generate import generate_batch
from spavl_lib.notebook.likelihoods import likelihood_frame, response_logps
from tests.helpers import embedded_model, embedded_processor, mini_rows, smoke


def test_own_replies_are_the_likeliest_continuations_and_cut_ones_have_no_end() -> None:
    model, processor = embedded_model(), embedded_processor()
    rows = [mini_rows()[i] for i in range(5)]
    replies = generate_batch(model, processor, PromptCollator(processor)(rows), smoke().generation)
    assert all(reply["finished"] for reply in replies)
    chosen, rejected, own = response_logps(model, processor, rows, replies)
    for row, reply, *values in zip(rows, replies, chosen, rejected, own, strict=True):
        for value, text in zip(
            values, (row["chosen"], row["rejected"], reply["response"]), strict=True
        ):
            batch = PreferenceCollator(processor).batch_of([row | {"one": text}], "one")
            mask = batch.pop("completion_mask")[:, 1:].bool()
            with torch.no_grad():
                logps = model(**batch).logits[:, :-1].log_softmax(-1)
            tokens = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][mask]
            torch.testing.assert_close(tokens.sum(), value, atol=1e-3, rtol=1e-4)
    cut = response_logps(model, processor, rows, [r | {"finished": False} for r in replies])
    assert (cut[2] > own).all() and torch.equal(cut[:2], torch.stack([chosen, rejected]))


def test_the_table_of_the_base_has_no_margin() -> None:
    frame = likelihood_frame(
        smoke(), {"base": None, "again": None}, [mini_rows()[i] for i in range(5)]
    )
    assert frame["mean margin"].tolist() == ["–", "0.0"]
    assert frame.loc["base"].tolist()[1:] == frame.loc["again"].tolist()[1:]
