"""The command `spavl`. Subcommands call the library. Errors become a message and an exit code."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from spavl_lib import stages
from spavl_lib.cli import arena, ask, data, evaluate, judge, label, model, playground, records
from spavl_lib.cli.shared import Commands, run_path, update_people
from spavl_lib.config import Config, load_config, profile_names
from spavl_lib.errors import DiskError, InputError, Preempted, SpavlError
from spavl_lib.runs.files import DISK_ERRORS
from spavl_lib.runs.provenance import library_version
from spavl_lib.runs.stage import Run
from spavl_lib.runs.text import short_path

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(model.app, name="model", help="Import LLaVA's checkpoints, export trained models.")
app.add_typer(data.app, name="data", help="Convert preference data, or check your own data.")
app.add_typer(judge.app, name="judge", help="Measure judges against people's labels, or fit one.")
app.add_typer(arena.app, name="arena", help="Measure methods of alignment against attacks.")
app.add_typer(records.app, name="records", help="The fastest ways to a safe model: a leaderboard.")
app.add_typer(evaluate.app)
app.add_typer(label.app)
app.add_typer(ask.app)
app.add_typer(playground.app)

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
        help="Resume an interrupted run although this setting or input has changed, such as "
        "dpo.learning_rate; the manifest records the change. Repeatable.",
    ),
]
RunName = Annotated[
    str, typer.Option(help="Folder under runs/.", show_default="the profile's name")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spavl {library_version()}")
        raise typer.Exit


@app.callback()
def _spavl(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Safety preference alignment of vision-language models, by notebook or by command.

    \b
    Start here:
      spavl doctor                          what this machine can run
      spavl run all --profile demo          notebooks 01 to 06, then the report
      spavl run dpo --profile smoke         one notebook, in seconds
      spavl train dpo --profile colab --set dpo.beta=0.2
      spavl ask demo IMAGE "QUESTION"        base and trained models, side by side
      spavl playground demo                 a page that runs the models in a browser
      spavl report demo                     write a run's report again
      spavl benchmarks                      which published benchmarks can be read, and are here
      spavl evaluate demo/dpo --benchmarks figstep      a model on published benchmarks
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
        str,
        typer.Argument(help="A notebook, such as dpo, 04 or 04_dpo, or all.", show_default=False),
    ],
    profile: Profile,
    sets: Sets = None,
    seed: Seed = None,
    run_name: RunName = "",
    allow_change: AllowChange = None,
    lanes: Annotated[
        int, typer.Option(min=1, help="With all: largest number of notebooks at a time.")
    ] = 2,
) -> None:
    """Execute one notebook, or notebooks 01 to 06 and then the report.

    Complete stages are kept; an interrupted stage resumes from its checkpoint. A run keeps its
    settings: to change a setting, use another --run-name. Only the judge may change; then the
    answers are judged again.

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
        _report(sequence.run_all(config, overrides, profile=profile, lanes=lanes))
        return
    executed = execute.run_notebook(notebook.stem, config, overrides, Run(config), profile=profile)
    _done(executed, execute.stage_of(notebook), config)


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
    _done(stage.path, kind, config)


