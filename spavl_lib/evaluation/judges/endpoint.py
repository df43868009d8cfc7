"""A judge behind an OpenAI-compatible endpoint: a hosted model, or your own vLLM server.

    export SPAVL_JUDGE_KEY=...    # the key is read from the environment only
    spavl run 06 --profile colab --set evaluation.judge=endpoint \\
      --set evaluation.judge_model=NAME --set evaluation.judge_url=http://localhost:8000/v1

Another machine receives prompts and answers only if the user has agreed to this (`judge_yes`).
Proxies are read from the environment (HTTPS_PROXY, NO_PROXY). Every reply is cached under a hash of
the request. So a repeated or interrupted evaluation does not send a request again that has a reply.
"""

import base64
import contextlib
import hashlib
import ipaddress
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path

import httpx2
import tenacity

from spavl_lib.config import EvaluationConfig
from spavl_lib.data.duplicates import content_of
from spavl_lib.data.images import decode, png_bytes
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import rubric
from spavl_lib.evaluation.verdicts import Axis, Verdict
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.paths import cache_root
from spavl_lib.runs.signals import RESUME

KEYS = ("SPAVL_JUDGE_KEY", "OPENAI_API_KEY")
TRIES, FIRST_WAIT_S, LONGEST_WAIT_S, TIMEOUT_S, WORKERS = 7, 1.0, 60.0, 120.0, 8
# A verdict needs about ten tokens. A model that reasons first needs hundreds, sometimes thousands.
REPLY_TOKENS, LONG_REPLY_TOKENS = 1024, 8192
MOST_FAILED = 8  # after this many requests in a row without a reply, the endpoint counts as down
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP status codes worth another try


class Unanswered(Exception):
    """This one request has no reply: it was rejected, failed every time, or was not sent."""


class TransientFailure(Exception):
    """The request failed, but may succeed later. The endpoint asks to wait `after_s` seconds."""

    def __init__(self, problem: str, after_s: float = 0.0):
        super().__init__(problem)
        self.after_s = after_s


