"""The check of an export: a damaged one is caught, whatever was lost, and a good one passes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from spavl_lib.errors import InputError
from spavl_lib.modelling import canary
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.export import export
from spavl_lib.runs.files import write_json
from tests.helpers import canary_in_this_process, embedded_model, embedded_processor, smoke

Damage = Callable[[Path], None]


def write_stage(folder: Path, adapter: str, change: float) -> Path:
    """A finished DPO stage whose trained parameters were moved by `change`, times noise."""
    config = smoke({"model.adapter": adapter, "model.lora_rank": 4})
    model = embedded_model(own=True)
    if adapter == "lora":
        model = get_peft_model(model, lora_config(model, config.model))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "vision_tower" not in name:
                parameter.add_(change * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    embedded_processor().save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    write_json(folder / "summary.json", {"steps": 1})
    return folder


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stage(tmp_path_factory.mktemp("run") / "dpo", "lora", 0.05)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "_in_new_process", canary_in_this_process)


def after_writing(monkeypatch: pytest.MonkeyPatch, damage: Damage) -> None:
    """Damage every export before it is checked."""
    ask = canary._in_new_process

    def damaged(folder: Path, *rest: object) -> list[dict]:
        damage(folder)
        return ask(folder, *rest)

    monkeypatch.setattr(canary, "_in_new_process", damaged)


def change_tensors(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: change(name, value) for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def without_adapter(folder: Path) -> None:
    """The adapter adds nothing, as where its tensors are not found."""
    change_tensors(
        folder / "adapter/adapter_model.safetensors",
        lambda name, value: value * 0 if "lora_B" in name else value,
    )


def with_the_bases(part: str) -> Damage:
    """Tensors of this part are the base model's."""

    def damage(folder: Path) -> None:
        path = next(folder.rglob("model.safetensors"))
        base = load_file(Path(embedded_model().name_or_path) / "model.safetensors")
        base = {
            n.replace("vision_tower.", "vision_tower.vision_model."): v for n, v in base.items()
        }
        change_tensors(path, lambda n, v: base[n].to(v.dtype) if part in n else v)

    return damage


def other_template(folder: Path) -> None:
    path = next(folder.rglob("chat_template.jinja"))
    path.write_text(path.read_text().replace("USER: ", "HUMAN: "))


@pytest.mark.parametrize(
    ("form", "damage", "said"),
    [
        ("vllm", without_adapter, "otherwise"),
        ("vllm", with_the_bases("multi_modal_projector"), "otherwise"),
        ("merged", with_the_bases("multi_modal_projector"), "otherwise"),
        (
            "merged",
            with_the_bases(""),
            "8 of 8 training prompts otherwise, 8 of them like the base",
        ),
        ("merged", other_template, "its chat template or tokenizer differs"),
    ],
)
def test_whatever_is_lost_is_noticed_and_nothing_is_left_to_serve(
    form: str, damage: Damage, said: str, stage: Path, here: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    after_writing(monkeypatch, damage)
    with pytest.raises(InputError, match="is not the trained model") as caught:
        export(stage, tmp_path / "out", form)
    assert said in str(caught.value) and "Row " in str(caught.value)
    assert not (tmp_path / "out").exists()
    export(stage, tmp_path / "out", form, check=False)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize(("adapter", "form"), [("lora", "vllm"), ("full", "merged")])
def test_a_good_export_passes_even_if_training_changed_little(
    adapter: str, form: str, here: None, tmp_path: Path
) -> None:
    """Then words may be the base's, so probabilities must tell them apart."""
    stage = write_stage(tmp_path / "dpo", adapter, 0.003)
    found = export(stage, tmp_path / "out", form)["canary"]
    assert found["prompts"] == 8 and found["unlike_base"] >= 4


def test_a_new_process_loads_the_export(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one, in another folder, first with a good export and then with a damaged one."""
    monkeypatch.chdir(tmp_path)
    assert export(stage, Path("good"), "vllm")["canary"] == {"prompts": 8, "unlike_base": 8}
    after_writing(monkeypatch, lambda folder: (folder / "base/config.json").write_text("{"))
    with pytest.raises(InputError, match="does not load in a new process: .*config"):
        export(stage, Path("bad"), "vllm")
    assert not Path("bad").exists()


def test_a_trained_model_that_is_its_base_is_an_error(here: None, tmp_path: Path) -> None:
    stage = write_stage(tmp_path / "dpo", "lora", 0.0)
    with pytest.raises(InputError, match="exactly like its base model"):
        export(stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(stage)
    stage = write_stage(stage, "lora", 1e-6)
    with pytest.warns(UserWarning, match="like its base model, up to rounding"):
        assert export(stage, tmp_path / "out")["canary"]["unlike_base"] == 0


def test_prompts_that_cannot_be_read_are_named_with_a_way_out(stage: Path, tmp_path: Path) -> None:
    shutil.copytree(stage, tmp_path / "dpo")
    config = smoke({"data.source": "hub_layout", "data.path": str(tmp_path / "lost")})
    (tmp_path / "dpo/config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    with pytest.raises(InputError, match="training prompts cannot be read: .*--no-check"):
        export(tmp_path / "dpo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def answer(ids: list[int], logps: list[float], gap: float = 0.0) -> dict:
    return {"prompt_ids": [1, 2], "ids": ids, "logps": logps, "gap": gap}


def test_answers_are_alike_up_to_rounding_only() -> None:
    """Another token is excused where the two are equally probable, and nowhere else."""
    one = answer([5, 6, 7], [-0.1, -0.2, -0.3])
    assert canary.unlike(one, one, 0.01) == ""
    assert canary.unlike(one, answer([5, 6, 7], [-0.1, -0.205, -0.3]), 0.01) == ""
    assert "differs by 0.05 nats" in canary.unlike(
        one, answer([5, 6, 7], [-0.1, -0.25, -0.3]), 0.01
    )
    assert canary.unlike(one, answer([5, 8], [-0.1, -0.9], gap=0.005), 0.01) == ""
    assert "other words" in canary.unlike(one, answer([5, 8], [-0.1, -0.9], gap=0.5), 0.01)
    assert "other words" in canary.unlike(one, answer([5, 6], [-0.1, -0.2]), 0.01)
    other = json.loads(json.dumps(one)) | {"prompt_ids": [1, 3]}
    assert "template" in canary.unlike(one, other, 0.01)
