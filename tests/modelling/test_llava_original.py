"""The original code's checkpoints: every name mapped, the same numbers, and clear refusals."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from spavl_lib.config import ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.modelling.families import Llava, set_image_aspect
from spavl_lib.modelling.llava_original import import_llava, new_name
from spavl_lib.modelling.load import load_model, load_processor
from tests.helpers import LLAMA_TOKENS, STOCK_LLAVA_TEMPLATE, byte_tokenizer, tiny


def original_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A LLaVA's tensors as the original code names and saves them, written by hand."""
    out = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.language_model."):
            name = name.replace("model.language_model.", "model.")
        elif name.startswith("model.multi_modal_projector."):
            for old, new in (("linear_1", "0"), ("linear_2", "2")):
                name = name.replace(
                    f"model.multi_modal_projector.{old}", f"model.mm_projector.{new}"
                )
        elif name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            name = f"model.vision_tower.vision_tower.vision_model.{rest}"
        out[name] = value.clone().contiguous()
    out["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return out


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A tiny LLaVA with a vocabulary that knows no image token yet, as the original's."""
    config = tiny("llava")[0].config
    config = type(config).from_dict(config.to_dict())
    config.text_config.vocab_size = 256 + 3
    config.image_token_id, config.text_config.pad_token_id = 0, None
    torch.manual_seed(3)
    return LlavaForConditionalGeneration(config).eval()


def write_original(model: PreTrainedModel, folder: Path, *, tower: bool = True) -> Path:
    """A checkpoint of the original layout, in two shards."""
    folder.mkdir()
    text, vision = model.config.text_config, model.config.vision_config
    page = {
        "model_type": "llava_llama", "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad",
        "vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size, "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads, "rms_norm_eps": text.rms_norm_eps,
        "num_key_value_heads": text.num_key_value_heads, "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "vision_config": {
            k: getattr(vision, k)
            for k in ("hidden_size", "intermediate_size", "num_hidden_layers",
                      "num_attention_heads", "image_size", "patch_size")
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(page), encoding="utf-8")
    named = original_names(model)
    if not tower:
        named = {k: v for k, v in named.items() if "vision_tower" not in k}
    names = sorted(named)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: named[n] for n in part}, folder / f"model-{number}.safetensors")
    special = {k: v for k, v in LLAMA_TOKENS.items() if k != "pad_token"}
    byte_tokenizer(special, {}).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_an_original_checkpoint_loads_with_the_same_numbers(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    source, target = write_original(model, tmp_path / "original"), tmp_path / "imported"
    written = import_llava(source, target)
    assert written["tensors"] == len(list(model.named_parameters()))
    # transformers alone, with nothing of ours.
    ours = AutoModelForImageTextToText.from_pretrained(target).eval()
    processor = AutoProcessor.from_pretrained(target)
    assert {p.suffix for p in target.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert len(processor.tokenizer) == 261 and ours.config.text_config.vocab_size == 320
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    inputs = processor(images=picture, text="<image>\nWhat?", return_tensors="pt")
    logits = ours(**inputs).logits[..., :259]
    # The same rows through the model it was: its image token stands where it has a row.
    slot = inputs["input_ids"] == ours.config.image_token_id
    assert slot.sum() == 16
    model.config.image_token_id = 258
    theirs = dict(inputs) | {"input_ids": inputs["input_ids"].masked_fill(slot, 258)}
    expected = model(**theirs).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-2
    # And through our own door.
    config = ModelConfig(name=str(target), adapter="full")
    again = load_model(config)(**load_processor(config)(
        images=picture, text="<image>\nWhat?", return_tensors="pt")).logits  # fmt: skip
    torch.testing.assert_close(again[..., :259], expected, atol=1e-5, rtol=1e-5)


def test_a_tower_in_a_folder_of_its_own(model: PreTrainedModel, tmp_path: Path) -> None:
    source = write_original(model, tmp_path / "original", tower=False)
    with pytest.raises(InputError, match="tensors missing.*--tower"):
        import_llava(source, tmp_path / "without")
    clip = tmp_path / "clip"
    clip.mkdir()
    prefix = "model.vision_tower.vision_tower."
    named = {
        n.removeprefix(prefix): v for n, v in original_names(model).items() if n.startswith(prefix)
    }
    save_file(named | {"text_model.x": torch.ones(2)}, clip / "model.safetensors")
    page = {"vision_config": model.config.vision_config.to_dict()}
    (clip / "config.json").write_text(json.dumps(page), encoding="utf-8")
    import_llava(source, tmp_path / "with", clip)
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "with")
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(ours.model.vision_tower.state_dict()[name], value), name


def test_every_name_of_the_released_layout() -> None:
    """The names as SPA-VL's repository lists them."""
    assert new_name("model.layers.31.mlp.up_proj.weight") == (
        "language_model.model.layers.31.mlp.up_proj.weight"
    )
    assert new_name("model.embed_tokens.weight") == "language_model.model.embed_tokens.weight"
    assert new_name("lm_head.weight") == "language_model.lm_head.weight"
    assert new_name("model.mm_projector.2.bias") == "multi_modal_projector.linear_2.bias"
    assert new_name(
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    ) == ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight")
    assert new_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    with pytest.raises(InputError, match="is no tensor of an original"):
        new_name("transformer.h.0.weight")


def test_refusals(model: PreTrainedModel, tmp_path: Path) -> None:
    source = write_original(model, tmp_path / "original")
    with pytest.raises(InputError, match="no readable config.json"):
        import_llava(tmp_path, tmp_path / "x")
    with pytest.raises(InputError, match="is not empty"):
        import_llava(source, source)
    shard = source / "model-1.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    with pytest.raises(InputError, match="model-1.safetensors is damaged"):
        import_llava(source, tmp_path / "torn")
    named = load_file(source / "model-0.safetensors")
    save_file(named, shard)
    with pytest.raises(InputError, match="holds .* twice"):
        import_llava(source, tmp_path / "twice")
    page = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(page | {"model_type": "llama"}))
    with pytest.raises(InputError, match="no checkpoint of the original LLaVA code"):
        import_llava(source, tmp_path / "other")