class Client:
    """Chat completions of one model at temperature 0, with retries, a budget and a cache."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache: Path | None = None,
        budget: int = 0,
        reply_tokens: int = 0,
        names: tuple[str, str] = ("evaluation.judge_url", "evaluation.judge_model"),
        first_wait_s: float = FIRST_WAIT_S,
        timeout_s: float = TIMEOUT_S,
    ):
        """Check the address, and read the key, the proxies and the cache.

        Args:
            url: Address of the endpoint, up to `/v1`.
            model: The model's name at the endpoint.
            cache: JSONL file of replies; None uses a file in the cache folder.
            budget: Largest number of requests that are sent, repeated ones included; 0: no limit.
            reply_tokens: Largest number of tokens of a reply. 0: enough for a verdict, and more for
                a model that reasons at length.
            names: Whose address and whose model these are, for error messages.
            first_wait_s: Seconds before the second try, plus a random part. Each further wait is
                about twice as long, up to `LONGEST_WAIT_S`.
            timeout_s: A request fails if the endpoint sends nothing for this many seconds.

        Raises:
            InputError: The address, the key or the proxies cannot be used.
        """
        if "@" in url:
            raise InputError(
                f"{names[0]} holds a password; remove it and set ${KEYS[0]} to the key"
            )
        self.url, self.model, self.key = url.rstrip("/"), model, _read_key()
        self.budget, self.sent, self.names = budget, 0, names
        self.reply_tokens, self.more_tokens = reply_tokens or REPLY_TOKENS, not reply_tokens
        self.failed_in_a_row = 0
        self.is_down = ""  # why the endpoint counts as down; then no request is sent any more
        # Some endpoints reject `max_tokens` or `temperature`. `_adapts` notes this here, so that
        # later requests do not hold the rejected field.
        self.limit_name, self.takes_temperature = "max_tokens", True
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            address = httpx2.URL(self.url)
            self.http = httpx2.Client(headers=headers, timeout=timeout_s)
        except (httpx2.InvalidURL, ImportError, ValueError) as error:
            raise InputError(
                f"{names[0]} {url!r} or a proxy in the environment is unusable: {error}"
            ) from error
        if address.scheme not in ("http", "https") or not address.host:
            raise InputError(f"{names[0]} {url!r}: expected an http or https address")
        self.host = address.host
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
            Unanswered: There is no reply to this request; the message says why.
            InputError: The endpoint refuses the key, does not know the model, or gave no reply to
                `MOST_FAILED` requests in a row.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0}
        body["max_tokens"] = self.reply_tokens
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if key not in self.replies:
            if self.is_down:
                raise InputError(self.is_down)
            try:
                reply = self.retrying(self._post, body)
            except TransientFailure as error:
                problem = f"{rubric.NO_REPLY} from {self.url} in {TRIES} tries ({error})"
                with self.lock:
                    self.failed_in_a_row += 1
                    if self.failed_in_a_row >= MOST_FAILED:
                        self.is_down = (
                            f"{problem}, {MOST_FAILED} requests in a row. Finished replies are "
                            f"cached: {RESUME}"
                        )
                if self.is_down:
                    raise InputError(self.is_down) from None
                raise Unanswered(problem) from None
            with self.lock:
                self.failed_in_a_row = 0
                self.replies[key] = reply
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"key": key, "reply": reply}) + "\n")
        return self.replies[key]

    def _read_cache(self) -> dict[str, str]:
        replies = {}
        if self.cache.is_file():
            for line in self.cache.read_text(encoding="utf-8").split("\n"):
                # An interruption may leave an incomplete line, which is skipped.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    replies[entry["key"]] = entry["reply"]
        return replies

    def _post(self, body: dict) -> str:
        names = {"max_tokens": self.limit_name}
        left_out = () if self.takes_temperature else ("temperature",)
        sent = {names.get(k, k): v for k, v in body.items() if k not in left_out}
        status, text, headers = self._send(sent)
        shown = text[:500]
        problem = f"HTTP {status}: {shown.replace(self.key, '[key]') if self.key else shown}"
        if status in (401, 403):
            raise InputError(f"{self.url} refuses the key (HTTP {status}); set ${KEYS[0]}")
        if status == 404:
            raise InputError(
                f"{self.url} has no model {self.model!r} ({problem}); check {self.names[1]} and "
                f"{self.names[0]}"
            )
        if status in TRANSIENT:
            raise TransientFailure(problem, wait_of(headers.get("Retry-After", "")))
        if status == 400 and self._adapts(sent, text):
            return self._post(body)
        if not 200 <= status < 300:
            raise Unanswered(problem)
        try:
            choice = json.loads(text)["choices"][0]
            reply = text_of(choice["message"])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise TransientFailure(f"{type(error).__name__}: {error}") from None
        grows = self.more_tokens and body["max_tokens"] < LONG_REPLY_TOKENS
        if choice.get("finish_reason") == "length" and grows:
            # The model reasoned so long that no tokens were left for its verdict. Allow more.
            return self._post(body | {"max_tokens": LONG_REPLY_TOKENS})
        return reply

    def _send(self, body: dict) -> tuple[int, str, Mapping[str, str]]:
        """Send one request, and return the status, the text and the headers of the response."""
        with self.lock:
            if self.budget and self.sent >= self.budget:
                raise Unanswered(
                    f"{rubric.NOT_ASKED}: the budget of {self.budget} requests is spent"
                )
            self.sent += 1
        try:
            content = json.dumps(body).encode()
            with self.http.stream("POST", f"{self.url}/chat/completions", content=content) as got:
                # At most 2**20 characters are read. A longer text is cut, so it is not valid JSON.
                return got.status_code, next(got.iter_text(1 << 20), ""), got.headers
        except httpx2.HTTPError as error:
            raise TransientFailure(f"{type(error).__name__}: {error}") from None

    def _adapts(self, sent: dict, problem: str) -> bool:
        """If the endpoint's message names a rejected field, change the form of all later requests.

        Returns:
            Whether the form has changed, so that the request can be sent again.
        """
        if "max_tokens" in sent and "max_completion_tokens" in problem:
            self.limit_name = "max_completion_tokens"
        elif "temperature" in sent and "temperature" in problem:
            self.takes_temperature = False
        else:
            return False
        return True


def text_of(message: Mapping) -> str:
    """The text of a chat completion's message, without reasoning that stands in a separate field.

    Args:
        message: Its `content` is a text, a list of parts, or None if there is only reasoning.

    Raises:
        KeyError: The message has no `content`, or a part of type `text` has no `text`.
    """
    content = message["content"]
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(str(part["text"]) for part in parts)
    return content if isinstance(content, str) else ""


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
    """Judges whether responses do harm, with the model behind an endpoint."""

    axes: tuple[Axis, ...] = ("harmful", "warned")
    form = "safety"
    canaries = True
    follows_rules = reads_replies = True

    def __init__(self, settings: EvaluationConfig, client: Client | None = None):
        self.client = client or check_endpoint(settings)
        self.needs_images = settings.judge_images
        self.canaries = self.canaries and settings.judge_canaries
        record = {"prompt": "", "response": ""}
        more: tuple[dict, ...] = ({}, {"asks_warning": True}, {"rule": "R"}, {"reference": "A"})
        wording = rubric.tag_of(*(str(self.messages(record | fields)) for fields in more))
        self.name = f"endpoint:{self.client.model}:{self.form}-{wording[:8]}"

    def __call__(self, record: dict) -> Verdict:
        """Judge one record."""
        return self.many([record])[0]

    def many(self, records: Sequence[dict]) -> list[Verdict]:
        """Judge records, several at a time.

        A record without a reply is unjudged, and its verdict says why there is no reply.

        Raises:
            InputError: The endpoint fails, or the model misjudges a canary.
        """
        if self.canaries:
            rubric.check_canaries(self.name, [self._verdict(r) for r in rubric.canary_records()])
            self.canaries = False
        with ThreadPoolExecutor(WORKERS) as pool:
            answers = pool.map(self._verdict, records)
            try:
                verdicts = list(Bar(answers, total=len(records), desc="judge", leave=False))
            except BaseException:
                # Do not send the remaining requests: nobody would read their replies.
                pool.shutdown(cancel_futures=True)
                raise
        return verdicts

    def messages(self, record: dict) -> list[dict]:
        """The turns that ask about one record, without its image."""
        question, answer = record["prompt"], record["response"]
        return rubric.safety_messages(
            question, answer, record.get("rule", ""), record.get("asks_warning", False)
        )

    def read(self, record: dict, reply: str) -> Verdict:
        """The verdict in a reply.

        Args:
            record: The record that was judged.
            reply: The model's text.
        """
        return rubric.safety_verdict(reply, record.get("asks_warning", False))

    def _verdict(self, record: dict) -> Verdict:
        messages = self.messages(record)
        if self.needs_images:
            messages = with_image(messages, record)
        try:
            return self.read(record, self.client(messages))
        except Unanswered as error:
            return Verdict(why_unjudged=str(error))


def with_image(messages: list[dict], record: dict) -> list[dict]:
    """The turns, with the record's image added to the last turn if the record has an image.

    Args:
        messages: Turns, of which the last is the user's.
        record: Its `image` may be missing or None.
    """
    if record.get("image") is None:
        return messages
    *before, user = messages
    image = {"type": "image_url", "image_url": {"url": _data_url(record["image"])}}
    return [*before, user | {"content": [{"type": "text", "text": user["content"]}, image]}]


def check_endpoint(settings: EvaluationConfig) -> Client:
    """Make the client of the configured endpoint.

    A client of another machine is made only if the user has agreed to what this machine receives.
    A line on stderr then names the machine.

    Args:
        settings: The config's section `evaluation`.

    Raises:
        InputError: As in `Client`, or the host is another machine and `judge_yes` is not set.
    """
    client = Client(settings.judge_url, settings.judge_model, budget=settings.judge_budget)
    receives = "prompts, images and answers" if settings.judge_images else "prompts and answers"
    agree(client.host, f"{receives} that are judged", settings.judge_yes)
    return client


def agree(host: str, receives: str, yes: bool) -> None:
    """Say once what a host receives, if it is another machine.

    Args:
        host: The host.
        receives: What it receives, as a noun in the plural.
        yes: Whether the user has agreed.

    Raises:
        InputError: The host is another machine, and the user has not agreed.
    """
    if is_here(host):
        return
    if not yes:
        raise InputError(
            f"{host} would receive the {receives}; agree to this with --yes, or with --set "
            "evaluation.judge_yes=true"
        )
    if (host, receives) not in _NAMED:
        _NAMED.add((host, receives))
        sys.stderr.write(f"{host} receives the {receives}\n")


_NAMED: set[tuple[str, str]] = set()  # hosts that a line on stderr has named already


def is_here(host: str) -> bool:
    """Whether a host is this machine, so that no request leaves the machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _data_url(cell: dict) -> str:
    content = content_of(cell)
    kind = "jpeg" if content[:2] == b"\xff\xd8" else "png"
    if kind == "png" and content[:4] != b"\x89PNG":
        content = png_bytes(decode(cell))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
