"""The pipeline: `make`, `ensure` and `train` a stage, and the command that makes it."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib import pipeline, plotting
from spavl_lib.config import Config, load_config
from spavl_lib.distributed import launcher
from spavl_lib.errors import InputError, OutOfMemory, Preempted
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import AWAITED, Run, Stage
from spavl_lib.stages import all_stages, stage_names


def test_every_notebook_has_a_stage_and_every_stage_a_notebook() -> None:
    notebooks = {s.name: s.notebook for s in all_stages().values() if s.notebook}
    without = {"rloo", "grpo", "kto", "online_dpo"}  # these have no notebook of their own
    assert tuple(notebooks) == tuple(name for name in stage_names() if name not in without)
    assert pipeline.run_command("rloo", load_config("smoke")) == "spavl train rloo --profile smoke"
    assert list(notebooks.values()) == sorted(notebooks.values())


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stage makers that only finish their stage."""
    made: list[str] = []

    def maker_of(name: str) -> Callable:
        def make(config: object, stage: object, *, live: object = None) -> dict:
            made.append(name)
            with stage.work():
                stage.finish({"made": True})
            return {"made": True}

        return make

    monkeypatch.setattr(launcher, "maker_of", maker_of)
    monkeypatch.setattr(
        pipeline, "load_truth", lambda _: {"row": {}}
    )  # without a fetch from the Hub
    return made


def test_ensure_makes_what_is_missing_once(runs: Path, makers: list[str]) -> None:
    config = load_config("smoke")
    assert pipeline.ensure("dpo", config).summary == {"made": True}
    assert pipeline.ensure("dpo", config).done
    assert makers == ["dpo"]


def test_ensure_refuses_a_stage_of_other_settings(runs: Path, makers: list[str]) -> None:
    pipeline.ensure("dpo", load_config("smoke"))
    with pytest.raises(InputError, match="dpo.max_steps: 6 -> 7"):
        pipeline.ensure("dpo", load_config("smoke", {"dpo.max_steps": 7}))


def test_ensure_leaves_large_profiles_to_the_user_and_says_the_command(
    runs: Path, makers: list[str]
) -> None:
    overrides = {"dpo.beta": "0.2", "dpo.loss_type": "sigmoid", "dpo.loss_weights": "1"}
    config = load_config("colab", overrides, seed=3, run_name="a b")
    with pytest.raises(InputError) as caught:
        pipeline.ensure("dpo", config)
    assert makers == []
    words = shlex.split(str(caught.value).splitlines()[-1])
    assert words[:5] == ["spavl", "run", "dpo", "--profile", "colab"]
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    again = load_config(
        "colab",
        dict(text.split("=", 1) for text in sets),
        seed=int(words[words.index("--seed") + 1]),
        run_name=words[words.index("--run-name") + 1],
    )
    assert again == config


