"""RLOO and GRPO: trl's trainers over our rewards, our prompts and our checkpoints."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from spavl_lib.config import Config
from spavl_lib.data.images import decode
from spavl_lib.data.load import load_pair_truth, load_preferences
from spavl_lib.data.templates import encode_prompts, render
from spavl_lib.errors import InputError, NonFiniteError, Preempted
from spavl_lib.evaluation.judges import ExactJudge
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import load_policy
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.stages import find, policies
from spavl_lib.trainers import group
from spavl_lib.trainers.grpo import GRPO, train_grpo
from spavl_lib.trainers.inputs import policy_inputs
from spavl_lib.trainers.progress import StageCallback
from spavl_lib.trainers.rewards import check_rewards, load_rule
from spavl_lib.trainers.rloo import RLOO, train_rloo
from spavl_lib.trainers.rollout import batch_of, encode_rows
from tests.helpers import embedded_processor, metric_rows, mini_rows, smoke, spread, tiny

pytestmark = pytest.mark.filterwarnings("ignore")


METHODS = {"rloo": (RLOO, train_rloo), "grpo": (GRPO, train_grpo)}
both = pytest.mark.parametrize("method", METHODS)


def settings(
    adapter: str, folder: Path | str, method: str = "rloo", *, more: dict | None = None, **changes
) -> Config:
    """Two epochs of two steps, each two batches: every boundary a resume can fall on."""
    section = {
        "max_steps": 4, "per_device_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 2, "max_new_tokens": 12, "save_steps": 2, "warmup_steps": 0,
        "reward_model": str(folder), "temperature": 2.0,
    }  # fmt: skip
    named = {f"{method}.{key}": value for key, value in (section | changes).items()}
    return smoke(
        {"model.adapter": adapter, "data.train_rows": 8} | named | (more or {}), run_name="r"
    )


def train(config: Config, root: Path, method: str = "rloo") -> tuple[Stage, dict]:
    stage = Run(config, root=root).stage(method)
    return stage, METHODS[method][1](config, stage)


def trainer_of(config: Config, root: Path, method: str = "rloo", rows=None):
    stage = Run(config, root=root).stage(method)
    stage.path.mkdir(parents=True)
    rows = mini_rows().select(range(8)) if rows is None else rows
    return group.build_trainer(METHODS[method][0], config, stage, embedded_processor(), rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "adapter"), [("rloo", "lora"), ("rloo", "full"), ("grpo", "lora"), ("grpo", "full")]
)
def test_a_stopped_run_goes_on_to_the_same_end(
    method: str,
    adapter: str,
    reward_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(adapter, reward_folders[adapter], method)
    straight, expected = train(config, tmp_path / "straight", method)
    assert expected["steps"] == 4 and expected["answers"] == 32
    assert "tower" not in expected["trainable_parameters"]
    lines = metric_rows(straight)
    assert [r["step"] for r in lines] == [1, 2, 3, 4]
    assert abs(lines[0]["kl"]) < 1e-4 < abs(lines[-1]["kl"]) + 1e-3
    assert all(len(r["row_ids"]) == 4 for r in lines)
    first_epoch = {i for r in lines[:2] for i in r["row_ids"]}
    assert len(first_epoch) == 8, "an epoch asks every prompt once"

    old = StageCallback.on_step_end

    for at in (1, 3):  # in the first epoch, and in the second

        def stop(self: object, args: object, state: object, *rest: object, **more: object):  # noqa: ANN202
            if state.global_step == at:  # noqa: B023
                self.flag.reason = "SIGTERM"
            return old(self, args, state, *rest, **more)

        monkeypatch.setattr(StageCallback, "on_step_end", stop)
        with pytest.raises(Preempted):
            train(config, tmp_path / f"stopped{at}", method)
        monkeypatch.setattr(StageCallback, "on_step_end", old)
        stage, summary = train(config, tmp_path / f"stopped{at}", method)
        assert metric_rows(stage) == lines
        assert summary["weights_sha256"] == expected["weights_sha256"]
        answers = [(straight.path / "rollouts.jsonl").read_bytes()]
        assert answers == [(stage.path / "rollouts.jsonl").read_bytes()]

    records = read_jsonl(straight.path / "rollouts.jsonl")
    assert len(records) == 32 and {r["step"] for r in records} == {1, 2, 3, 4}
    assert method in policies()  # inference and evaluation take it
    model = load_policy(config.model, straight.path / "model")
    names = [n for n, _ in model.named_parameters()]
    assert not any(".reward." in n for n in names), "the reward model is not part of the policy"
    assert (straight.path / "model/README.md").is_file()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_reward_is_the_reward_models_score(
    adapter: str, reward_folders: dict[str, Path], tmp_path: Path
) -> None:
    """On the policy's base or on its own: what `load_reward_model` says of the same ids."""
    folder, processor = reward_folders[adapter], embedded_processor()
    config = settings(adapter, folder, per_device_batch_size=2)
    trainer = trainer_of(config, tmp_path)
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}

    eos = processor.tokenizer.eos_token_id
    rows = spread(mini_rows(), 3)
    chosen = [rows[i] for i in (0, 0, 1, 2)]
    answers = [[40, 41, 42, eos], [50, 51], [60, eos], [44, 45, 46, 47, 48, 49]]
    got = trainer.reward_funcs[0](
        prompts=[None] * 4, completions=[None] * 4, completion_ids=answers,
        id=[r["id"] for r in chosen], question=[r["prompt"] for r in chosen],
        image=[decode(r["image"]) for r in chosen],
    )  # fmt: skip

    model = load_reward_model(config.model, folder)
    expected = []
    for row, answer in zip(chosen, answers, strict=True):
        batch = batch_of(encode_rows(processor, [row]), [answer], 3, torch.device("cpu"))
        with torch.no_grad():
            penalty = 0.0 if answer[-1] == eos else config.rloo.missing_eos_penalty
            expected.append(model(**batch).item() - penalty)
    assert got == pytest.approx(expected, abs=5e-5)
    assert max(expected) - min(expected) > 0.01
    assert trainable == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


