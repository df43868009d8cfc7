"""The command `spavl`. Each subcommand calls the library; an error ends in a message and a code."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from spavl_lib import stages
from spavl_lib.config import Config, load_config, profile_names
from spavl_lib.errors import DiskError, InputError, Preempted, SpavlError
from spavl_lib.runs.files import DISK_ERRORS
from spavl_lib.runs.paths import runs_root
from spavl_lib.runs.stage import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
model_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(model_app, name="model", help="Import LLaVA's checkpoints, export trained models.")
judge_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(judge_app, name="judge", help="Fit a judge on people's labels.")
app.add_typer(data_app, name="data", help="Convert preference data, or check your own data.")

Profile = Annotated[
    str,
    typer.Option(
        "--profile", "-p", help=f"One of {', '.join(profile_names())}, or the path of a YAML file."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one value of the profile, such as dpo.beta=0.2. Repeatable.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Random seed of weights, data order and sampling.")]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="FIELD",
        help="Resume an interrupted run although this setting or input has changed; the manifest "
        "records the change. Repeatable.",
    ),
]
RunName = Annotated[
    str, typer.Option(help="Folder under runs/.", show_default="the profile's name")
]


@app.callback()
def _spavl() -> None:
    """Safety preference alignment of vision-language models, by notebook or by command.

    \b
    Start here:
      spavl doctor                          what this machine can run
      spavl run all --profile demo          notebooks 01 to 06, then the report
      spavl run dpo --profile smoke         one notebook, in seconds
      spavl train dpo --profile colab --set dpo.beta=0.2
      spavl report demo                     write a run's report again
      spavl label demo --n 200              label answers by hand, to correct the judge's rates
      spavl rerun demo                      make a run again and compare every number

    Everything is written to runs/<run name>/ ($SPAVL_RUNS replaces runs/). If a command was
    stopped, the same command resumes.

    \b
    Exit codes: 0 done, 1 failed, 2 bad input or config, 3 a number is NaN or infinite, 73 run
    folder busy, 74 disk error, 75 stopped by a signal after saving (repeat the command to resume),
    130 interrupted before anything could be saved, 138 the notebook's kernel died.
    """


@app.command()
def run(
    name: Annotated[
        str, typer.Argument(help="A notebook, such as dpo or 04_dpo, or all.", show_default=False)
    ],
    profile: Profile,
    sets: Sets = None,
    seed: Seed = None,
    run_name: RunName = "",
    allow_change: AllowChange = None,
) -> None:
    """Execute one notebook, or notebooks 01 to 06 and then the report.

    Complete stages are kept; an interrupted stage resumes from its checkpoint. A run keeps its
    settings: to change one, use another --run-name.

    \b
    Examples:
      spavl run all --profile demo
      spavl run 04_dpo --profile smoke --set dpo.beta=0.5 --run-name beta05
      spavl run all --profile my.yaml --seed 3 --run-name seed3
    """
    from spavl_lib.notebook import execute, sequence

    _allow(allow_change)
    notebook = None if name == "all" else execute.find_notebook(name)
    config, overrides, profile = _config(profile, sets, seed, run_name)
    if notebook is None:
        _report(sequence.run_all(config, overrides, profile=profile))
        return
    executed = execute.run_notebook(notebook.stem, config, overrides, Run(config), profile=profile)
    typer.echo(f"done: {executed}")


@app.command()
def train(
    kind: Annotated[
        str,
        typer.Argument(
            help=f"Trainer: {', '.join(s.name for s in stages.BUILT_IN if s.trains)}, or a plugin.",
            show_default=False,
        ),
    ],
    profile: Profile,
    sets: Sets = None,
    seed: Seed = None,
    run_name: RunName = "",
    allow_change: AllowChange = None,
) -> None:
    """Train without a notebook. An interrupted training resumes from its newest whole checkpoint.

    \b
    Example:
      spavl train dpo --profile colab --set dpo.beta=0.2 --run-name beta02
    """
    from spavl_lib import pipeline

    _allow(allow_change)
    config, _, _ = _config(profile, sets, seed, run_name)
    pipeline.check_trainer(kind)
    stage = Run(config).stage(kind)
    pipeline.train(kind, config, stage)
    typer.echo(f"done: {stage.path}")


@app.command()
def rerun(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="Only this stage. Repeatable.", show_default="all complete"),
    ] = None,
    check: Annotated[
        str,
        typer.Option(
            help="exact: make the stages again and compare every number; conditions: only compare "
            "code, versions, data, model and machine with those in the manifests."
        ),
    ] = "exact",
) -> None:
    """Make a run again from its manifests and compare; on a CPU results are bit-identical.

    Lists every difference in conditions and in results. Exits with 1 if a result differs, or if
    a config.yaml, manifest.json or summary.json was changed after the run.

    \b
    Examples:
      spavl rerun demo
      spavl rerun runs/demo --stage dpo
      spavl rerun runs/demo --check conditions
    """
    from spavl_lib import rerun as rerun_module

    if check not in ("exact", "conditions"):
        raise InputError(f"--check {check!r}: expected exact or conditions")
    comparison = rerun_module.rerun(
        _run_path(run), only=tuple(stage or ()), check=check, say=typer.echo
    )
    if not comparison["equal"]:
        raise typer.Exit(1)
    typer.echo("equal" if check == "exact" else "no manifest or summary was changed")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
) -> None:
    """Write a run's report.html again, and print its headline table."""
    path = _run_path(run)
    _update_people(path)
    _report(path)


