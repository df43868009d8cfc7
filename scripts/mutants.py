"""Mutation testing: a seeded sample of small faults, and whether the tests notice each.

    make mutants                                  # all of them; writes benchmarks/results/
    python scripts/mutants.py find                # which are still found in the code as it is
    python scripts/mutants.py run --only objectives --verdicts out.json

`scripts/mutants.json` holds the seed, the files, the sample, and for every group of files the tests
that name its behaviour. A mutant is made in a copy of the working tree and meets its group's tests
alone, with a limit of time. One that the tests pass has survived.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import json
import os
import platform
import queue
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutant_settings
from mutant_sites import Site, Source, early_returns, find, sites

REPO = Path(__file__).resolve().parents[1]
DATA = Path(__file__).with_suffix(".json")
RESULTS = REPO / "benchmarks/results/mutants.json"
# Loaded once in each worker, before it forks; never the library itself.
PRELOADED = {
    "PIL", "accelerate", "beartype", "bitsandbytes", "datasets", "huggingface_hub", "hypothesis",
    "jaxtyping", "jinja2", "numpy", "pandas", "peft", "pyarrow", "pytest", "safetensors",
    "tokenizers", "torch", "tqdm", "transformers", "trl", "yaml",
}  # fmt: skip
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")}
SLOWEST_SHARE = 0.75  # of the limit that the unmutated tests of a group may take


# --- the sample -----------------------------------------------------------------------------------


def read_data() -> dict:
    """What `scripts/mutants.json` holds."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def write_json(path: Path, page: dict) -> None:
    """As the other results are written."""
    path.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(data: dict, tree: Path) -> list[dict]:
    """The sample: drawn from the seed, all hand-overs of settings, and what is named explicitly."""
    known = mutant_settings.defaults(Source((tree / data["config"]).read_text(encoding="utf-8")))
    mutants = []
    for group, about in data["groups"].items():
        own, taken = about.get("explicit", []), set()
        for mutant in own:
            taken.add((mutant["file"], mutant.get("function"), mutant.get("node")))
        chosen = [m | {"operator": "explicit"} for m in own]
        drawn = []
        for entry in about.get("settings", []):
            source = Source((tree / entry["file"]).read_text(encoding="utf-8"))
            if "values" in entry:
                found = mutant_settings.values(source, entry["values"])
            else:
                found = mutant_settings.hand_overs(
                    source, entry["functions"], known, entry.get("names", {})
                )
            drawn += [(entry["file"], source, site) for site in found]
        rng = random.Random(f"{data['seed']}/{group}")
        for file, quota in about.get("files", {}).items():
            source = Source((tree / file).read_text(encoding="utf-8"))
            drawn += [(file, source, site) for site in _sampled(source, quota, rng)]
        for file, source, site in drawn:
            if (file, site.function, site.node) not in taken and _can_be(source, site):
                chosen.append({"file": file} | _plain(site))
        mutants += [{"id": f"{group}-{n:03}"} | m for n, m in enumerate(chosen, 1)]
    return mutants


def _plain(site: Site) -> dict:
    names = ("function", "statement", "node", "occurrence", "operator", "replacement", "kind")
    return {name: getattr(site, name) for name in names}


def _can_be(source: Source, site: Site) -> bool:
    hit = find({"": source}, _plain(site), {})
    if hit is None:
        return False
    try:
        source.with_change(hit[1], hit[2])
    except ValueError:
        return False
    return True


def _sampled(source: Source, quota: int, rng: random.Random) -> list[Site]:
    """So many changes of a file, no node changed twice, the operators taken in turn."""
    by_operator: dict[str, list[Site]] = {}
    for site in (*sites(source), *early_returns(source)):
        by_operator.setdefault(site.operator, []).append(site)
    for name in sorted(by_operator):
        rng.shuffle(by_operator[name])
    found: list[Site] = []
    places: set[tuple] = set()
    while len(found) < quota and any(by_operator.values()):
        for name in sorted(by_operator):
            while by_operator[name] and len(found) < quota:
                site = by_operator[name].pop()
                if site.place not in places and _can_be(source, site):
                    places.add(site.place)
                    found.append(site)
                    break
    return found