@both
def test_the_policy_sees_our_prompt_ids(
    method: str, reward_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Also where a question reads like an image slot; and what trl lays out is those ids."""
    processor = embedded_processor()
    rows = mini_rows().select(range(8)).to_list()
    rows[0]["prompt"] += " <image>"
    rows = type(mini_rows()).from_list(rows, features=mini_rows().features)
    config = settings("lora", reward_folders["lora"], method)
    trainer = trainer_of(config, tmp_path, method, rows)
    seen = {}

    def generate(ids: list, images: list, fields: dict, *_: object) -> list | tuple:
        seen["ids"], seen["pixels"] = ids, fields["pixel_values"]
        answers = [[40, processor.tokenizer.eos_token_id]] * len(ids)
        return answers if method == "rloo" else (answers, None)

    trainer._generate_single_turn = generate
    inputs = [trainer.train_dataset[i // 2] for i in range(8)]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs)
    ours = encode_rows(processor, [rows[i // 2] for i in range(8)])
    assert seen["ids"] == [p.ids for p in ours]
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    kept = [i[m.bool()].tolist() for i, m in pairs]
    assert kept == [p.ids for p in ours]
    pixels = torch.cat([p.vision["pixel_values"] for p in ours])
    assert torch.equal(seen["pixels"], pixels)
    assert torch.equal(batch["pixel_values"], pixels)


def test_a_template_without_bos_is_noticed() -> None:
    _, processor = tiny("llava")
    image = decode(mini_rows()[0]["image"])
    ours = encode_prompts(processor, ["What?"], [image]).ids
    text = render(processor, "What?")
    theirs = processor(images=[image], text=[text], add_special_tokens=False)["input_ids"]
    assert ours[0] != theirs[0]
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        group.compare_prompts(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group.compare_prompts(ours, ours)


def test_bad_input(reward_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spavl train reward --profile smoke"):
        train(settings("lora", ""), tmp_path)
    other = tmp_path / "other"
    shutil.copytree(reward_folders["lora"], other)
    text = (other / "reward_config.json").read_text()
    (other / "reward_config.json").write_text(text.replace("embedded", "org/other"))
    with pytest.raises(InputError, match="'org/other'.*same base"):
        train(settings("lora", other), tmp_path)
    with pytest.raises(InputError, match="a whole model, but model.adapter is 'lora'"):
        train(settings("lora", reward_folders["full"]), tmp_path)
    (other / "score_head.safetensors").unlink()
    with pytest.raises(InputError, match="score_head.safetensors is missing"):
        train(settings("lora", other), tmp_path)
    with pytest.raises(InputError, match="use_vllm needs a CUDA GPU"):
        train(settings("lora", reward_folders["lora"], use_vllm=True), tmp_path)
    with pytest.raises(InputError, match="8 training rows, but a step takes 16"):
        changes = {"per_device_batch_size": 16}
        train(settings("lora", reward_folders["lora"], **changes), tmp_path)
    with pytest.raises(InputError, match="must be a multiple of num_generations = 3"):
        settings("lora", "", num_generations=3)
    with pytest.raises(InputError, match="leave no room for 2000 new tokens.*rloo.max_new_tokens"):
        train(settings("lora", reward_folders["lora"], max_new_tokens=2000), tmp_path)


RULES = """
def polite(completions, question, **_):
    assert all(isinstance(q, str) for q in question)
    return [float("sorry" in answer[0]["content"].lower()) for answer in completions]

def short(completion_ids, **_):
    return [-0.01 * len(tokens) for tokens in completion_ids]

def broken(id, **_):
    if "ROW" in id:
        raise KeyError("colour")
    return list(range(len(id)))

def nan(id, **_):
    return [float("nan") if i == "ROW" else number for number, i in enumerate(id)]

def few(id, **_):
    return [0.5]

def words(id, **_):
    return ["good"] * len(id)
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.py"
    path.write_text(RULES.replace("ROW", drawn_row()))
    return path


def drawn_row() -> str:
    """Id of a row on which `settings` trains."""
    config = settings("lora", "", rewards=["length"])
    return load_preferences(config.data, "train")["id"][5]


@both
def test_rewards_add_up_and_each_is_logged(
    method: str, reward_folders: dict[str, Path], tmp_path: Path, rules: Path
) -> None:
    names = ["model", "judge", "length", f"{rules}:polite", f"{rules}:short"]
    weights = [1.0, 2.0, 0.5, 0.25, 3.0]
    config = settings(
        "lora", reward_folders["lora"], method, rewards=names, reward_weights=weights, max_steps=2
    )
    stage, summary = train(config, tmp_path / "runs", method)
    short = ["model", "judge", "length", "polite", "short"]
    assert list(summary["rewards"]) == short
    records = read_jsonl(stage.path / "rollouts.jsonl")
    truth = load_pair_truth(config.data)
    for r in records:
        each = r["rewards"]
        assert r["reward"] == pytest.approx(
            sum(w * each[n] for n, w in zip(short, weights, strict=True)), abs=1e-4
        )
        assert each["length"] == pytest.approx(-r["num_tokens"] / 12, abs=1e-5)
        assert each["short"] == pytest.approx(-0.01 * r["num_tokens"], abs=1e-5)
        assert each["polite"] == float("sorry" in r["response"].lower())
        verdict = ExactJudge(truth)(r)
        good = not verdict.harmful if truth[r["id"]]["harmful"] else verdict.score == 1
        assert each["judge"] == float(good and bool(r["response"]))
    assert len({r["rewards"]["model"] for r in records}) > len(records) // 2
    for step, row in enumerate(metric_rows(stage), 1):
        here = [r for r in records if r["step"] == step]
        for name in short:
            mean = sum(r["rewards"][name] for r in here) / len(here)
            assert row[f"rewards/{name}/mean"] == pytest.approx(mean, abs=1e-4)


@both
def test_without_the_reward_model_no_reward_stage_is_needed(
    method: str, tmp_path: Path, rules: Path
) -> None:
    config = settings("lora", "", method, rewards=[f"{rules}:short"], max_steps=1)
    stage, summary = train(config, tmp_path / "runs", method)
    assert summary["steps"] == 1 and "rewards" not in summary
    assert not stage.run.stage("reward").path.exists()
    assert find(method).builds_on(config) == ()
    changed = policy_inputs(config, stage)
    rules.write_text(rules.read_text() + "\n")
    assert policy_inputs(config, stage) != changed, "a changed rule is another input"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("broken", r"rules.py:broken raised KeyError: 'colour' \(row ROW\)"),
        ("few", "returned 1 values for 8 responses"),
        ("words", "returned 'good'; .* must return a finite number"),
    ],
)
def test_a_wrong_rule_names_the_row(rule: str, message: str, tmp_path: Path, rules: Path) -> None:
    config = settings("lora", "", rewards=[f"{rules}:{rule}"])
    with pytest.raises(InputError, match=message.replace("ROW", drawn_row())):
        train(config, tmp_path / "runs")


