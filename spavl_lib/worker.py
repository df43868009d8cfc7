"""A child process that trains: `accelerate launch -m spavl_lib.worker KIND CONFIG ROOT`.

`distributed.launcher` starts the child processes and holds their standard input open. When the
launcher ends, for whatever reason, standard input closes and the child processes exit.
"""

import os
import socket
import sys
import threading
import traceback
from pathlib import Path

import yaml

from spavl_lib import machine
from spavl_lib.config import from_dict
from spavl_lib.distributed import group
from spavl_lib.errors import Preempted, SpavlError
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.signals import end_with_parent


def main(kind: str, config_path: str, root: str) -> int:
    """Do this process's part of the work for a stage.

    Args:
        kind: Stage, such as "dpo".
        config_path: YAML file of the resolved config.
        root: Folder that holds the runs.

    Returns:
        The exit code. An error is also reported to the parent process.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    group.report(f"rank-{machine.rank()}", {"pid": os.getpid(), "host": socket.gethostname()})
    try:
        from spavl_lib import pipeline
        from spavl_lib.runs.stage import Run

        config = from_dict(yaml.safe_load(Path(config_path).read_text(encoding="utf-8")))
        group.join(config.launch)
        with pipeline.memory_advice(kind, config):
            maker_of(kind)(config, Run(config, root=Path(root)).stage(kind))
        group.barrier()
    except BaseException as error:  # noqa: BLE001 - every error is reported to the parent
        group.report(f"rank-{machine.rank()}-error", _described(error))
        traceback.print_exc()
        if isinstance(error, Preempted):
            # accelerate kills the other processes as soon as one ends. Here all wait until every
            # process has saved.
            group.barrier()
        return error.exit_code if isinstance(error, SpavlError) else 1
    return 0


def _described(error: BaseException) -> dict:
    """The report of an error: rank, type, message, and the innermost line of library code."""
    all_frames = traceback.extract_tb(error.__traceback__)
    own_frames = [f for f in all_frames if "spavl_lib" in f.filename]
    last = (own_frames or all_frames)[-1]
    return {
        "rank": machine.rank(),
        "type": type(error).__name__,
        "message": str(error),
        "at": f"{Path(last.filename).name}:{last.lineno}: {last.line}",
    }


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal exit would also end the process group, and could then wait for ended processes.
    os._exit(code)