# --- settings of the original that change what the model is given --------------------------------


def changed(model: PreTrainedModel, folder: Path, **settings: object) -> Path:
    """An original checkpoint with other settings in its config.json."""
    source = write_original(model, folder)
    page = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(page | settings))
    return source


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        ({"rope_theta": 500000.0}, {"rope_theta": 500000.0, "rope_type": "default"}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5000.0},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        ),
    ],
)
def test_rotary_positions_are_kept(
    settings: dict, rope: dict, model: PreTrainedModel, tmp_path: Path
) -> None:
    source = changed(model, tmp_path / "original", **settings)
    import_llava(source, tmp_path / "imported")
    kept = AutoModelForImageTextToText.from_pretrained(tmp_path / "imported").config.text_config
    assert rope.items() <= kept.rope_parameters.items()


def test_every_value_of_the_language_model_is_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    settings = {"rms_norm_eps": 3e-5, "attention_bias": False, "hidden_act": "gelu"}
    import_llava(changed(model, tmp_path / "original", **settings), tmp_path / "imported")
    text = json.loads((tmp_path / "imported/config.json").read_text())["text_config"]
    assert settings.items() <= text.items()


@torch.no_grad()
def test_the_class_token_is_kept_where_the_original_uses_it(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    source = changed(model, tmp_path / "original", mm_vision_select_feature="cls_patch")
    import_llava(source, tmp_path / "imported")
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "imported")
    processor = AutoProcessor.from_pretrained(tmp_path / "imported")
    picture = Image.new("RGB", (20, 30), (200, 10, 10))
    inputs = processor(images=picture, text="<image>\nWhat?", return_tensors="pt")
    assert (inputs["input_ids"] == ours.config.image_token_id).sum() == 17  # 16 patches and it
    assert torch.isfinite(ours(**inputs).logits).all()


