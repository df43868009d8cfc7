"""Kernels for the notebooks' tests, forked from a process that has imported the libraries.

    python -m tests.notebooks.warm_kernels SOCKET

Importing torch, transformers, TRL and PEFT takes ten seconds or more for each kernel. The folder
`warm` on PYTHONPATH puts its own `ipykernel_launcher` before the real one, so that papermill and
`spavl run` start kernels as usual and get a fork.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

PRELOAD = (
    "ipykernel.kernelapp", "matplotlib.pyplot", "spavl_lib.pipeline", "spavl_lib.plotting",
    "spavl_lib.report", "spavl_lib.trainers.dpo", "spavl_lib.trainers.reward",
    "spavl_lib.trainers.ppo", "spavl_lib.trainers.rloo", "spavl_lib.evaluation.suite",
    "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava",
    "transformers.models.llava.image_processing_pil_llava",
    "peft.utils.transformers_weight_conversion",
)  # fmt: skip
OPTIONAL = "deepspeed"  # TRL imports it with its first trainer, if it is installed


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request, and the descriptors of stdin, stdout and stderr."""
    head, descriptors, *_ = socket.recv_fds(connection, 8, 3)
    left, parts = int.from_bytes(head, "big"), []
    while left:
        parts.append(connection.recv(left))
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), list(descriptors)


def become_kernel(request: dict, descriptors: list[int]) -> None:
    """Turn this fork into the kernel that was asked for; does not return."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.environ.clear()
    # ipykernel ends when the process of this number is not its parent, which here it never is.
    os.environ.update({k: v for k, v in request["env"].items() if k != "JPY_PARENT_PID"})
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()
    from ipykernel import kernelapp

    with contextlib.suppress(SystemExit):
        kernelapp.launch_new_instance()
    os._exit(0)


def serve(listener: socket.socket) -> None:
    """Fork kernels until the listening socket's parent process has gone."""
    children: dict[int, socket.socket] = {}
    parent = os.getppid()
    while os.getppid() == parent:
        ready, _, _ = select.select([listener, *children.values()], [], [], 0.1)
        if listener in ready:
            connection, _ = listener.accept()
            request, descriptors = receive(connection)
            if not (child := os.fork()):
                become_kernel(request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            children[child] = connection
        for child, connection in list(children.items()):
            if connection in ready:  # the process that waits for the kernel has ended
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    connection.send(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))
                children.pop(child).close()


def main() -> None:
    """Import, then listen."""
    listener: Any = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    for name in PRELOAD:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module(OPTIONAL)
    listener.listen(8)
    print("ready", flush=True)
    serve(listener)


if __name__ == "__main__":
    main()