# --- the mutant in a tree -------------------------------------------------------------------------


class Finder:
    """Finds recorded mutants in a tree whose modules may have moved since."""

    def __init__(self, data: dict, tree: Path):
        self.data, self.tree = data, tree
        self.sources: dict[str, Source] = {}

    def __call__(self, mutant: dict) -> dict | None:
        """File, new text, line and how it was found; None if it is gone."""
        by_hand = self.data.get("mapped", {}).get(mutant["id"])
        if found := self._search(mutant, [mutant["file"]], {}, ("exact", "text")):
            return found  # where it was drawn
        if by_hand is not None:
            return self._text(by_hand, "by hand") if "file" in by_hand else None
        paths = self._candidates(mutant["file"])
        return self._search(mutant, paths, self.data.get("renamed", {}), None)

    def _search(
        self, mutant: dict, paths: list[str], names: dict[str, str], kinds: tuple | None
    ) -> dict | None:
        paths = [p for p in paths if (self.tree / p).is_file()]
        if "old" in mutant:
            texts = (self._text(mutant | {"file": path}, "text") for path in paths)
            return next(filter(None, texts), None)
        sources = {p: self._source(p) for p in paths if p.endswith(".py")}
        hit = find(sources, mutant, names)
        if hit is None or (kinds and hit[3] not in kinds):
            return None
        path, node, replacement, how = hit
        try:
            text = self._source(path).with_change(node, replacement)
        except ValueError:
            return None
        return {"file": path, "text": text, "line": node.lineno, "how": how}

    def _candidates(self, file: str) -> list[str]:
        patterns = self.data.get("moved", {}).get(file, [file])
        found = [p for pattern in patterns for p in sorted(self.tree.glob(pattern))]
        return list(dict.fromkeys(str(p.relative_to(self.tree)) for p in found if p.is_file()))

    def _source(self, path: str) -> Source:
        if path not in self.sources:
            self.sources[path] = Source((self.tree / path).read_text(encoding="utf-8"))
        return self.sources[path]

    def _text(self, edit: dict, how: str) -> dict | None:
        path = self.tree / edit["file"]
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(edit["old"]) != 1:
            return None
        line = text[: text.index(edit["old"])].count("\n") + 1
        changed = text.replace(edit["old"], edit["new"])
        return {"file": edit["file"], "text": changed, "line": line, "how": how}


def change_of(tree: Path, found: dict) -> str:
    """The lines that differ, as one line."""
    before = (tree / found["file"]).read_text(encoding="utf-8").splitlines()
    lines = difflib.ndiff(before, found["text"].splitlines())
    return "  ".join(" ".join(n.split()) for n in lines if n.startswith(("- ", "+ ")))


# --- a worker: loads the libraries once, then forks a child for every mutant --------------------


