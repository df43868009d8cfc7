"""Read preference records in several layouts. A record has a prompt, two responses and an image.

| layout | prompt | responses |
|---|---|---|
| TRL | `prompt`: text or `[{"role", "content"}]`, or only inside the responses | text or messages |
| LLaMA-Factory, ShareGPT form | `conversations`: `[{"from", "value"}]` | one such message |
| LLaMA-Factory, Alpaca form | `instruction`, `input`, `history` | text |
| the SPA-VL authors' code | `question`: text or `[{"from", "value"}]` | text |

The image is in `image` or `images` (at most one). `<image>` in the text of a prompt marks the place
of the image. The mark is removed, and the collator puts one image slot before the first question.
"""

from collections.abc import Iterator
from typing import Any

from spavl_lib.config import ColumnsConfig
from spavl_lib.data.schema import (
    TURN,
)

USER, ASSISTANT = {"human", "user"}, {"assistant", "gpt"}
MARK = "<image>"
Turns = list[tuple[str, str]]  # (role, text)


class RecordError(Exception):
    """A record cannot be read. The message is `field: reason`; the caller adds file and row."""


def once(pairs: list[tuple[str, Any]]) -> "dict | RecordError":
    """Hook for `json.loads`: the object as a dict, or a RecordError if a field occurs twice."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    names = [name for name, _ in pairs]
    repeated = next(n for n in names if names.count(n) > 1)
    return RecordError(f"record: it has the field {repeated!r} twice")


def read_pair(record: dict, columns: ColumnsConfig) -> tuple[dict[str, str], list[str]]:
    """Read prompt, chosen and rejected of a record in any of the layouts.

    Args:
        record: Column name -> value.
        columns: Names of the columns. If a name is empty, the column is recognised.

    Returns:
        The fields that can be read, and a line `field: reason` for each field that cannot be read.
        If the prompt cannot be read, a response that consists of messages is in neither.
    """
    names = {n: getattr(columns, n) or n for n in ("chosen", "rejected")}
    read, lines = {}, []
    answers = {f: record.get(name) for f, name in names.items()}
    for field, name in names.items():
        if answers[field] is None:
            lines.append(f"{field}: missing{'' if name == field else f' (column {name!r})'}")
    head: Turns | None = None
    try:
        head = _prompt(record, columns)
        if head is None and None not in answers.values():
            head, shortened = _shared_beginning(*answers.values())
            answers = dict(zip(answers, shortened, strict=True))
        if head is not None:
            read["prompt"] = conversation(head)
    except RecordError as error:
        lines.append(str(error))
    for field, answer in answers.items():
        if answer is None or (isinstance(answer, list) and "prompt" not in read):
            continue
        try:
            read[field] = _answer(answer, head or [], field)
        except RecordError as error:
            lines.append(str(error))
    return read, lines


def marks(record: dict) -> int:
    """How many `<image>` marks the texts of a record hold."""
    count = 0
    for value in record.values():
        for text in _texts(value):
            count += text.count(MARK)
    return count


def conversation(turns: Turns) -> str:
    """Join turns into a prompt of the schema.

    Raises:
        RecordError: There are no turns, one is a system turn or holds `TURN`, or user and assistant
            do not alternate with the user first and last.
    """
    if not turns:
        raise RecordError("prompt: empty")
    for number, (role, text) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role == "system":
            if text.strip():
                raise RecordError("prompt: a system turn; put it into the model's chat template")
        elif role != expected:
            raise RecordError(f"prompt: turn {number + 1} is the {role}'s, not the {expected}'s")
        if TURN in text:
            raise RecordError("prompt: holds a record separator (U+001E)")
    if turns[-1][0] != "user":
        raise RecordError("prompt: the last turn is not the user's")
    return TURN.join(text for _, text in turns)


def turns_of(value: Any, field: str = "prompt") -> Turns:
    """Turns of a text, or of messages with either kind of keys. Empty system turns are dropped.

    Raises:
        RecordError: A turn has another form.
    """
    if isinstance(value, str):
        return [("user", value)]
    if isinstance(value, dict | RecordError):
        value = [value]
    if not isinstance(value, list):
        raise RecordError(f"{field}: expected text, got {type(value).__name__}")
    turns = []
    for turn in value:
        role, text = _message(turn, field)
        if role != "system" or text.strip():
            turns.append((role, text))
    return turns


def _message(turn: Any, field: str) -> tuple[str, str]:
    if isinstance(turn, RecordError):
        raise turn
    if not isinstance(turn, dict):
        raise RecordError(f"{field}: expected text in a turn, got {type(turn).__name__}")
    speaker = str(turn.get("role", turn.get("from"))).lower()
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # in TRL's layout, content may be a list of parts
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        content = "\n".join(p for p in parts if isinstance(p, str)) if parts else None
    if not isinstance(content, str):
        raise RecordError(f"{field}: expected text in a turn, got {type(content).__name__}")
    for role, names in (("user", USER), ("assistant", ASSISTANT), ("system", {"system"})):
        if speaker in names:
            return role, content
    raise RecordError(f"{field}: unknown speaker {speaker!r}")


def _prompt(record: dict, columns: ColumnsConfig) -> Turns | None:
    """The turns before the response; None if only the responses contain these turns."""
    if columns.prompt:
        if record.get(columns.prompt) is None:
            raise RecordError(f"prompt: missing (column {columns.prompt!r})")
        return unmarked(turns_of(record[columns.prompt]))
    if record.get("conversations") is not None:
        return unmarked(turns_of(record["conversations"]))
    if record.get("instruction") is not None:
        return unmarked(_alpaca(record))
    for name in ("prompt", "question"):
        if record.get(name) is not None:
            return unmarked(turns_of(record[name]))
    return None


def _alpaca(record: dict) -> Turns:
    turns: Turns = []
    if str(record.get("system") or "").strip():
        turns.append(("system", str(record["system"])))
    for pair in record.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError("prompt: history must be a list of [question, answer]")
        turns += [("user", str(pair[0])), ("assistant", str(pair[1]))]
    parts = [str(record.get(n) or "") for n in ("instruction", "input")]
    return [*turns, ("user", "\n".join(p for p in parts if p))]


def _shared_beginning(chosen: Any, rejected: Any) -> tuple[Turns, list]:
    """TRL's implicit prompt: the turns that both responses begin with, and the remaining turns.

    Raises:
        RecordError: The responses have no first turns in common.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0
        for a, b in zip(chosen, rejected, strict=False):
            if a != b:
                break
            shared += 1
        if 0 < shared < min(len(chosen), len(rejected)):
            return unmarked(turns_of(chosen[:shared])), [chosen[shared:], rejected[shared:]]
    raise RecordError("prompt: missing, and the answers have no first turns in common")


def _answer(value: Any, head: Turns, field: str) -> str:
    if isinstance(value, str):
        return value
    turns = turns_of(value, field)
    if len(turns) > 1 and turns[: len(head)] == head:  # the response repeats the prompt's turns
        turns = turns[len(head) :]
    if len(turns) != 1 or turns[0][0] != "assistant":
        raise RecordError(f"{field}: expected one turn of the assistant, got {len(turns)} turns")
    return turns[0][1]


def unmarked(turns: Turns) -> Turns:
    """Turns without `<image>` marks."""
    return [(r, t.replace(MARK, "").strip() if MARK in t else t) for r, t in turns]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
