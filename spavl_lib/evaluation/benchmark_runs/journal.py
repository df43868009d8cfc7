"""A JSON Lines file that gets finished work at once, so that a killed process loses no record."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spavl_lib.errors import InputError, raise_all
from spavl_lib.runs.files import append_durably, writing


class Journal:
    """Records in a JSON Lines file, each with its own `id`.

    Every call of `append` writes its records at once and flushes them to the disk. If a process is
    killed while it writes, the next process cuts off the incomplete last line.

    Args:
        path: The file. It need not exist.

    Raises:
        InputError: A complete line is not a JSON object with an id, or an id has two records. The
            message lists these lines.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        problems = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                row_id = record["id"]
            except (ValueError, KeyError, TypeError):
                problems.append(f"{path.name}: line {number}: not a JSON object with an id")
                continue
            if row_id in self.records:
                problems.append(f"{path.name}: line {number}: a second record for {row_id}")
            self.records[row_id] = record
        raise_all(problems, str(path))
        if len(whole) < len(content):
            with writing(path):
                os.truncate(path, len(whole))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records, and return when they are on the disk.

        Raises:
            InputError: An id has a record already.
            DiskError: There is no space or no permission.
        """
        records = list(records)
        counts = Counter(record["id"] for record in records)
        if twice := [n for n, count in counts.items() if count > 1 or n in self.records]:
            raise InputError(f"{self.path}: a second record for {', '.join(twice)}")
        append_durably(self.path, records)
        self.records.update((record["id"], record) for record in records)
