"""Checkpoints: whole or not there, every damage named, and everything put back bit by bit."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spavl_lib.errors import DiskError, InputError
from spavl_lib.trainers import checkpoint as ckpt


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "trainable": {"a": torch.full((3, 2), value), "b": torch.arange(4)},
        "optimizer": {"0.step": torch.tensor(value)},
    }


def save(folder: Path, step: int, **options: object) -> Path:
    return ckpt.save_checkpoint(
        folder, step, tensors(float(step)), {"step": step}, texts={"note.txt": "hello"}, **options
    )


FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json", "note.txt")


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 3)
    assert saved == tmp_path / "step-3"
    assert sorted(p.name for p in saved.iterdir()) == sorted([*FILES, ckpt.MANIFEST])
    assert ckpt.problem_with(saved) is None
    assert ckpt.load_state(saved) == {"step": 3}
    for stem, named in tensors(3.0).items():
        loaded = ckpt.load_tensors(saved, stem)
        assert loaded.keys() == named.keys()
        for name, value in named.items():
            assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
    assert not list(tmp_path.glob(".tmp*"))


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    assert {p.suffix for p in saved.iterdir()} == {".safetensors", ".json", ".txt"}
    for path in saved.glob("*.safetensors"):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        json.loads(path.read_bytes()[8 : 8 + length])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["removed", "truncated", "flipped", "grown", "emptied"])
def test_every_damage_is_found_and_its_file_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 5) / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        changed = {"truncated": content[:-1], "flipped": content, "grown": content + b"x",
                   "emptied": b""}[damage]  # fmt: skip
        path.write_bytes(changed)
    problem = ckpt.problem_with(path.parent)
    assert problem is not None and str(path) in problem
    assert ("missing" in problem) == (damage == "removed")


def test_a_manifest_cut_anywhere_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5) / ckpt.MANIFEST
    content = path.read_bytes()
    for cut in range(0, len(content) - 1, 7):
        path.write_bytes(content[:cut])
        assert ckpt.MANIFEST in str(ckpt.problem_with(path.parent)), cut
    path.unlink()
    assert ckpt.MANIFEST in str(ckpt.problem_with(path.parent))


def test_a_manifest_flipped_anywhere_never_passes_for_another(tmp_path: Path) -> None:
    """Any byte of what it says of the files: found or, where it is only white space, the same."""
    path = save(tmp_path, 5) / ckpt.MANIFEST
    content = path.read_bytes()
    start, whole = content.index(b'"files"'), json.loads(content)["files"]
    found = 0
    for position in range(start, len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        problem = ckpt.problem_with(path.parent)
        if problem is None:
            assert json.loads(changed)["files"] == whole, position
        else:
            assert str(path.parent) in problem
            found += 1
    assert found > 0.7 * (len(content) - start)


@pytest.mark.parametrize(
    "manifest",
    ["[]", "null", '"x"', "{}", '{"files": []}', '{"files": {"state.json": 5}}',
     '{"files": {"state.json": {}}}', '{"files": {}}'],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_torn(tmp_path: Path, manifest: str) -> None:
    path = save(tmp_path, 5) / ckpt.MANIFEST
    path.write_text(manifest)
    assert ckpt.MANIFEST in str(ckpt.problem_with(path.parent))


def test_the_newest_whole_one_is_taken_and_the_rest_named(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-11/state.json").write_text("{}")
    (tmp_path / "step-10" / ckpt.MANIFEST).unlink()
    (tmp_path / "step-12").mkdir()  # a folder of that name and nothing in it
    (tmp_path / ".tmp-step-13").mkdir()  # a write that was cut off
    (tmp_path / "step-x").mkdir()
    newest, skipped = ckpt.latest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-9"
    assert [name in text for name, text in zip(("step-12", "step-11", "step-10"), skipped,
            strict=True)] == [True] * 3  # fmt: skip


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert ckpt.latest_checkpoint(tmp_path / "never") == (None, [])
    (tmp_path / "step-1").mkdir()
    newest, skipped = ckpt.latest_checkpoint(tmp_path)
    assert newest is None and len(skipped) == 1


def test_old_ones_go_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9, 11):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 4)
    ckpt.save_checkpoint(tmp_path, 4, tensors(7.0), {"step": 4, "again": True})
    assert ckpt.load_state(tmp_path / "step-4")["again"] is True
    assert ckpt.load_tensors(tmp_path / "step-4", "trainable")["a"][0, 0] == 7.0
    assert ckpt.problem_with(tmp_path / "step-4") is None


@pytest.mark.parametrize("failing", ["trainable", "optimizer", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 4)
    before = {p: p.read_bytes() for p in (tmp_path / "step-4").iterdir()}
    full = OSError(28, "No space left on device")
    if failing == "rename":
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(full))
    else:
        whole = ckpt.save_file

        def half(named: dict, path: Path) -> None:
            if path.stem == failing:
                path.write_bytes(b"half")
                raise full
            whole(named, path)

        monkeypatch.setattr(ckpt, "save_file", half)
    with pytest.raises(DiskError, match="No space left") as caught:
        save(tmp_path, 5)
    assert "bytes free" in str(caught.value) and caught.value.exit_code == 74
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in (tmp_path / "step-4").iterdir()} == before
    assert ckpt.latest_checkpoint(tmp_path) == (tmp_path / "step-4", [])
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]


# --- what goes in -------------------------------------------------------------------------------


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False).fill_(0.5)
    return model


def test_trainable_tensors_are_put_back_and_only_they(tmp_path: Path) -> None:
    source, target = small_model(0), small_model(1)
    named = ckpt.trainable_tensors(source)
    assert sorted(named) == ["0.weight", "2.bias", "2.weight"]
    frozen = target[0].bias.fill_(0.25).clone()
    assert not torch.equal(source[0].weight, target[0].weight)
    ckpt.load_trainable(target, named, tmp_path)
    assert ckpt.tensors_sha256(ckpt.trainable_tensors(target)) == ckpt.tensors_sha256(named)
    assert torch.equal(target[0].bias, frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.pop("2.bias"), r"1 missing \['2.bias'\], 0 unexpected"),
        (lambda n: n.update(other=torch.zeros(1)), r"0 missing \[\], 1 unexpected \['other'\]"),
        (lambda n: n.update({"2.bias": torch.zeros(3)}), r"1 of another shape \['2.bias'\]"),
        (lambda n: n.clear(), "3 missing"),
    ],
)
def test_trainable_tensors_are_taken_strictly(tmp_path: Path, change, message: str) -> None:
    model = small_model()
    before = ckpt.tensors_sha256(dict(model.named_parameters()))
    named = {k: v + 1 for k, v in ckpt.trainable_tensors(model).items()}
    change(named)
    with pytest.raises(InputError, match=message):
        ckpt.load_trainable(model, named, tmp_path)
    assert ckpt.tensors_sha256(dict(model.named_parameters())) == before  # nothing half-loaded


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        loss = model(torch.randn(5, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def make(seed: int = 0) -> tuple:
    model = small_model(seed)
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.1},
        {"params": [model[2].weight, model[2].bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), amsgrad=True)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    straight = make()
    train(*straight, 4)
    model, optimizer, schedule = straight
    named, plain = ckpt.optimizer_tensors(optimizer)
    assert {k.split(".")[1] for k in named} == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    saved = ckpt.save_checkpoint(
        tmp_path, 4, {"trainable": ckpt.trainable_tensors(model), "optimizer": named},
        {"optimizer": plain, "schedule": schedule.state_dict()},
    )  # fmt: skip
    again = make(seed=9)
    state = ckpt.load_state(saved)
    ckpt.load_trainable(again[0], ckpt.load_tensors(saved, "trainable"), saved)
    ckpt.load_optimizer(again[1], ckpt.load_tensors(saved, "optimizer"), state["optimizer"])
    again[2].load_state_dict(state["schedule"])
    restored, own = again[1].state_dict(), optimizer.state_dict()
    assert [g["lr"] for g in restored["param_groups"]] == [g["lr"] for g in own["param_groups"]]
    for index, slots in own["state"].items():
        for name, value in slots.items():
            assert torch.equal(restored["state"][index][name], value), (index, name)
    train(*straight, 5)
    train(*again, 5)
    hashes = [
        ckpt.tensors_sha256({k: v for k, v in m.named_parameters() if v.requires_grad})
        for m in (straight[0], again[0])
    ]
    assert hashes[0] == hashes[1]
    forgot = make(seed=9)  # and it matters: without the state the weights differ
    ckpt.load_trainable(forgot[0], ckpt.load_tensors(saved, "trainable"), saved)
    train(*forgot, 5)
    assert ckpt.tensors_sha256(ckpt.trainable_tensors(forgot[0])) != hashes[0]


def draws() -> tuple:
    return (
        torch.rand(3).tolist(), torch.randn(3).tolist(), torch.randperm(9).tolist(),
        np.random.rand(3).tolist(), np.random.randn(3).tolist(),  # noqa: NPY002
        [random.random() for _ in range(3)], [random.gauss(0, 1) for _ in range(3)],
    )  # fmt: skip


def test_every_generator_goes_on_where_it_stood(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)
    np.random.randn()  # noqa: NPY002 - leaves half a pair in its cache
    random.gauss(0, 1)  # and so does this
    named, plain = ckpt.rng_state()
    saved = ckpt.save_checkpoint(tmp_path, 1, {"rng": named}, {"rng": plain})
    expected = draws()
    assert draws() != expected
    ckpt.load_rng(ckpt.load_tensors(saved, "rng"), ckpt.load_state(saved)["rng"])
    assert draws() == expected


def test_equal_weights_means_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.arange(6.0), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.arange(6.0)}
    assert ckpt.tensors_sha256(base) == ckpt.tensors_sha256(same)
    assert len(ckpt.tensors_sha256(base)) == 64
    others = [
        {"a": torch.arange(6.0)},
        base | {"c": torch.zeros(0)},
        base | {"a": torch.arange(6.0).reshape(2, 3)},
        base | {"a": torch.arange(6.0).half()},
        base | {"a": torch.arange(6.0) + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
        {"A": torch.arange(6.0), "b": torch.ones(2)},
        base | {"b": torch.tensor([1.0, -1.0])},
    ]
    assert len({ckpt.tensors_sha256(t) for t in [base, *others]}) == 8
    strided = torch.arange(6.0).reshape(2, 3).T
    assert ckpt.tensors_sha256({"a": strided}) == ckpt.tensors_sha256({"a": strided.contiguous()})
    for value in (torch.tensor(1.5), torch.zeros(0, 3), torch.ones(3, dtype=torch.bfloat16)):
        assert len(ckpt.tensors_sha256({"a": value})) == 64