def test_ensure_makes_or_names_what_comes_before(runs: Path, makers: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        pipeline.ensure("evaluation", load_config("colab"))
    asked = [line.split()[2] for line in str(caught.value).splitlines()[1:]]
    assert asked == ["dpo", "inference", "evaluation"]
    pipeline.ensure("evaluation", load_config("smoke"))
    assert makers == ["dpo", "reward", "ppo", "inference", "evaluation"]


@pytest.mark.parametrize(
    "named, made",
    [((), ["reward", "practice"]), (("ppo",), ["reward", "practice"]),
     (("ppo", "rloo"), ["practice"])],
)  # fmt: skip
def test_a_named_reward_model_replaces_the_runs(
    runs: Path, makers: list[str], named: tuple[str, ...], made: list[str]
) -> None:
    changes = {f"{name}.reward_model": "/a/folder" for name in named}
    pipeline.make("practice", load_config("smoke", changes))
    assert makers == made
    with pytest.raises(InputError) as caught:
        pipeline.ensure("practice", load_config("colab", changes, run_name="other"))
    assert [line.split()[2] for line in str(caught.value).splitlines()[1:]] == made


def test_every_maker_and_trainer_is_there() -> None:
    for name in stage_names():
        assert maker_of(name).__wrapped__.__module__ == all_stages()[name].module


def test_the_command_names_the_file_of_ones_own_profile(
    tmp_path: Path, runs: Path, makers: list[str]
) -> None:
    path = tmp_path / "my profile.yaml"
    path.write_text("base: colab\ndpo: {beta: 0.3}\n", encoding="utf-8")
    config = load_config(str(path), {"dpo.max_steps": 9}, seed=2)
    with pytest.raises(InputError) as caught:
        pipeline.ensure("dpo", config)
    words = shlex.split(str(caught.value).splitlines()[-1])
    profile, setting, seed = (words[words.index(f"--{n}") + 1] for n in ("profile", "set", "seed"))
    assert Path(profile) == path and setting == "dpo.max_steps=9"
    assert load_config(profile, {"dpo.max_steps": "9"}, seed=int(seed)) == config
    unread = dataclasses.replace(config, profile="elsewhere", run_name="elsewhere")
    assert pipeline.run_command("dpo", unread) == (
        "spavl run dpo --profile elsewhere.yaml --seed 2"
    )


def test_plain_command_is_plain() -> None:
    command = pipeline.run_command("dpo", load_config("colab"))
    assert command == "spavl run dpo --profile colab"


def test_ensure_catches_a_maker_that_does_not_finish(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "maker_of", lambda name: lambda config, stage: {})
    with pytest.raises(RuntimeError, match="returned without summary.json"):
        pipeline.ensure("data", load_config("demo"))


def test_make_makes_its_own_stage_in_any_profile_but_not_what_comes_before(
    runs: Path, makers: list[str]
) -> None:
    config = load_config("colab")
    both = "spavl run dpo --profile colab\n  spavl run ppo --profile colab"
    with pytest.raises(InputError, match=both):
        pipeline.make("inference", config)
    with pytest.raises(InputError, match="spavl run reward --profile colab"):
        pipeline.make("ppo", config)
    pipeline.make("dpo", config)
    assert pipeline.make("inference", config).done
    assert len(makers) == 2
    assert [stage.name for stage in pipeline.ensure_before("inference", config)] == ["dpo"]


def test_the_laptop_makes_what_comes_before(runs: Path, makers: list[str]) -> None:
    config = load_config("laptop", {"data.extra_path": ""})
    assert pipeline.ensure("ppo", config).done
    assert makers == ["reward", "ppo"]


def test_inference_takes_whichever_model_is_trained(runs: Path, makers: list[str]) -> None:
    config = load_config("colab")
    pipeline.make("reward", config)
    pipeline.make("ppo", config)
    assert [stage.name for stage in pipeline.ensure_before("inference", config)] == ["ppo"]
    with pytest.raises(InputError) as caught:
        pipeline.ensure("evaluation", config)
    asked = [line.split()[2] for line in str(caught.value).splitlines()[1:]]
    assert asked == ["inference", "evaluation"]
    pipeline.make("dpo", config)
    assert [stage.name for stage in pipeline.ensure_before("inference", config)] == ["dpo", "ppo"]


def test_ensure_unknown_stage_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'inference'"):
        pipeline.ensure("inferense", load_config("smoke"))


def test_train_calls_the_trainer_here(runs: Path, makers: list[str]) -> None:
    config = load_config("smoke")
    stage = Run(config).stage("dpo")
    assert pipeline.train("dpo", config, stage) == {"made": True}
    assert stage.done


def test_a_live_plot_goes_when_a_training_is_complete_and_stays_when_it_is_stopped(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook's next cell draws the curves of a complete training from its log."""
    closed: list[bool] = []
    monkeypatch.setattr(plotting.LivePlot, "close", lambda _: closed.append(True))
    monkeypatch.setattr(launcher, "make", lambda *_, live: {"steps": 1})
    config = load_config("smoke")
    assert pipeline.train("dpo", config, Run(config).stage("dpo")) == {"steps": 1}
    assert closed == [True]

    def stop(*_: object, **__: object) -> None:
        raise Preempted("stopped")

    monkeypatch.setattr(launcher, "make", stop)
    with pytest.raises(Preempted):
        pipeline.train("dpo", config, Run(config).stage("dpo"))
    assert closed == [True]


def test_train_refuses_what_is_not_there(runs: Path, makers: list[str]) -> None:
    config = load_config("smoke")
    with pytest.raises(InputError, match="unknown trainer 'dop'; did you mean 'dpo'"):
        pipeline.train("dop", config, Run(config).stage("dpo"))
    assert makers == []


@pytest.mark.parametrize(
    "overrides", [{"launch.num_processes": 2}, {"launch.engine": "zero2"}], ids=str
)
def test_several_processes_or_deepspeed_train_in_children(
    overrides: dict, runs: Path, makers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def train(kind: str, config: Config, stage: Stage, *, live: object = None) -> str:
        started.append((kind, config.launch.num_processes, stage.path))
        return "theirs"

    monkeypatch.setattr(launcher, "train_in_processes", train)
    config = load_config("smoke", overrides)
    stage = Run(config).stage("dpo")
    assert pipeline.train("dpo", config, stage) == "theirs"
    assert started == [("dpo", config.launch.num_processes, stage.path)] and makers == []


def test_out_of_memory_says_what_the_planner_would_change(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def make(config: Config, stage: Stage) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")

    monkeypatch.setattr(launcher, "maker_of", lambda name: make)
    config = load_config("colab", {"model.adapter": "full"})
    monkeypatch.setattr(pipeline, "device_kind", lambda: "t4")
    with pytest.raises(OutOfMemory) as caught:
        pipeline.make("dpo", config)
    text = str(caught.value)
    assert "Tried to allocate 2 GiB." in text and "more words" not in text
    assert "the plan says" in text and "--set model.adapter=lora" in text


def test_models_that_other_notebooks_train_are_left_to_the_maker(
    runs: Path, makers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first, and only as long as the answers are not complete."""
    config = load_config("demo")
    pipeline.make("dpo", config)
    monkeypatch.setenv(AWAITED, "ppo")
    assert [stage.name for stage in pipeline.ensure_before("inference", config)] == ["dpo"]
    waited = []

    def wait_for(stage: Stage, name: str, flag: object = False) -> None:
        waited.append(name)
        if name in stage.run.awaited:
            stage.run.stage(name).finish({})

    monkeypatch.setattr(Stage, "wait_for", wait_for)
    Run(config).stage("inference").finish({})  # without PPO's answers: it must be renewed
    assert [stage.name for stage in pipeline.ensure_before("inference", config)] == ["dpo", "ppo"]
    assert waited == ["dpo", "ppo"]


def test_a_large_profile_waits_for_the_first_model_in_training(
    runs: Path, makers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("colab")
    monkeypatch.setenv(AWAITED, "dpo,ppo")
    finish = lambda stage, name, flag=False: stage.run.stage(name).finish({})  # noqa: E731
    monkeypatch.setattr(Stage, "wait_for", finish)
    assert [stage.name for stage in pipeline.ensure_before("inference", config)] == ["dpo"]
