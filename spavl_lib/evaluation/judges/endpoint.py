"""A judge behind an OpenAI-compatible endpoint: a hosted model, or your own vLLM server.

    export SPAVL_JUDGE_KEY=...    # the key is read from the environment only
    spavl run 06 --profile colab --set evaluation.judge=endpoint \\
      --set evaluation.judge_model=NAME --set evaluation.judge_url=http://localhost:8000/v1

Proxies are read from the environment (HTTPS_PROXY, NO_PROXY). Every reply is cached under a hash of
the request, so a repeated or interrupted evaluation never sends the same request twice.
"""

import base64
import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path

import httpx2
import tenacity
from tqdm.auto import tqdm

from spavl_lib.config import EvaluationConfig
from spavl_lib.data.duplicates import content_of
from spavl_lib.data.images import decode, png_bytes
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import rubric
from spavl_lib.runs.paths import cache_root

KEYS = ("SPAVL_JUDGE_KEY", "OPENAI_API_KEY")
TRIES, FIRST_WAIT_S, LONGEST_WAIT_S, TIMEOUT_S, WORKERS = 7, 1.0, 60.0, 120.0, 8
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP status codes worth another try


class RefusedRequest(Exception):
    """The endpoint rejects this one request, for example because of a content filter."""


class TransientFailure(Exception):
    """The request failed, but may succeed later. The endpoint asks to wait `after_s` seconds."""

    def __init__(self, problem: str, after_s: float = 0.0):
        super().__init__(problem)
        self.after_s = after_s