@app.command()
def label(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
    n: Annotated[
        int, typer.Option("--n", help="Number of answers to label; a larger one adds to the first.")
    ] = 200,
    rater: Annotated[str, typer.Option(help="Your name in the run's files.")] = "rater1",
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--sets",
            metavar="SET",
            help="Test set to draw from. Repeatable.",
            show_default="harm and look_alikes, or all if the run has neither",
        ),
    ] = None,
    opens: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the notebook in JupyterLab.")
    ] = True,
) -> None:
    """Label answers of a run by hand, to correct its judge's rates. Labels are saved one by one.

    The answers are drawn once, at random by verdict and model. All raters label the same ones. The
    command writes a notebook and opens it; the same command goes on later.

    \b
    Examples:
      spavl label demo --n 200
      spavl label demo --rater ann --no-open
    """
    import subprocess

    from spavl_lib.evaluation.people.table import render_people_table
    from spavl_lib.notebook.label_panel import write_label_notebook

    path = _run_path(run)
    notebook = write_label_notebook(path, rater, n, tuple(sets) if sets else None)
    typer.echo(f"notebook: {notebook}")
    if opens:
        # Ends when the user stops JupyterLab; its exit code says nothing about the labels.
        subprocess.run([sys.executable, "-m", "jupyterlab", str(notebook)], check=False)
        typer.echo(render_people_table(_update_people(path)))


@judge_app.command(name="fit")
def fit_judge(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
) -> None:
    """Fit the home head, a small judge, on people's labels of a run.

    The corrected rates of the run then use it, and `spavl label RUN --n MORE` draws the next
    answers where it is least certain. It needs the extra judge-head.

    \b
    Example:
      spavl judge fit demo
    """
    from spavl_lib.evaluation.head import Encoder
    from spavl_lib.evaluation.people.fit import fit_run, render_fit
    from spavl_lib.evaluation.people.table import render_people_table

    path = _run_path(run)
    typer.echo(render_fit(fit_run(path, Encoder())))
    typer.echo(render_people_table(_update_people(path)))


@data_app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
) -> None:
    """Convert data between the Hub's layout and the JSON lists and images that the SPA-VL authors'
    code reads. SRC is a folder in either layout, or mini. Nothing is lost.

    \b
    Examples:
      spavl data convert data/spa-vl out-json/
      spavl data convert out-json/ out-hub/
    """
    from spavl_lib.data.convert import convert

    _show(convert(source, target))


