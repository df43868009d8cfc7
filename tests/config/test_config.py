"""Profiles are strict, errors name the nearest, and every value survives a round trip."""

import ast
import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest
import yaml

from spavl_lib import config as module
from spavl_lib.config import (
    PROFILES,
    Config,
    DPOConfig,
    from_dict,
    load_config,
    profile_names,
)
from spavl_lib.errors import InputError

SHIPPED = ["colab", "demo", "full", "laptop", "laptop-hub", "smoke"]


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def sections() -> list[type]:
    found = [c for _, c in inspect.getmembers(module, dataclasses.is_dataclass)]
    reached, todo = set(), [Config]
    while todo:
        reached.add(cls := todo.pop())
        todo += [c for c in typing.get_type_hints(cls).values() if dataclasses.is_dataclass(c)]
        todo += [base for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    assert set(found) == reached
    return found


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile of one's own: smoke's text, to be changed."""
    path = tmp_path / "mine.yaml"
    path.write_text((PROFILES / "smoke.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return path


# --- profiles -----------------------------------------------------------------------------------


def test_every_shipped_profile_loads() -> None:
    files = [p for p in PROFILES.rglob("*.yaml") if p.parent.name != "accelerate"]
    assert sorted(p.stem for p in files) == profile_names() == SHIPPED
    for name in SHIPPED:
        config = load_config(name)
        assert (config.profile, config.run_name) == (name, name)


def test_smoke_and_demo_need_no_network_and_colab_fits_a_small_gpu() -> None:
    for name in ("smoke", "demo"):
        config = load_config(name)
        assert (config.model.name, config.data.source) == ("embedded", "mini")
    colab = load_config("colab")
    assert colab.model.adapter == "qlora"
    assert colab.model.gradient_checkpointing


@pytest.mark.parametrize("name", SHIPPED)
def test_resolved_config_reads_back_equal(name: str) -> None:
    config = load_config(name, {"dpo.beta": 0.25}, seed=3, run_name="r")
    assert from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("name", SHIPPED)
def test_every_value_can_be_set_as_text(name: str) -> None:
    config = load_config(name, run_name="r", seed=2)
    texts = {
        key: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in leaves(config.to_dict()).items()
    }
    assert load_config(name, texts) == config


def test_scale_has_no_default(profile: Path) -> None:
    page = yaml.safe_load(profile.read_text(encoding="utf-8"))
    for section, field in [
        ("data", "source"), ("data", "train_rows"), ("model", "name"), ("model", "adapter"),
        ("dpo", "max_steps"), ("dpo", "per_device_batch_size"), ("generation", "batch_size"),
    ]:  # fmt: skip
        less = {**page, section: {k: v for k, v in page[section].items() if k != field}}
        profile.write_text(yaml.safe_dump(less), encoding="utf-8")
        with pytest.raises(InputError, match=rf"missing {section}\.{field}"):
            load_config(str(profile))


def test_a_file_of_ones_own_is_a_profile(profile: Path) -> None:
    config = load_config(str(profile), {"dpo.max_steps": "9"})
    assert (config.profile, config.run_name, config.dpo.max_steps) == ("mine", "mine", 9)


def test_a_profile_holds_only_what_differs_from_its_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: demo\nseed: 4\ndpo: {beta: 0.3}\nscaling: {sizes: [7]}\n"
        "evaluation: {judge: phrases}\n",
        encoding="utf-8",
    )
    demo, mine = load_config("demo"), load_config(str(path), {"ppo.max_steps": 5})
    changes = {"dpo.beta": 0.3, "scaling.sizes": [7], "evaluation.judge": "phrases"}
    assert mine == dataclasses.replace(
        load_config("demo", changes | {"ppo.max_steps": 5}, seed=4), profile="mine", run_name="mine"
    )
    assert mine.scaling.sizes == (7,) and mine.dpo.learning_rate == demo.dpo.learning_rate
    (tmp_path / "folder").mkdir()
    third = tmp_path / "folder/third.yaml"
    third.write_text("base: ../mine.yaml\ndpo: {max_steps: 9}\n", encoding="utf-8")
    config = load_config(str(third))
    assert (config.profile, config.dpo.beta, config.dpo.max_steps) == ("third", 0.3, 9)
    assert load_config(str(third), {"dpo.preset": "original"}).dpo.beta == 0.1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("base: demmo", "mine.yaml: base: unknown profile 'demmo'; did you mean 'demo'"),
        ("base: gone.yaml", "mine.yaml: base: unknown profile 'gone.yaml'"),
        ("base: 3", "mine.yaml: base must name a profile or a YAML file, got 3"),
        ("base:", "mine.yaml: base must name a profile or a YAML file, got None"),
        ("base: mine.yaml", "build on each other: mine.yaml -> mine.yaml"),
        ("base: other.yaml", "build on each other: mine.yaml -> other.yaml -> mine.yaml"),
        ("base: demo\nbase: smoke", "'base' stands twice"),
        ("base: demo\ndpo: 3", "dpo must be a mapping, got 3"),
        ("base: demo\ndop: {beta: 1}", "unknown key 'dop.beta'; did you mean 'dpo.beta'"),
    ],
)
def test_a_bad_base_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "other.yaml").write_text("base: mine.yaml", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        load_config(str(tmp_path / "mine.yaml"))
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        ({"dpo": {"beta": 1}, "dpo.beta": 2}, {}, "dpo.beta is given twice"),
        ({"dpo.beta": 2, "dpo": {"beta": 2}}, {}, "dpo.beta is given twice"),
        ({"seed": 3}, {"seed": 4}, "seed is given twice: 4, and 3"),
        ({"run_name": "a"}, {"run_name": "b"}, "run_name is given twice"),
        ({3: 4}, {}, "key 3 must be text"),
        ("{'dpo.beta': 1}", {}, "overrides must be a mapping"),
        ([("dpo.beta", 1)], {}, "overrides must be a mapping"),
    ],
)
def test_overrides_say_one_thing_once(overrides: object, options: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_config("smoke", overrides, **options)
    assert load_config("smoke", {"seed": "4"}, seed=4).seed == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss_type": "robust", "loss_weights": "1"}, "robust need label_smoothing above 0"),
        ({"loss_type": "exo_pair,sft"}, "exo_pair need label_smoothing above 0"),
        ({"label_smoothing": 0.1}, r"no effect on \['sigmoid', 'sft'\]"),
        ({"label_smoothing": 0.5}, "label_smoothing must be less than 0.5"),
        ({"loss_type": "aot,sft", "gradient_accumulation_steps": 2}, "aot rank the pairs of one"),
    ],
)
def test_a_loss_gets_what_it_needs(changes: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_config("smoke", {f"dpo.{k}": v for k, v in changes.items()})


def test_a_warm_up_is_whole_steps_or_a_share() -> None:
    for good in (0, 0.03, 1, 10):
        assert load_config("smoke", {"reward.warmup_steps": good}).reward.warmup_steps == good
    with pytest.raises(InputError, match="reward: warmup_steps = 1.5 must be a whole number"):
        load_config("smoke", {"reward.warmup_steps": 1.5})


@pytest.mark.parametrize(
    "page",
    ["- a list", "dpo: {beta: [unclosed", "dpo: 3", "dpo:\n", "data:\n  source: mini\n  extra: 1"],
    ids=["list", "syntax", "number", "empty", "key"],
)
def test_bad_profile_file_is_an_input_error(profile: Path, page: str) -> None:
    profile.write_text(page, encoding="utf-8")
    with pytest.raises(InputError):
        load_config(str(profile))
    with pytest.raises(InputError):
        load_config(str(profile), {"dpo.beta": "0.2"})


def test_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown profile 'smok'; did you mean 'smoke'"):
        load_config("smok")
    with pytest.raises(InputError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


# --- keys and values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("dpo.betta", "dpo.beta"),
        ("beta", "dpo.beta"),
        ("dop.beta", "dpo.beta"),
        ("data.train_row", "data.train_rows"),
        ("sed", "seed"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"unknown key '{key}'; did you mean '{nearest}'"):
        load_config("smoke", {key: "1"})


def test_unknown_key_in_a_file_names_file_and_nearest(profile: Path) -> None:
    text = profile.read_text(encoding="utf-8").replace("max_steps", "max_stepps")
    profile.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        load_config(str(profile))
    heading, missing, *unknown = str(refused.value).splitlines()
    assert heading == f"{profile}: 6 problems"
    for number, kind in enumerate(("reward", "dpo", "ppo", "rloo", "grpo")):
        assert f"{kind}.max_steps" in missing or kind == "grpo"  # whose max_steps has a default
        start = f"  unknown key '{kind}.max_stepps'; did you mean '{kind}.max_steps'?"
        assert unknown[number].startswith(start)


def test_all_faults_are_listed_at_once(profile: Path) -> None:
    text = profile.read_text(encoding="utf-8").replace("lora_rank: 8", "lora_rank: many")
    profile.write_text(text, encoding="utf-8")
    overrides = {
        "dpo.beta": "0", "dpo.betta": 1, "data.train_rows": -3, "model.adapter": "lorra",
        "ppo.num_minibatches": 9, "launch.num_machines": 2, "reward.mirror": "yes", "seed": -1,
    }  # fmt: skip
    with pytest.raises(InputError) as refused:
        load_config(str(profile), overrides)
    assert str(refused.value).splitlines() == [
        f"{profile} with overrides: 10 problems",
        "  data.train_rows must be greater than or equal to 0, got -3",
        "  model.adapter must be 'full', 'lora', 'qlora' or 'frozen', got 'lorra'; "
        "did you mean 'lora'?",
        "  model.lora_rank must be a valid integer, got 'many'",
        "  reward.mirror: expected true or false, got 'yes'",
        "  dpo.beta must be greater than 0, got '0'",
        "  unknown key 'dpo.betta'; did you mean 'dpo.beta'?",
        "  ppo: num_minibatches = 9 for a rollout of 8 prompts: some would be empty",
        "  launch: num_processes = 1 must be a multiple of num_machines = 2",
        "  launch: num_machines = 2 needs main_port, a port that all machines know",
        "  seed must be greater than or equal to 0, got -1",
    ]


def test_a_section_made_in_code_is_checked_alike() -> None:
    config = load_config("smoke")
    for change in (
        lambda: dataclasses.replace(config.dpo, beta=0, max_steps="many"),
        lambda: DPOConfig(per_device_batch_size=1, beta=0, max_steps="many"),
    ):
        with pytest.raises(InputError) as refused:
            change()
        assert str(refused.value).splitlines()[1:] == [
            "  dpo.max_steps must be a valid integer, got 'many'",
            "  dpo.beta must be greater than 0, got 0",
        ]
        assert refused.value.__suppress_context__  # pydantic's error is not shown above ours
    with pytest.raises(InputError, match="unknown key 'dpo.betta'; did you mean 'dpo.beta'"):
        dataclasses.replace(config.dpo, betta=1)
    with pytest.raises(InputError, match="dpo must be a mapping, got 3"):
        dataclasses.replace(config, dpo=3)
    assert dataclasses.replace(config.dpo, max_steps=4.0).max_steps == 4


def test_numbers_and_booleans_are_not_mixed() -> None:
    for key, value in [
        ("seed", True), ("dpo.beta", False), ("dpo.loss_weights", [1, True]),
        ("scaling.sizes", (True,)), ("model.train_projector", 1), ("model.train_projector", "on"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=f"{key}: expected"):
            load_config("smoke", {key: value})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\ndpo: {beta: 0.2}\n", "'dpo' stands twice"),
        ("\nevaluation: {judge: exact, judge: exact}\n", "'judge' stands twice"),
        ("\n1: 2\n", "'1' must be text"),
    ],
)
def test_a_key_stands_once_in_a_profile_and_is_text(profile: Path, text: str, reason: str) -> None:
    profile.write_text(profile.read_text(encoding="utf-8") + text, encoding="utf-8")
    with pytest.raises(InputError, match=f"mine.yaml: .*{reason}"):
        load_config(str(profile))


def test_sections_may_share_values_by_an_anchor(profile: Path) -> None:
    page = yaml.safe_load(profile.read_text(encoding="utf-8"))
    page["dpo"] = page["reward"]  # written as an anchor and an alias
    profile.write_text(yaml.safe_dump(page), encoding="utf-8")
    assert "&id" in profile.read_text(encoding="utf-8")
    config = load_config(str(profile), {"dpo.max_steps": 5})
    assert (config.reward.max_steps, config.dpo.max_steps) == (6, 5)


def test_a_nested_override_leaves_the_other_keys_of_its_section_alone() -> None:
    nested = load_config("smoke", {"model": {"lora_rank": 4}, "dpo": {"preset": "original"}})
    dotted = load_config("smoke", {"model.lora_rank": 4, "dpo.preset": "original"})
    assert nested == dotted
    assert (nested.model.lora_rank, nested.model.lora_alpha) == (4, 16)
    assert nested.dpo.loss_type == ("sigmoid",)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("dpo.beta", "1e-5x"),
        ("dpo.beta", "nan"),
        ("dpo.beta", "inf"),
        ("dpo.beta", "0"),
        ("dpo.beta", "-0.1"),
        ("dpo.beta", ""),
        ("dpo.beta", None),
        ("dpo.beta", [0.1]),
        ("dpo.beta", True),
        ("dpo.max_steps", "1.5"),
        ("dpo.max_steps", 1.5),
        ("dpo.max_steps", "-1"),
        ("dpo.max_steps", True),
        ("dpo.per_device_batch_size", "0"),
        ("dpo.loss_weights", "1,x"),
        ("dpo.loss_weights", "1"),
        ("model.adapter", "qlorra"),
        ("model.lora_rank", "0"),
        ("model.name", 3),
        ("model.train_projector", "yes"),
        ("model.train_projector", "1"),
        ("dpo", "3"),
        ("data.source.path", "x"),
    ],
)
def test_bad_value_is_refused_by_name(key: str, text: object) -> None:
    with pytest.raises(InputError, match=key.split(".")[-1]):
        load_config("smoke", {key: text})


def test_a_section_and_its_key_cannot_both_be_set() -> None:
    with pytest.raises(InputError, match="dpo must be a mapping, got '3'"):
        load_config("smoke", {"dpo": "3", "dpo.beta": "1"})


def test_text_is_parsed_by_the_fields_type() -> None:
    config = load_config(
        "smoke",
        {
            "dpo.beta": "2e-1",
            "dpo.max_steps": "7",
            "dpo.loss_type": "[sigmoid, sft]",
            "dpo.loss_weights": "1, 0.5",
            "model.train_projector": "False",
            "model.name": "123",
        },
    )
    assert config.dpo.beta == 0.2
    assert config.dpo.max_steps == 7
    assert config.dpo.loss_type == ("sigmoid", "sft")
    assert config.dpo.loss_weights == (1.0, 0.5)
    assert config.model.train_projector is False
    assert config.model.name == "123"


def test_configs_are_frozen_and_leave_the_callers_overrides_alone() -> None:
    overrides = {"dpo.beta": "0.2"}
    config = load_config("smoke", overrides, seed=1, run_name="x")
    assert overrides == {"dpo.beta": "0.2"}
    assert (config.seed, config.run_name) == (1, "x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dpo.beta = 1.0
    assert load_config("smoke").dpo.beta != 0.2


def test_global_batch_is_derived() -> None:
    overrides = {"dpo.per_device_batch_size": 3, "dpo.gradient_accumulation_steps": 4}
    assert load_config("smoke", overrides).dpo.global_batch_size == 12


# --- presets and documentation ------------------------------------------------------------------


def test_the_original_preset_is_the_originals_and_yields_to_an_explicit_value() -> None:
    ours = load_config("smoke")
    original = load_config("smoke", {"dpo.preset": "original"})
    assert original.dpo.loss_type == ("sigmoid",) != ours.dpo.loss_type
    assert original.dpo.learning_rate == 2e-5
    assert load_config("demo", {"dpo.preset": "original"}).dpo.learning_rate == 1e-6
    assert original.dpo.max_steps == ours.dpo.max_steps
    explicit = load_config("smoke", {"dpo.preset": "original", "dpo.beta": 0.3})
    assert (explicit.dpo.beta, explicit.dpo.loss_weights) == (0.3, (1.0,))


@pytest.mark.parametrize("cls", sections(), ids=lambda c: c.__name__)
def test_every_field_has_a_sentence_under_it(cls: type) -> None:
    hints = typing.get_type_hints(cls)
    body = ast.parse(inspect.getsource(cls)).body[0].body
    for line, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(line, ast.AnnAssign) or dataclasses.is_dataclass(hints[line.target.id]):
            continue  # a section says it in its class
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        assert is_text, f"{cls.__name__}.{line.target.id} has no sentence"
        assert after.value.value.rstrip().endswith(".")


# Read by name in another way than `.field`.
READ_ELSEWHERE = {
    "preset": "config.loading reads it as `SECTION.preset` before the sections are built",
}


def test_every_setting_is_read_by_some_code() -> None:
    """A field that nobody reads promises what nothing does."""
    library = Path(module.__file__).parents[1]
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for path in library.rglob("*.py")
        if path.parent != Path(module.__file__).parent
    )
    read = set(re.findall(r"\.([a-z_0-9]+)\b(?!\()", code))
    read |= set(re.findall(r"getattr\(\w+, \"([a-z_0-9]+)\"", code))
    fields = {f.name for cls in sections() if cls is not Config for f in dataclasses.fields(cls)}
    assert fields - read - READ_ELSEWHERE.keys() == set()
    assert "no_such_field" not in read and len(fields) > 100


def test_another_source_leaves_the_profiles_own_settings_behind(tmp_path: Path) -> None:
    """The demo distorts images of mini. Rows of one's own must not stumble over that."""
    assert load_config("demo").data.uncertain_share > 0
    own = {"data.source": "datasets", "data.path": "rows.jsonl"}
    assert load_config("demo", own).data.uncertain_share == 0
    page = tmp_path / "mine.yaml"
    page.write_text("base: demo\ndata: {source: datasets, path: rows.jsonl}\n", encoding="utf-8")
    assert load_config(str(page)).data == load_config("demo", own).data
    with pytest.raises(InputError, match="uncertain_share is set, but source = 'datasets'"):
        load_config("demo", own | {"data.uncertain_share": 0.5})
    assert load_config("demo", {"data.source": "mini"}).data.uncertain_share > 0