@pytest.mark.parametrize("ratio", [None, "square"])
def test_images_are_cropped_where_the_original_crops(
    ratio: str | None, model: PreTrainedModel, tmp_path: Path
) -> None:
    source = changed(model, tmp_path / "original", image_aspect_ratio=ratio)
    import_llava(source, tmp_path / "imported")
    processor = load_processor(ModelConfig(name=str(tmp_path / "imported"), adapter="lora"))
    images = processor.image_processor
    assert images.do_center_crop and type(images).__name__ == "CLIPImageProcessorPil"
    left, right = (np.zeros((32, 96, 3), np.uint8) for _ in range(2))
    left[:, :30] = 255  # outside the middle: not seen
    seen = [images(Image.fromarray(p), return_tensors="np")["pixel_values"] for p in (left, right)]
    np.testing.assert_array_equal(*seen)


@pytest.mark.parametrize("rows", [261, 320, 384])
def test_a_vocabulary_with_rows_to_spare(rows: int, model: PreTrainedModel, tmp_path: Path) -> None:
    source = write_original(model, tmp_path / "original")
    for path in source.glob("*.safetensors"):
        named = load_file(path)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in named:
                spare = torch.full((rows - len(named[name]), named[name].shape[1]), 0.5)
                named[name] = torch.cat([named[name], spare])
        save_file(named, path)
    page = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(page | {"vocab_size": rows}))
    import_llava(source, tmp_path / "imported")
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "imported")
    table = ours.get_input_embeddings().weight
    assert table.shape[0] == -(-rows // 64) * 64
    assert torch.equal(table[:259], model.get_input_embeddings().weight[:259])


@pytest.mark.parametrize(
    "settings",
    [
        {"image_aspect_ratio": "anyres"},
        {"mm_use_im_start_end": True},
        {"mm_vision_select_feature": "cls"},
        {"mm_projector_type": "linear", "image_aspect_ratio": "anyres_max_9"},
    ],
)
def test_what_cannot_be_imported_is_named_before_anything_is_written(
    settings: dict, model: PreTrainedModel, tmp_path: Path
) -> None:
    source = changed(model, tmp_path / "original", **settings)
    with pytest.raises(InputError) as caught:
        import_llava(source, tmp_path / "imported")
    for key, value in settings.items():
        assert f"{key} {value!r}" in str(caught.value)
    assert not (tmp_path / "imported").exists()


# --- pictures and words of the Hub's LLaVA-1.5 --------------------------------------------------


def llava_pixels(picture: Image.Image, side: int, mean: list, std: list) -> np.ndarray:
    """LLaVA's `process_images` with `image_aspect_ratio: pad`, from its description."""
    width, height = picture.size
    longest = max(width, height)
    square = Image.new("RGB", (longest, longest), tuple(int(m * 255) for m in mean))
    square.paste(picture, ((longest - width) // 2, (longest - height) // 2))
    small = square.resize((side, side), Image.Resampling.BICUBIC)
    return ((np.asarray(small) / 255.0 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(90, 30), (31, 77), (50, 50), (16, 15)])
def test_a_stock_processor_becomes_llavas_own_to_the_pixel(
    size: tuple[int, int], tmp_path: Path
) -> None:
    tiny("llava")[0].config.save_pretrained(tmp_path)
    tiny("llava")[1].save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    ours = load_processor(ModelConfig(name=str(tmp_path), adapter="lora"))
    pixels = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(pixels)
    seen = ours.image_processor(picture, return_tensors="np")["pixel_values"][0]
    pictures = ours.image_processor
    expected = llava_pixels(picture, 32, pictures.image_mean, pictures.image_std)
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    cut = stock.image_processor(picture, return_tensors="np")["pixel_values"][0]
    if size[0] != size[1]:
        assert np.abs(cut - expected).max() > 0.5  # the stock one cuts the middle out


def clip_pixels(picture: Image.Image, side: int, mean: list, std: list) -> np.ndarray:
    """LLaVA's `process_images` with another `image_aspect_ratio`: CLIP's middle of the image."""
    scale = side / min(picture.size)
    width, height = (int(n * scale) for n in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    middle = np.asarray(small)[top : top + side, left : left + side]
    return ((middle / 255.0 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(90, 30), (32, 80)])
@pytest.mark.parametrize("template", ["the Hub's", "its own"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_the_setting_decides_how_an_image_becomes_square(
    aspect: str, template: str, size: tuple[int, int], tmp_path: Path
) -> None:
    model, processor = tiny("llava")[0], copy.deepcopy(tiny("llava")[1])
    processor.image_processor.image_mean = [0.5, 0.4, 0.3]
    if template == "its own":
        processor.chat_template = TEMPLATES["llama 3"]
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), adapter="lora", image_aspect=aspect)
    images = load_processor(config).image_processor
    pixels = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(pixels)
    seen = images(picture, return_tensors="np")["pixel_values"][0]
    by_hand = {"pad": llava_pixels, "square": clip_pixels}
    expected = {
        name: pixels_of(picture, 32, [0.5, 0.4, 0.3], images.image_std)
        for name, pixels_of in by_hand.items()
    }
    np.testing.assert_allclose(seen, expected[aspect], atol=1e-5)
    assert np.abs(expected["pad"] - expected["square"]).max() > 0.5


def test_the_setting_is_refused_where_nothing_reads_it() -> None:
    processor = tiny("llava_next")[1]
    set_image_aspect(processor, "auto")
    with pytest.raises(InputError, match="only for LLaVA-1.5, but this model has a LlavaNextPro"):
        set_image_aspect(processor, "pad")


def test_the_stock_template_becomes_vicunas(tmp_path: Path) -> None:
    tiny("llava")[0].config.save_pretrained(tmp_path)
    tiny("llava")[1].save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="template is the Hub's.*vicuna_v1.*padded to a square"):
        ours = load_processor(ModelConfig(name=str(tmp_path), adapter="lora"))
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]}]
    text = ours.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\nHi? "
        "ASSISTANT:"
    )