@data_app.command()
def check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="mini, a folder (in the layout of the Hub or of the SPA-VL authors' code), a name "
            "on the Hub, or a file of your own.",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Model whose tokens are counted; an empty name counts none.")
    ] = "embedded",
    max_length: Annotated[
        int, typer.Option(help="Longest allowed sequence in tokens; 0: the model's context.")
    ] = 0,
    source: Annotated[
        str, typer.Option(help="Value of data.source.", show_default="recognised from PATH")
    ] = "",
    image_root: Annotated[
        str, typer.Option(help="Folder that image paths start from.", show_default=False)
    ] = "",
    revision: Annotated[
        str, typer.Option(help="Commit, if PATH is a name on the Hub.", show_default="the newest")
    ] = "",
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            help="Your column for a field of data.columns. Repeatable, or separated by commas.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the whole report to, as JSON.")
    ] = None,
) -> None:
    """Read data as a training run would, and describe it. Bad rows are listed, with exit code 2.

    \b
    Examples:
      spavl data check mini
      spavl data check my/pairs.json --image-root my/images --model llava-hf/llava-1.5-7b-hf
      spavl data check my/pairs.csv --columns prompt=ask,image=photo
    """
    from spavl_lib.data.check import check, table
    from spavl_lib.runs.files import write_json

    processor = None
    if model:
        from spavl_lib.modelling.load import load_counter

        processor, max_length = load_counter(model, max_length)
    report = check(
        path, source=source, image_root=image_root, revision=revision, columns=columns or (),
        model=model, processor=processor, max_length=max_length,
    )  # fmt: skip
    if json_file:
        write_json(json_file, report)
    typer.echo(table(report))
    if report["problems"]:
        raise typer.Exit(2)


@app.command()
def doctor() -> None:
    """Show the hardware, the packages that differ from the pins, and the profiles that can run."""
    from spavl_lib.planning import doctor as examination

    for name, value in examination.describe_machine().items():
        typer.echo(f"{name:<10} {value}")
    summary, differing = examination.describe_pins()
    typer.echo(f"pins       {summary}")
    for line in differing:
        typer.echo(f"{'':<11}{line}")
    for name, value in examination.engines().items():
        typer.echo(f"{name:<10} {value}")
    typer.echo("profiles")
    verdicts = {name: examination.cannot_run(name) for name in profile_names()}
    for name, reasons in verdicts.items():
        typer.echo(f"  {name:<9}{'no: ' + '; '.join(reasons) if reasons else 'yes'}")
    if all(verdicts.values()):
        raise typer.Exit(1)


@app.command()
def plan(
    profile: Profile,
    kind: Annotated[str, typer.Argument(help="reward, dpo or ppo.", show_default="all three")] = "",
    device: Annotated[
        str, typer.Option(help="cpu, t4, l4, a100-40, a100-80, h100, h200; empty: this machine.")
    ] = "",
    tokens: Annotated[
        int, typer.Option(help="Tokens of the longest row, image included; 0: from the profile.")
    ] = 0,
    sets: Sets = None,
) -> None:
    """Show how much memory and time a training would take on a device. No model is loaded.

    \b
    Examples:
      spavl plan dpo --profile colab --device t4
      spavl plan dpo --profile full --device a100-80 --set model.adapter=full \\
            --set launch.engine=zero3 --set launch.num_processes=8
    """
    from spavl_lib import machine
    from spavl_lib.planning import plan as planner
    from spavl_lib.planning.devices import device_named

    config, _, _ = _config(profile, sets, None, "")
    planned_device = device_named(device or machine.device_kind())
    kinds = [kind] if kind else [k for k in ("reward", "dpo", "ppo") if hasattr(config, k)]
    plans = [planner.plan(k, config, planned_device, tokens=tokens) for k in kinds]
    typer.echo("\n".join(planner.render(p) for p in plans))
    if not all(p.fits for p in plans):
        raise typer.Exit(1)


