"""LLaVA-1.5's template, token by token: the ids that Llama's own vocabulary gives.

`scripts/vicuna_ids.mjs` made the ids, from LLaVA's description and Llama's vocabulary, without our
code. The vocabulary is not in this repository: the tokenizer here has those tokens of it that the
four conversations need, cut from their texts.
"""

import json
from itertools import groupby

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from spavl_lib.data.collate import PreferenceCollator, PromptCollator
from spavl_lib.data.schema import TURN
from spavl_lib.data.templates import VICUNA_V1
from spavl_lib.modelling.families import llava_images
from tests.conftest import REPO

GOLDEN = json.loads((REPO / "tests/golden/vicuna_v1.json").read_text(encoding="utf-8"))
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
SPACE = "▁"


def pieces() -> dict[str, int]:
    """The tokens of the golden ids, cut from the texts."""
    found: dict[str, int] = {}
    for case in GOLDEN.values():
        rest = "<s>" + case["text"]
        before_special = True
        for number, length in zip(case["ids"], case["lengths"], strict=True):
            special = next((s for s, i in SPECIAL.items() if i == number), None)
            if special is not None:
                assert rest.startswith(special)
                rest = rest[len(special) :]
            else:
                rest = (" " if before_special else "") + rest
                piece = rest[:length].replace(" ", SPACE)
                rest = rest[length:]
                assert found.setdefault(piece, number) == number
            before_special = special is not None
        assert rest == ""
    return found


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    """LLaVA-1.5's processor over a tokenizer set up as llava-hf/llava-1.5-7b-hf's."""
    named = {number: piece for piece, number in pieces().items()}
    named |= {number: token for token, number in SPECIAL.items()}
    # Fewest tokens win, which is what Llama's merges give for these texts, as the test shows.
    vocabulary = [(named.get(n, f"unused{n}"), -1.0 if n in named else -99.0) for n in range(32064)]
    raw = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    raw.decoder = decoders.Replace(SPACE, " ")
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=llava_images(28), tokenizer=tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=VICUNA_V1,
    )  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_those_of_llavas_own_code(name: str, processor: LlavaProcessor) -> None:
    case = GOLDEN[name]
    image = Image.new("RGB", (30, 20), (200, 10, 10)) if case["image"] else None
    *before, last = case["turns"]
    asked = not before or len(case["turns"]) % 2
    prompt = TURN.join(case["turns"] if asked else before)
    row = {"id": "1", "prompt": prompt, "image": image, "chosen": last, "rejected": "No."}
    if asked:
        batch = PromptCollator(processor)([row])
    else:
        batch = PreferenceCollator(processor)([row])
        scored = batch["input_ids"][0][batch["completion_mask"][0].bool()].tolist()
        assert scored == case["ids"][-len(scored) :] and scored[-1] == SPECIAL["</s>"]
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    slots = ids.count(SPECIAL["<image>"])
    assert slots == (4 if case["image"] else 0)
    once = [i for i, same in groupby(ids) for _ in (same if i != SPECIAL["<image>"] else [0])]
    assert once == case["ids"]


def test_four_cases_are_recorded() -> None:
    assert set(GOLDEN) == {"prompt alone", "prompt and answer", "no image", "two turns"}
    head = [1, 319, 13563, 1546, 263, 12758, 1404]  # A chat between a curious user
    assert all(case["ids"][: len(head)] == head for case in GOLDEN.values())
