"""Stands in for ipykernel's launcher: asks `warm_kernels` for a kernel, and waits for its end.

When this process is killed, the server ends the kernel.
"""

import json
import os
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    request = {"argv": sys.argv, "cwd": str(Path.cwd()), "env": dict(os.environ)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["SPAVL_WARM_KERNELS"])
    data = json.dumps(request).encode()
    socket.send_fds(connection, [len(data).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(data)
    sys.exit(int.from_bytes(connection.recv(1) or b"\1", "big"))
