"""One process of several: `accelerate launch -m spavl_lib.worker KIND CONFIG ROOT`.

Started by `children.train_in_processes`, which holds our standard input open: when that ends, so do
we, whatever killed it.
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
    """Make a stage's part of this process.

    Args:
        kind: Stage, such as "dpo".
        config_path: A resolved config.
        root: Folder of the runs.

    Returns:
        The exit code; what failed is reported to the parent.
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
    except BaseException as error:  # noqa: BLE001 - all of them are told, with the rank
        group.report(f"rank-{machine.rank()}-error", _told(error))
        traceback.print_exc()
        if isinstance(error, Preempted):
            group.barrier()  # the launcher kills the rest as soon as one ends
        return error.exit_code if isinstance(error, SpavlError) else 1
    return 0


def _told(error: BaseException) -> dict:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "spavl_lib" in f.filename]
    last = (frames or traceback.extract_tb(error.__traceback__))[-1]
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
    os._exit(code)  # no teardown of process groups that others may have left already