TEMPLATES = {
    "llama 3": "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{% for p in "
    "m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}",
    "a word more": STOCK_LLAVA_TEMPLATE.replace("ASSISTANT:", "ASSISTANT: Well,"),
    "a system sentence": "Be brief. " + STOCK_LLAVA_TEMPLATE,
    "another name": STOCK_LLAVA_TEMPLATE.replace(".upper()", ".title()"),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_of_its_own_is_kept_with_its_image_processor(
    template: str, tmp_path: Path
) -> None:
    """A Llama 3 or a Phi 3 in LLaVA's class, and whoever edits the template as the error says."""
    model, processor = tiny("llava")[0], copy.deepcopy(tiny("llava")[1])
    processor.chat_template = template
    processor.image_processor.image_mean = [0.5, 0.4, 0.3]
    processor.image_processor.image_std = [0.2, 0.3, 0.4]
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_processor(ModelConfig(name=str(tmp_path), adapter="lora"))
    assert ours.chat_template == template
    assert as_saved(ours.image_processor) == as_saved(processor.image_processor)
    assert ours.image_processor.do_center_crop


def as_saved(images: BaseImageProcessor) -> dict:
    return json.loads(images.to_json_string())


def test_llavas_padding_keeps_the_checkpoints_own_mean(tmp_path: Path) -> None:
    model, processor = tiny("llava")[0], copy.deepcopy(tiny("llava")[1])
    processor.image_processor.image_mean = [0.5, 0.4, 0.3]
    processor.image_processor.image_std = [0.2, 0.3, 0.4]
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="vicuna_v1"):
        images = load_processor(ModelConfig(name=str(tmp_path), adapter="lora")).image_processor
    assert images.do_pad and not images.do_center_crop
    assert list(images.image_mean) == [0.5, 0.4, 0.3] and list(images.image_std) == [0.2, 0.3, 0.4]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "idefics3", "embedded"])
def test_other_processors_stay_as_they_are(family: str) -> None:
    processor = tiny(family)[1]
    pictures, template = processor.image_processor, processor.chat_template
    assert Llava.prepare_processor(processor) is processor
    assert processor.image_processor is pictures and processor.chat_template == template
