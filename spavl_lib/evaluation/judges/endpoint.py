"""A judge behind an OpenAI-compatible endpoint: a hosted model, or vLLM on one's own machine.

    export SPAVL_JUDGE_KEY=...    # the key comes from the environment alone
    spavl run 06 --profile colab --set evaluation.judge=endpoint \\
      --set evaluation.judge_model=NAME --set evaluation.judge_url=http://localhost:8000/v1

Replies are kept under a hash of all that was asked, so that a repeated or interrupted judging asks
nothing twice.
"""

import base64
import hashlib
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from spavl_lib.config import EvaluationConfig
from spavl_lib.data.duplicates import content_of
from spavl_lib.data.images import decode, png_bytes
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import rubric
from spavl_lib.runs.paths import cache_root

KEYS = ("SPAVL_JUDGE_KEY", "OPENAI_API_KEY")
RETRIES, FIRST_WAIT_S, LONGEST_WAIT_S, TIMEOUT_S, WORKERS = 6, 1.0, 60.0, 120.0, 8
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


class Refused(Exception):
    """The endpoint will not answer this very request, such as a content filter."""


class Client:
    """Chat completions of one model, at temperature 0, with retries and a cache."""

    def __init__(
        self, url: str, model: str, *, cache: Path | None = None, first_wait_s: float = FIRST_WAIT_S
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"evaluation.judge_url {url!r} is no http address")
        if parts.username or parts.password:
            raise InputError("evaluation.judge_url holds a password; put it into $SPAVL_JUDGE_KEY")
        self.url, self.model, self.first_wait_s = url.rstrip("/"), model, first_wait_s
        self.key = next((os.environ[k] for k in KEYS if os.environ.get(k)), "")
        name = hashlib.sha256(f"{self.url}\x1f{model}".encode()).hexdigest()[:16]
        self.cache = cache or cache_root() / "judges" / f"{name}.jsonl"
        self.lock = threading.Lock()
        self.replies = self._read_cache()

    def __call__(self, messages: list[dict]) -> str:
        """The reply to these turns.

        Raises:
            Refused: The endpoint refuses this request for good.
            InputError: It cannot be reached, or refuses every request.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 64}
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if key not in self.replies:
            reply = self._ask(body)
            with self.lock:
                self.replies[key] = reply
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"key": key, "reply": reply}) + "\n")
        return self.replies[key]

    def _read_cache(self) -> dict[str, str]:
        replies = {}
        if self.cache.is_file():
            for line in self.cache.read_text(encoding="utf-8").split("\n"):
                try:
                    page = json.loads(line)
                    replies[page["key"]] = page["reply"]
                except (ValueError, KeyError, TypeError):  # torn by an interrupt
                    continue
        return replies

    def _ask(self, body: dict) -> str:
        wait = self.first_wait_s
        for attempt in range(RETRIES + 1):
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(500).decode("utf-8", "replace")
                    after = error.headers.get("Retry-After") or ""
                if error.code in (401, 403):
                    raise InputError(
                        f"{self.url} refuses the key (HTTP {error.code}); set ${KEYS[0]}"
                    ) from None
                if error.code == 404:
                    raise InputError(f"{self.url}: no model {self.model!r} there") from None
                if error.code not in PASSING:
                    raise Refused(f"HTTP {error.code}: {said}") from None
                problem = f"HTTP {error.code}"
                wait = max(wait, float(after)) if after.isdigit() else wait
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < RETRIES:
                time.sleep(min(wait, LONGEST_WAIT_S) * random.uniform(0.8, 1.2))
                wait *= 2
        raise InputError(
            f"{self.url} did not answer after {RETRIES + 1} tries ({problem}); what was judged is "
            "kept, the same command goes on"
        )

    def _once(self, body: dict) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            page = json.loads(answer.read(1 << 20))
        content = page["choices"][0]["message"]["content"]
        return content if isinstance(content, str) else ""


class EndpointJudge:
    """Safe or unsafe, by a model behind an endpoint."""

    def __init__(self, settings: EvaluationConfig, client: Client | None = None):
        if client is None and not settings.judge_url:
            raise InputError("evaluation.judge: endpoint needs evaluation.judge_url")
        self.client = client or Client(settings.judge_url, settings.judge_model)
        self.needs_images = settings.judge_images
        self.canaries = settings.judge_canaries
        prompt = rubric.tag_of(rubric.SYSTEM, rubric.RULE)
        self.name = f"endpoint:{self.client.model}:{prompt[:8]}"

    def __call__(self, record: dict) -> dict:
        """Judge one record."""
        return self.many([record])[0]

    def many(self, records: Sequence[dict]) -> list[dict]:
        """Judge records, several at a time.

        Raises:
            InputError: The endpoint fails, misjudges a canary, or too many replies are no verdict.
        """
        if self.canaries:
            asked = [{"prompt": q, "response": a} for q, a, _ in rubric.CANARIES]
            rubric.check_canaries(self.name, [self._unsafe(r)[0] for r in asked])
            self.canaries = False
        with ThreadPoolExecutor(WORKERS) as pool:
            said = list(
                tqdm(pool.map(self._unsafe, records), total=len(records), desc="judge", leave=False)
            )
        rubric.check_share(self.name, sum(u is None for u, _ in said), len(said))
        return [rubric.verdict_of(r, *s) for r, s in zip(records, said, strict=True)]

    def _unsafe(self, record: dict) -> tuple[bool | None, str]:
        messages = rubric.safety_messages(record["prompt"], record["response"])
        if self.needs_images and record.get("image") is not None:
            messages[1]["content"] = [
                {"type": "text", "text": messages[1]["content"]},
                {"type": "image_url", "image_url": {"url": _data_url(record["image"])}},
            ]
        try:
            reply = self.client(messages)
        except Refused as error:
            return None, str(error)
        verdict = rubric.read_verdict(reply, "verdict", ("safe", "unsafe"))
        return (None, reply) if verdict is None else (verdict == "unsafe", "")


class EndpointPairJudge:
    """Which of two answers is better, by a model behind an endpoint."""

    def __init__(self, client: Client):
        self.client, self.name = client, f"endpoint-pairs:{client.model}"

    def __call__(self, record: dict, first: str, second: str) -> str | None:
        """`first`, `second`, `tie`, or None if the reply is none of them."""
        try:
            reply = self.client(rubric.pair_messages(record["prompt"], first, second))
        except Refused:
            return None
        return rubric.read_verdict(reply, "better", ("first", "second", "tie"))


def _data_url(cell: dict) -> str:
    content = content_of(cell)
    kind = "jpeg" if content[:2] == b"\xff\xd8" else "png"
    if kind == "png" and content[:4] != b"\x89PNG":
        content = png_bytes(decode(cell))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