def work(tree: Path, scratch: Path) -> None:
    """Take jobs as JSON lines; make each mutant, test it in a forked child, restore the file."""
    os.chdir(tree)
    sys.path[:0] = [str(tree)]
    _preload(tree)
    print(json.dumps({"ready": threading.active_count()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_one(json.loads(line), tree, scratch)), flush=True)


def _preload(tree: Path) -> None:
    import ast

    for path in sorted((*tree.glob("spavl_lib/**/*.py"), *tree.glob("tests/**/*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                module, names = node.module, [a.name for a in node.names]
                if module.partition(".")[0] in PRELOADED:
                    try:
                        loaded = importlib.import_module(module)
                        for name in names:
                            getattr(loaded, name, None)
                    except (ImportError, RuntimeError):
                        continue
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] in PRELOADED:
                        importlib.import_module(alias.name)
    import torch

    torch.set_num_threads(1)


def _one(job: dict, tree: Path, scratch: Path) -> dict:
    path = tree / job["file"] if job.get("file") else None
    before, times = (path.read_bytes(), path.stat()) if path else (b"", None)
    shutil.rmtree(tree / ".hypothesis", ignore_errors=True)
    said, log = scratch / "said.json", scratch / "log.txt"
    said.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        if path:
            path.write_text(job["text"], encoding="utf-8")
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _child(job, scratch, said, log, mutated=path is not None)
        late = not _ended(child, job["limit_s"] * job["patience"])
        if late:
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        if path and times:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    _end_group(child)
    seconds = round(time.monotonic() - started, 2)
    page = json.loads(said.read_text()) if said.is_file() else {}
    return {"id": job["id"], "seconds": seconds} | _verdict(page, status, late, log)


def _verdict(page: dict, status: int, late: bool, log: Path) -> dict:
    by = page.get("failed", "")
    if late:
        return {"verdict": "timeout", "by": by}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {"verdict": "timeout", "by": by}
    if os.WIFSIGNALED(status):
        return {"verdict": "killed", "by": by or f"signal {os.WTERMSIG(status)}"}
    if by:
        return {"verdict": "killed", "by": by}
    if page.get("code") == 0 and page.get("passed"):
        return {"verdict": "survived", "by": ""}
    tail = log.read_text(encoding="utf-8", errors="replace")[-3000:] if log.is_file() else ""
    return {"verdict": "error", "by": "", "log": tail}


def _ended(child: int, limit_s: float) -> bool:
    handle = os.pidfd_open(child)
    try:
        return bool(select.select([handle], [], [], limit_s)[0])
    finally:
        os.close(handle)


def _end_group(child: int) -> None:
    """End what a test may have started and left behind."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


class _Recorder:
    """Which test failed first, and how many passed."""

    def __init__(self) -> None:
        self.failed, self.passed = "", 0
        self.slowest: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid
        elif report.when == "call":
            self.passed += report.passed
        self.slowest.append((round(report.duration, 2), f"{report.nodeid} {report.when}"))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or f"collecting {report.nodeid}"


def _child(job: dict, scratch: Path, said: Path, log: Path, *, mutated: bool) -> None:
    """Run the tests; never returns."""
    code = 70
    try:
        os.setsid()
        # Processor time is the same however busy the machine is; a test that waits takes none.
        resource.setrlimit(resource.RLIMIT_CPU, (job["limit_s"], job["limit_s"] + 5))
        with log.open("w") as handle:
            for stream in (1, 2):
                os.dup2(handle.fileno(), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if mutated:  # nothing may take a mutant's bytecode for the file's
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        import pytest

        recorder = _Recorder()
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={scratch / 'tmp'}"]
        code = int(pytest.main([*options, *job["options"], *job["tests"]], plugins=[recorder]))
        page = {"code": code, "failed": recorder.failed, "passed": recorder.passed}
        page["slowest"] = sorted(recorder.slowest, reverse=True)[:8]
        said.write_text(json.dumps(page))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


# --- the run --------------------------------------------------------------------------------------


class Worker:
    """A process over its own copy of the tree."""

    def __init__(self, tree: Path, scratch: Path):
        scratch.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ONE_THREAD | {
            "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
            "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, "work", "--tree", str(tree), "--scratch", str(scratch)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=(scratch / "worker.txt").open("w"),
        )  # fmt: skip

    def answer(self) -> dict:
        """What it says next."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, job: dict) -> dict:
        """The verdict of a job."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait(30)


def copy_tree(tree: Path, target: Path) -> None:
    """The files that git knows or would add, as they are in the working tree."""
    command = ["git", "-C", str(tree), "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in names.split("\0"):
        if name and (tree / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, target / name)


def run(
    data: dict,
    tree: Path,
    *,
    only: list[str],
    workers: int,
    patience: float,
    verdicts: Path | None,
) -> list[dict]:
    """Test every mutant; its verdict, how it was found, and what killed it.

    Raises:
        SystemExit: A group's tests fail, or take too long, without any mutant.
    """
    data = data | {"tree": tree, "patience": patience}
    finder, jobs, pages = Finder(data, tree), [], []
    mutants = [m for m in data["mutants"] if not only or m["id"].startswith(tuple(only))]
    for mutant in mutants:
        page = {"id": mutant["id"], "group": group_of(mutant), "file": mutant["file"]}
        found = finder(mutant)
        if found is None:
            pages.append(page | {"verdict": "gone", "seconds": 0.0, "by": ""})
            continue
        page |= {k: found[k] for k in ("file", "line", "how")}
        page["function"] = mutant.get("function", "")
        page["change"] = change_of(tree, found)
        jobs.append((page, {"id": mutant["id"], "file": found["file"], "text": found["text"]}))
    groups = dict.fromkeys(page["group"] for page, _ in jobs)
    with tempfile.TemporaryDirectory(prefix="mutants-") as root:
        folders = [Path(root) / str(n) for n in range(workers)]
        for folder in folders:
            copy_tree(tree, folder / "tree")
        running = [Worker(folder / "tree", folder / "scratch") for folder in folders]
        try:
            for worker in running:
                worker.answer()
            plain = [(None, {"id": name}) for name in groups]
            results = list(_shared_out(data, plain, running))
            _check_plain(data, results)
            for number, (page, result) in enumerate(_shared_out(data, jobs, running), 1):
                pages.append(page | {k: v for k, v in result.items() if k != "id"})
                print(f"{number}/{len(jobs)} {page['id']} {result['verdict']} "
                      f"{result['seconds']} s {result['by']}", flush=True)  # fmt: skip
                if verdicts:
                    write_json(verdicts, page_of(pages))
        finally:
            for worker in running:
                worker.close()
    order = {m["id"]: n for n, m in enumerate(mutants)}
    return sorted(pages, key=lambda page: order[page["id"]])


def group_of(mutant: dict) -> str:
    """Which tests a mutant meets."""
    return mutant["id"].rpartition("-")[0]


def _shared_out(
    data: dict, jobs: list[tuple[dict | None, dict]], workers: list[Worker]
) -> Iterator[tuple[Any, dict]]:
    """Every job with its result, in the order they end; a worker takes the next when it is free."""
    waiting: queue.Queue = queue.Queue()
    done: queue.Queue = queue.Queue()
    for job in jobs:
        waiting.put(job)

    def serve(worker: Worker) -> None:
        while True:
            try:
                page, job = waiting.get_nowait()
            except queue.Empty:
                return
            about = data["groups"][page["group"] if page else job["id"]]
            tests = [name for name in about["tests"] if has_test(data["tree"], name)]
            try:
                result = worker.ask(
                    job
                    | {"tests": tests, "options": about.get("options", [])}
                    | {"limit_s": data["limit_s"], "patience": data["patience"]}
                )
            except Exception as error:
                result = {"id": job["id"], "verdict": "error", "by": "", "log": str(error)}
            done.put((page, result))

    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in workers]
    for thread in threads:
        thread.start()
    for _ in jobs:
        yield done.get()


def has_test(tree: Path, name: str) -> bool:
    """Whether a tree has a test: the first run met the tests of an earlier layout.

    Args:
        tree: Of the project.
        name: A file or folder, or `file::function`.
    """
    file, _, function = name.partition("::")
    path = tree / file
    if not function:
        return path.exists()
    return path.is_file() and f"def {function}(" in path.read_text(encoding="utf-8")


def _check_plain(data: dict, results: list[tuple[None, dict]]) -> None:
    bad = []
    for _, result in results:
        print(f"unmutated: {result['id']} {result['verdict']} {result['seconds']} s", flush=True)
        if result["verdict"] != "survived":
            bad.append(f"{result['id']}: {result['by']} {result.get('log', '')}")
        elif result["seconds"] > SLOWEST_SHARE * data["limit_s"] * data["patience"]:
            bad.append(f"{result['id']}: {result['seconds']} s is too near the limit")
    if bad:
        raise SystemExit("without any mutant:\n" + "\n".join(bad))


# --- what is written ------------------------------------------------------------------------------


def page_of(pages: list[dict]) -> dict:
    """Verdicts with their totals."""
    counts = Counter(page["verdict"] for page in pages)
    return {"totals": {"sampled": len(pages)} | dict(sorted(counts.items())), "mutants": pages}


def noticed(page: dict | None) -> bool:
    """Whether the tests told a mutant from the code; one that never ends is told by the limit."""
    return page is not None and page["verdict"] in ("killed", "timeout")


def results_page(data: dict, after: list[dict], before: dict[str, dict]) -> dict:
    """The committed result: both verdicts of every mutant, and the shares.

    Args:
        data: The sample, with what is known to be equivalent.
        after: Verdicts now.
        before: Id -> verdict of the first run.
    """
    import torch

    known = data.get("equivalent", {})
    counted = [p for p in after if p["id"] not in known and p["verdict"] != "gone"]
    earlier = [before[p["id"]] for p in after if p["id"] in before and p["id"] not in known]
    gone = [p["id"] for p in after if p["verdict"] == "gone"]
    first = ("verdict", "seconds", "by")
    return {
        "name": "mutants",
        "device": f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl", "peft")
        },
        "metrics": {
            "sampled": len(after),
            "killed": sum(map(noticed, after)),
            "survived": sum(p["verdict"] == "survived" for p in counted),
            "gone": len(gone),
            "killed_share": round(sum(map(noticed, counted)) / max(1, len(counted)), 4),
            "killed_share_before": round(sum(map(noticed, earlier)) / max(1, len(earlier)), 4),
            "equivalent": sum(p["id"] in known for p in after),
        },
        "equivalent": [
            {"id": p["id"], "file": p["file"], "line": p.get("line"), "why": known[p["id"]]}
            for p in after
            if p["id"] in known
        ],
        "mutants": [
            {k: p[k] for k in ("id", "group", "file", "line", "function", "change") if k in p}
            | {"before": {k: before[p["id"]][k] for k in first} if p["id"] in before else None}
            | {"after": {k: p[k] for k in first}}
            for p in after
        ],
    }


def verdicts_before(path: Path) -> dict[str, dict]:
    """Id -> first verdict, from a file of verdicts or from the committed result."""
    if not path.is_file():
        return {}
    pages = json.loads(path.read_text(encoding="utf-8"))["mutants"]
    return {p["id"]: p.get("before", p) for p in pages if p.get("before", p)}


def main() -> None:
    """Draw, find or run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("task", nargs="?", default="run", choices=("draw", "find", "run", "work"))
    parser.add_argument("--tree", type=Path, default=REPO, help="a git checkout of the project")
    parser.add_argument("--only", nargs="*", default=[], help="ids, or beginnings of them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--patience", type=float, default=1.0,
        help="on a busy machine: the clock's limit over that of processor time",
    )  # fmt: skip
    parser.add_argument("--verdicts", type=Path, help="write verdicts alone, to this file")
    parser.add_argument("--before", type=Path, default=RESULTS, help="verdicts of the first run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result goes")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    tree = words.tree.resolve()
    if words.task == "work":
        work(tree, words.scratch)
        return
    data = read_data()
    if words.task == "draw":
        write_json(DATA, data | {"mutants": draw(data, tree)})
    elif words.task == "find":
        show_found(data, tree, words.only)
    else:
        before = verdicts_before(words.before)
        pages = run(
            data, tree, only=words.only, workers=words.workers, patience=words.patience,
            verdicts=words.verdicts,
        )  # fmt: skip
        page = page_of(pages)
        print(json.dumps(page["totals"]))
        if words.verdicts:
            write_json(words.verdicts, page)
        elif not words.only:
            write_json(words.results, results_page(data, pages, before))


def show_found(data: dict, tree: Path, only: list[str]) -> None:
    """Every mutant as it would be made, and the count by how it was found."""
    finder, counts = Finder(data, tree), Counter()
    for mutant in data["mutants"]:
        if only and not mutant["id"].startswith(tuple(only)):
            continue
        found = finder(mutant)
        how = found["how"] if found else "gone"
        counts[how] += 1
        if found:
            print(f"{mutant['id']} [{how}] {found['file']}:{found['line']}\n"
                  f"    {change_of(tree, found)}")  # fmt: skip
        else:
            where = f"{mutant['file']} {mutant.get('function', '')}"
            print(f"{mutant['id']} [gone] {where}: {mutant.get('node', mutant.get('old'))}")
    print(dict(counts))


if __name__ == "__main__":
    main()