@app.command()
def rerun(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="Stage to compare. Repeatable.", show_default="all complete"),
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

    The command lists every difference in conditions and in results. The exit code is 1 if a result
    differs, or if a config.yaml, manifest.json or summary.json was changed after the run.

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
        run_path(run), only=tuple(stage or ()), check=check, say=typer.echo
    )
    if not comparison["equal"]:
        raise typer.Exit(1)
    typer.echo("equal" if check == "exact" else "no manifest or summary was changed")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
) -> None:
    """Write a run's report.html again, and print its headline table."""
    path = run_path(run)
    update_people(path)
    _report(path)


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
        str,
        typer.Option(
            help="cpu, t4, l4, a10, rtx3090, rtx4090, a100-40, a100-80, h100, h200; empty: this "
            "machine."
        ),
    ] = "",
    memory: Annotated[
        float, typer.Option(help="Memory of the device in GiB, if it differs; 0: its own.")
    ] = 0,
    tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of the longest row, image included; 0: those of the data if they are on "
            "this machine, else the profile's limit."
        ),
    ] = 0,
    sets: Sets = None,
) -> None:
    """Show how much memory and time a training would take on a device. No model is loaded, and
    nothing is fetched; data on this machine are read for the lengths of their rows.

    \b
    Examples:
      spavl plan dpo --profile colab --device t4
      spavl plan dpo --profile colab --device rtx3090 --memory 12
      spavl plan dpo --profile full --device a100-80 --set model.adapter=full \\
            --set launch.engine=zero3 --set launch.num_processes=8
    """
    from spavl_lib import machine
    from spavl_lib.planning import plan as planner
    from spavl_lib.planning.devices import device_named
    from spavl_lib.planning.rows import lengths_at_hand

    config, _, _ = _config(profile, sets, None, "")
    planned_device = device_named(device or machine.device_kind())
    if memory:
        planned_device = dataclasses.replace(planned_device, memory_gib=memory)
    kinds = [kind] if kind else [k for k in ("reward", "dpo", "ppo") if hasattr(config, k)]
    lengths = None if tokens else lengths_at_hand(config)
    plans = [planner.plan(k, config, planned_device, tokens=tokens, lengths=lengths) for k in kinds]
    typer.echo("\n".join(planner.render(p) for p in plans))
    if not all(p.fits for p in plans):
        raise typer.Exit(1)


# --- helpers ------------------------------------------------------------------------------------


def parse_sets(sets: Sequence[str]) -> dict[str, str]:
    """Split `key=value` texts into keys and values; the values stay text.

    Args:
        sets: Texts such as `dpo.beta=0.2`.

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


def _report(run_path: Path) -> None:
    """Write a run's report and print its headline table."""
    from spavl_lib.report import write_report
    from spavl_lib.report.table import print_results

    write_report(run_path)
    print_results(run_path)


def _done(path: Path, stage: str, config: Config) -> None:
    """Say what was made, and which commands continue from there."""
    from spavl_lib import pipeline

    typer.echo(f"done: {short_path(path)}")
    for number, command in enumerate(pipeline.next_commands(stage, config)):
        typer.echo(f"{'' if number else 'next:':5} {command}")


def _allow(fields: list[str] | None) -> None:
    """Allow these fields to change when a stage resumes, here and in the kernels started here."""
    if fields:
        os.environ["SPAVL_ALLOW_CHANGE"] = ",".join(fields)


def _config(
    profile: str, sets: list[str] | None, seed: int | None, run_name: str
) -> tuple[Config, dict[str, str], str]:
    """The resolved config, the values of `--set`, and the profile (a file by its whole path)."""
    overrides = parse_sets(sets or [])
    for option, value, key in (("--seed", seed, "seed"), ("--run-name", run_name, "run_name")):
        if key in overrides and value not in (None, ""):
            raise InputError(
                f"{key} is given twice: {option} {value} and --set {key}={overrides[key]}"
            )
    if profile.endswith((".yaml", ".yml")):
        profile = str(Path(profile).absolute())
    return load_config(profile, overrides, seed=seed, run_name=run_name), overrides, profile


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
    """Make SIGTERM raise KeyboardInterrupt in the block. Each SIGTERM extends the yielded list."""
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
        return _fail(_message(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _fail(str(error), DiskError.exit_code)


def _message(error: typer.TyperException) -> str:
    """The message of an error in the words of a command; for a missing word, with its help."""
    param = getattr(error, "param", None)
    text = str(getattr(param, "help", None) or "")
    missing = text and error.format_message().startswith("Missing")
    return error.format_message() + (f" {text}" if missing else "")


def _fail(message: str, code: int) -> int:
    is_help = message.startswith("Usage:")  # typer raises the help text if no command is given
    sys.stderr.write(f"{message}\n" if is_help else f"spavl: {message}\n")
    return code