@model_app.command(name="import")
def import_model(
    source: Annotated[Path, typer.Argument(metavar="SRC", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
    tower: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP vision tower, if SRC does not hold it.")
    ] = None,
) -> None:
    """Convert a checkpoint of the LLaVA authors so that transformers and spavl can load it."""
    from spavl_lib.modelling.llava_original import import_llava

    _show(import_llava(source, target, tower))
    typer.echo(f"done: --set model.name={target}")


@model_app.command(name="export")
def export_model(
    stage: Annotated[
        Path, typer.Argument(metavar="STAGE", help="Such as runs/paper/dpo.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
    form: Annotated[
        str, typer.Option(help="merged: one model; vllm: a base and an adapter that vLLM serves.")
    ] = "merged",
) -> None:
    """Export a trained policy, with its model card, in a form that other tools can load."""
    from spavl_lib.modelling.export import export

    _show(export(stage, target, form))


# --- helpers ------------------------------------------------------------------------------------


def parse_sets(sets: Sequence[str]) -> dict[str, str]:
    """Split `key=value` texts into keys and values; the values stay text.

    Args:
        sets: Such as `["dpo.beta=0.2"]`.

    Raises:
        InputError: A text has no `=` or no key, or a key is given twice.
    """
    parsed: dict[str, str] = {}
    for text in sets:
        key, sign, value = text.partition("=")
        key = key.strip()
        if not sign or not key:
            raise InputError(f"--set {text!r}: expected KEY=VALUE, such as --set dpo.beta=0.2")
        if key in parsed:
            raise InputError(f"--set {key} is given twice: {parsed[key]!r} and {value.strip()!r}")
        parsed[key] = value.strip()
    return parsed


def _run_path(run: str) -> Path:
    """A run's folder, found by its path or by its name.

    Raises:
        InputError: There is no such run; the message lists the existing runs.
    """
    path = Path(run) if Path(run).is_dir() else runs_root() / run
    if not path.is_dir():
        known = sorted(p.name for p in runs_root().glob("*/") if not p.name.startswith("."))
        existing = f"existing runs: {', '.join(known)}" if known else "no run exists yet"
        raise InputError(f"no run {run!r}: neither a folder nor in {runs_root()} ({existing})")
    return path


def _report(run_path: Path) -> None:
    """Write a run's report and print its headline table."""
    from spavl_lib.report import write_report
    from spavl_lib.report.table import print_results

    write_report(run_path)
    print_results(run_path)


def _update_people(run_path: Path) -> dict[str, Any]:
    """Bring what a run's metrics.json says of people's labels up to date; return its contents."""
    from spavl_lib.evaluation.people.rates import update_metrics

    return update_metrics(run_path) if (run_path / "metrics.json").is_file() else {}


def _allow(fields: list[str] | None) -> None:
    """Allow these fields to change when a stage resumes, here and in the kernels started here."""
    if fields:
        os.environ["SPAVL_ALLOW_CHANGE"] = ",".join(fields)


def _config(
    profile: str, sets: list[str] | None, seed: int | None, run_name: str
) -> tuple[Config, dict[str, str], str]:
    overrides = parse_sets(sets or [])
    for option, value, key in (("--seed", seed, "seed"), ("--run-name", run_name, "run_name")):
        if key in overrides and value not in (None, ""):
            raise InputError(
                f"{key} is given twice: {option} {value} and --set {key}={overrides[key]}"
            )
    if profile.endswith((".yaml", ".yml")):
        profile = str(Path(profile).absolute())
    return load_config(profile, overrides, seed=seed, run_name=run_name), overrides, profile


def _show(result: Any) -> None:
    if result is not None:
        typer.echo(yaml.safe_dump(result, sort_keys=False, allow_unicode=True).rstrip())


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        args: Words after `spavl`; None for the words in `sys.argv`.
    """
    # By default OpenMP threads spin while they wait, and so take cores from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _sigterm_interrupts() as sigterms:
        code = _code_of(args, sigterms)
    sys.exit(code)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[list]:
    """Let SIGTERM raise KeyboardInterrupt in the block, and add an element to the yielded list."""
    sigterms: list[bool] = []

    def interrupt(*_: object) -> None:
        sigterms.append(True)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield sigterms
        return
    # A stage that polls a stop flag (`runs.signals`) replaces this handler while it runs.
    old_handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield sigterms
    finally:
        signal.signal(signal.SIGTERM, old_handler)


def _code_of(args: Sequence[str] | None, sigterms: list) -> int:
    """Run the command line, print an error's message, and return the exit code."""

    def interrupted() -> int:
        if sigterms:
            return _fail("stopped by SIGTERM; the same command resumes", Preempted.exit_code)
        return _fail("interrupted", 130)

    try:
        # typer catches a KeyboardInterrupt and returns 130.
        code = app(args=args, prog_name="spavl", standalone_mode=False) or 0
        return interrupted() if code == 130 else code
    except SpavlError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _fail(str(error), DiskError.exit_code)


def _fail(message: str, code: int) -> int:
    is_help = message.startswith("Usage:")  # typer raises the help text if no command is given
    sys.stderr.write(f"{message}\n" if is_help else f"spavl: {message}\n")
    return code


if __name__ == "__main__":
    main()