def test_a_reward_that_is_no_number_stops_the_run(tmp_path: Path, rules: Path) -> None:
    with pytest.raises(NonFiniteError, match=f"'nan' is not finite on rows {drawn_row()}"):
        train(settings("lora", "", rewards=[f"{rules}:nan"]), tmp_path / "runs")


def test_settings_of_rewards(tmp_path: Path, rules: Path) -> None:
    with pytest.raises(InputError, match="one weight per reward: there are 2"):
        settings("lora", "", rewards=["model", "length"])
    with pytest.raises(InputError, match="'politeness' is none of model, judge and length"):
        settings("lora", "", rewards=["politeness"])
    with pytest.raises(InputError, match="names length more than once"):
        settings("lora", "", rewards=["length", "length"], reward_weights=[1, 1])
    with pytest.raises(InputError, match="reward_model has no effect"):
        settings("lora", "somewhere", rewards=["length"])
    with pytest.raises(InputError, match="absent.py does not exist"):
        load_rule(f"{tmp_path}/absent.py:polite")
    with pytest.raises(InputError, match="has no function 'rude' .it has: polite, short"):
        load_rule(f"{rules}:rude")
    with pytest.raises(InputError, match="cannot import no_such_package for .*ModuleNotFoundError"):
        load_rule("no_such_package:polite")
    rules.write_text("def polite(:")
    with pytest.raises(InputError, match="cannot import .*SyntaxError"):
        load_rule(f"{rules}:polite")
    phrases = settings("lora", "", rewards=["judge"], more={"evaluation.judge": "phrases"})
    with pytest.raises(InputError, match="phrases does not; set evaluation.judge to exact"):
        check_rewards(phrases, Run(phrases, root=tmp_path).stage("rloo"))
    # The exact judge would meet a row without labels only in the middle of the training.
    more = {"data.extra_path": "extra.jsonl"}
    exact = settings("lora", "", rewards=["judge"], more=more)
    with pytest.raises(InputError, match=r"the pairs of data\.extra_path .* have none"):
        check_rewards(exact, Run(exact, root=tmp_path).stage("rloo"))


def test_empty_responses_stop_the_run(reward_folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = trainer_of(settings("lora", reward_folders["lora"]), tmp_path)
    rows = [trainer.train_dataset[0]] * 2
    with pytest.raises(InputError, match="every response is empty"):
        trainer._calculate_rewards(rows, [None] * 2, [None] * 2, [[1], [1]])