class Client:
    """Chat completions of one model at temperature 0, with retries and a cache."""

    def __init__(
        self, url: str, model: str, *, cache: Path | None = None, first_wait_s: float = FIRST_WAIT_S
    ):
        """Check the address, and read the key, the proxies and the cache.

        Args:
            url: Address of the endpoint, up to `/v1`.
            model: The model's name at the endpoint.
            cache: JSONL file of replies; None uses a file in the cache folder.
            first_wait_s: Seconds before the second try, plus a random part. Each further wait is
                about twice as long, up to `LONGEST_WAIT_S`.

        Raises:
            InputError: The address, the key or the proxies cannot be used.
        """
        if "@" in url:
            raise InputError(
                f"evaluation.judge_url holds a password; remove it and set ${KEYS[0]} to the key"
            )
        self.url, self.model, self.key = url.rstrip("/"), model, _read_key()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            address = httpx2.URL(self.url)
            self.http = httpx2.Client(headers=headers, timeout=TIMEOUT_S)
        except (httpx2.InvalidURL, ImportError, ValueError) as error:
            raise InputError(
                f"evaluation.judge_url {url!r} or a proxy in the environment is unusable: {error}"
            ) from error
        if address.scheme not in ("http", "https") or not address.host:
            raise InputError(f"evaluation.judge_url {url!r}: expected an http or https address")
        name = hashlib.sha256(f"{self.url}\x1f{model}".encode()).hexdigest()[:16]
        self.cache = cache or cache_root() / "judges" / f"{name}.jsonl"
        self.lock = threading.Lock()
        self.replies = self._read_cache()
        backoff = tenacity.wait_exponential_jitter(
            max=LONGEST_WAIT_S, jitter=first_wait_s, multiplier=first_wait_s
        )

        def wait(state: tenacity.RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome else None
            return min(max(backoff(state), getattr(failure, "after_s", 0.0)), LONGEST_WAIT_S)

        self.retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(TRIES), wait=wait, reraise=True,
            retry=tenacity.retry_if_exception_type(TransientFailure),
        )  # fmt: skip

    def __call__(self, messages: list[dict]) -> str:
        """The reply to these turns.

        Raises:
            RefusedRequest: The endpoint rejects this request.
            InputError: The endpoint cannot be reached, or rejects every request.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 64}
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if key not in self.replies:
            try:
                reply = self.retrying(self._post, body)
            except TransientFailure as error:
                raise InputError(
                    f"{self.url} did not answer after {TRIES} tries ({error}). Finished replies "
                    "are cached: run the same command again to continue"
                ) from None
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
                # An interruption may leave an incomplete line.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    replies[entry["key"]] = entry["reply"]
        return replies

    def _post(self, body: dict) -> str:
        url, content = f"{self.url}/chat/completions", json.dumps(body).encode()
        try:
            with self.http.stream("POST", url, content=content) as answer:
                text = next(answer.iter_text(1 << 20), "")  # a longer text is cut, so it is no JSON
        except httpx2.HTTPError as error:
            raise TransientFailure(f"{type(error).__name__}: {error}") from None
        status, shown = answer.status_code, text[:500]
        problem = f"HTTP {status}: {shown.replace(self.key, '[key]') if self.key else shown}"
        if status in (401, 403):
            raise InputError(f"{self.url} refuses the key (HTTP {status}); set ${KEYS[0]}")
        if status == 404:
            raise InputError(
                f"{self.url} has no model {self.model!r} ({problem}); check evaluation.judge_model "
                "and evaluation.judge_url"
            )
        if status in TRANSIENT:
            raise TransientFailure(problem, wait_of(answer.headers.get("Retry-After", "")))
        if not answer.is_success:
            raise RefusedRequest(problem)
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise TransientFailure(f"{type(error).__name__}: {error}") from None
        return reply if isinstance(reply, str) else ""


def _read_key() -> str:
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise InputError(f"${name} holds a character that no key has; set it again")
            return key
    return ""


def wait_of(retry_after: str) -> float:
    """Seconds to wait according to a Retry-After header (RFC 9110); 0 if it is unreadable.

    The header holds a number of seconds or a date.
    """
    if retry_after.isdecimal():
        return float(retry_after)
    with contextlib.suppress(ValueError, OverflowError):
        if date := parsedate_tz(retry_after):
            return max(0.0, mktime_tz(date) - time.time())
    return 0.0


class EndpointJudge:
    """Judges responses as safe or unsafe with the model behind an endpoint."""

    def __init__(self, settings: EvaluationConfig, client: Client | None = None):
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
            InputError: The endpoint fails, misjudges a canary, or too many replies hold no verdict.
        """
        if self.canaries:
            rubric.check_canaries(self.name, [self._opinion(r) for r in rubric.canary_records()])
            self.canaries = False
        with ThreadPoolExecutor(WORKERS) as pool:
            answers = pool.map(self._opinion, records)
            opinions = list(tqdm(answers, total=len(records), desc="judge", leave=False))
        rubric.check_share(self.name, opinions)
        return [rubric.verdict_of(r, *o) for r, o in zip(records, opinions, strict=True)]

    def _opinion(self, record: dict) -> tuple[bool | None, str]:
        messages = rubric.safety_messages(record["prompt"], record["response"])
        if self.needs_images and record.get("image") is not None:
            messages[1]["content"] = [
                {"type": "text", "text": messages[1]["content"]},
                {"type": "image_url", "image_url": {"url": _data_url(record["image"])}},
            ]
        try:
            reply = self.client(messages)
        except RefusedRequest as error:
            return None, str(error)
        verdict = rubric.read_verdict(reply, "verdict", ("safe", "unsafe"))
        return (None, reply) if verdict is None else (verdict == "unsafe", "")


class EndpointPairJudge:
    """Says which of two responses is better, with the model behind an endpoint."""

    def __init__(self, client: Client):
        self.client, self.name = client, f"endpoint-pairs:{client.model}"

    def __call__(self, record: dict, first: str, second: str) -> str | None:
        """Compare two responses to one prompt.

        Args:
            record: Holds the `prompt`.
            first: One response.
            second: The other response.

        Returns:
            `first`, `second`, `tie`, or None if the reply is none of them or the endpoint rejects
            the request.
        """
        try:
            reply = self.client(rubric.pair_messages(record["prompt"], first, second))
        except RefusedRequest:
            return None
        return rubric.read_verdict(reply, "better", ("first", "second", "tie"))


def _data_url(cell: dict) -> str:
    content = content_of(cell)
    kind = "jpeg" if content[:2] == b"\xff\xd8" else "png"
    if kind == "png" and content[:4] != b"\x89PNG":
        content = png_bytes(decode(cell))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
