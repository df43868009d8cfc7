"""What the tests of `make e2e` share: a real browser, a copy of the checkout, and JupyterLab."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# Neither a question about news nor cells that are drawn only while they are in view.
LAB_SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


def git(*words: str, cwd: Path) -> str:
    """A git command's output."""
    return subprocess.run(
        ["git", *words], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess:
    """A command in the copy of the checkout, with its code and without a network."""
    env = _environment(checkout)
    return subprocess.run(words, cwd=checkout, env=env, text=True, capture_output=True)


def _environment(checkout: Path) -> dict[str, str]:
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    local = {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}
    return {k: v for k, v in os.environ.items() if k != "SPAVL_RUNS"} | nowhere | local


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    """The folder for screenshots."""
    folder = Path(os.environ.get("SPAVL_E2E_OUT") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\nscreenshots: {folder}")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Chromium, which reaches this machine alone."""
    path = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    if not path:
        pytest.skip("no Chromium: install it, or name it in $CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="install the extra e2e")
    with sync_api.sync_playwright() as playwright:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        chromium = playwright.chromium.launch(executable_path=path, args=[rules])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A repository of its own, with the files of the working tree and what `make setup` sets."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in git("ls-files", "-co", "--exclude-standard", "-z", cwd=REPO).split("\0"):
        if name and (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    git("init", "--quiet", cwd=folder)
    assert run(folder, "make", "--silent", "filter", f"BIN={BIN}").returncode == 0
    git("add", "--all", cwd=folder)
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    git(*who, "commit", "--quiet", "--message=copy", cwd=folder)
    return folder


@pytest.fixture(scope="session")
def lab(checkout: Path, tmp_path_factory) -> Iterator[str]:
    """Address and token of JupyterLab, started by `make lab`."""
    home = tmp_path_factory.mktemp("jupyter")
    (home / "labconfig").mkdir()
    settings = home / "labconfig/default_setting_overrides.json"
    settings.write_text(json.dumps(LAB_SETTINGS), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    token = secrets.token_hex(16)
    flags = (
        f"--no-browser --allow-root --expose-app-in-browser --ip=127.0.0.1 --port={port} "
        f"--ServerApp.port_retries=0 --IdentityProvider.token={token}"
    )
    folders = {f"JUPYTER_{name}_DIR": str(home) for name in ("CONFIG", "DATA", "RUNTIME")}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            ["make", "--silent", "--old-file=setup", "lab", f"BIN={BIN}", f"LAB_FLAGS={flags}"],
            cwd=checkout,
            env=_environment(checkout) | folders,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/api", timeout=5)
                break
            assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.2)
        yield f"{url} {token}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="session")
def smoke_run(checkout: Path) -> Path:
    """The run that the notebooks made in JupyterLab; made without them if these tests run alone."""
    folder = checkout / "runs/smoke"
    spavl = (str(BIN / "python"), "-m", "spavl_lib.cli")
    if not (folder / "metrics.json").is_file():
        made = run(checkout, *spavl, "run", "all", "--profile", "smoke")
        assert made.returncode == 0, made.stderr
    reported = run(checkout, *spavl, "report", "smoke")
    assert reported.returncode == 0, reported.stderr
    played = run(checkout, *spavl, "playground", "smoke")
    assert played.returncode == 0 or "No such command" in played.stderr, played.stderr
    return folder
