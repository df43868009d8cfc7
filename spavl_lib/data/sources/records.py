"""Read preference records in several layouts. A record has a prompt, two responses and an image.

| layout | prompt | responses |
|---|---|---|
| TRL | `prompt`: text or `[{"role", "content"}]`, or only inside the responses | text or messages |
| LLaMA-Factory, ShareGPT form | `conversations`: `[{"from", "value"}]` | one such message |
| LLaMA-Factory, Alpaca form | `instruction`, `input`, `history` | text |
| the SPA-VL authors' code | `question`: text or `[{"from", "value"}]` | text |

The images are in `image` or `images`, or in parts of messages (`{"type": "image_url"}` and others).
`<image>` in the text of a prompt marks the place of an image. The marks are removed, and the
collator puts one slot for each image, in order, before the first question.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spavl_lib.config import ColumnsConfig
from spavl_lib.data.schema import (
    TURN,
)

USER, ASSISTANT = {"human", "user"}, {"assistant", "gpt"}
MARK = "<image>"
# SYSTEM: columns that hold a system turn. UNREADABLE: columns whose content cannot become part of a
# prompt here.
SYSTEM = ("system", "system_prompt", "system_message")
UNREADABLE = ("tools", "functions")
IMAGE_PARTS = ("image", "image_url", "input_image")
TEXT_PARTS = ("text", "input_text", "output_text")
# Keys that hold the image of a message part, as TRL, OpenAI, Anthropic and Qwen name them.
PART_KEYS = ("image", "image_url", "url", "path", "base64", "source", "data", "bytes")


class Turn(NamedTuple):
    """One message."""

    role: str
    text: str
    images: tuple[Any, ...] = ()
    """Images that the parts of the message hold."""
    places: int = 0
    """Number of parts that mark the place of an image which the record holds elsewhere."""


Turns = list[Turn]


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


@dataclass
class Read:
    """The result of reading a record."""

    fields: dict[str, str] = field(default_factory=dict)
    """`prompt`, `chosen` and `rejected` -> text, without the fields that cannot be read. If the
    prompt cannot be read, a response that consists of messages is missing too."""
    problems: list[str] = field(default_factory=list)
    """A line `field: reason` for each field that cannot be read."""
    images: list[Any] = field(default_factory=list)
    """Images that message parts hold."""
    marks: int = 0
    """How many images the text marks."""
    turns: int = 0
    """Number of turns of the prompt that hold or mark an image."""

    def look(self, turns: Iterable[Turn]) -> None:
        """Add the images and marks of some turns.

        A part of a message and an `<image>` in its text may mark the same image, so only the larger
        of the two numbers is added to `marks`.
        """
        turns = list(turns)
        self.turns += sum(bool(t.images or t.places or MARK in t.text) for t in turns)
        self.images += [image for turn in turns for image in turn.images]
        places = sum(turn.places + len(turn.images) for turn in turns)
        self.marks += max(places, sum(turn.text.count(MARK) for turn in turns))


def read_pair(record: dict, columns: ColumnsConfig) -> Read:
    """Read prompt, chosen and rejected of a record in any of the layouts.

    Args:
        record: Column name -> value.
        columns: Names of the columns. If a name is empty, the column is recognised.
    """
    names = {n: getattr(columns, n) or n for n in ("chosen", "rejected")}
    result = Read()
    read, lines = result.fields, result.problems
    answers = {f: record.get(name) for f, name in names.items()}
    for side, name in names.items():
        if answers[side] is None:
            lines.append(f"{side}: missing{'' if name == side else f' (column {name!r})'}")
    lines += unreadable(record, columns)
    head: Turns | None = None
    try:
        head = _prompt(record, columns)
        if head is None and None not in answers.values():
            head, shortened = _shared_beginning(*answers.values())
            answers = dict(zip(answers, shortened, strict=True))
        if head is not None:
            result.look(head)
            read["prompt"] = conversation(unmarked(head))
    except RecordError as error:
        lines.append(str(error))
    sides = []
    for name, answer in answers.items():
        if answer is None or (isinstance(answer, list) and "prompt" not in read):
            continue
        try:
            turn = _answer(answer, head or [], name)
        except RecordError as error:
            lines.append(str(error))
            continue
        read[name] = turn.text
        seen = Read()
        seen.look([turn])
        sides.append(seen)
    result.marks += max((seen.marks for seen in sides), default=0)
    for seen in sides:  # both responses may hold the same image
        result.images += [i for i in seen.images if seen is sides[0] or i not in sides[0].images]
    return result


def read_prompt(record: dict, columns: ColumnsConfig) -> Read:
    """Read the prompt of a record without responses, in any of the layouts.

    Args:
        record: Column name -> value.
        columns: Names of the columns. If a name is empty, the column is recognised.
    """
    result = Read(problems=unreadable(record, columns))
    try:
        head = _prompt(record, columns)
        if head is None:
            raise RecordError("prompt: missing")
        result.look(head)
        result.fields["prompt"] = conversation(unmarked(head))
    except RecordError as error:
        result.problems.append(str(error))
    return result


def unreadable(record: Mapping, columns: ColumnsConfig) -> list[str]:
    """A line for each column that belongs to the prompt but cannot become part of a prompt here."""
    lines = [
        f"prompt: a system turn (column {name!r}); put it into the model's chat template"
        for name in SYSTEM
        if name != columns.prompt and str(record.get(name) or "").strip()
    ]
    unread = [name for name in UNREADABLE if record.get(name) not in (None, "", "[]", [])]
    if record.get("instruction") is None and isinstance(record.get("history"), list):
        unread += ["history"] if record["history"] else []
    return lines + [
        f"prompt: column {name!r} cannot be made part of the prompt; empty or remove it"
        for name in unread
        if name != columns.prompt
    ]


def conversation(turns: Turns) -> str:
    """Join turns into a prompt of the schema.

    Raises:
        RecordError: There are no turns, a turn is a system turn or contains `TURN`, or user and
            assistant do not alternate with the user first and last.
    """
    if not turns:
        raise RecordError("prompt: empty")
    for number, (role, text, *_) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role == "system":
            if text.strip():
                raise RecordError("prompt: a system turn; put it into the model's chat template")
        elif role != expected:
            raise RecordError(f"prompt: turn {number + 1} is the {role}'s, not the {expected}'s")
        if TURN in text:
            raise RecordError("prompt: holds a record separator (U+001E)")
    if turns[-1].role != "user":
        raise RecordError("prompt: the last turn is not the user's")
    return TURN.join(turn.text for turn in turns)


def turns_of(value: Any, field: str = "prompt") -> Turns:
    """Turns of a text, or of messages. Empty system turns are dropped.

    A message has the keys `role` and `content`, or `from` and `value`.

    Raises:
        RecordError: The value or a turn has another form.
    """
    if isinstance(value, str):
        return [Turn("user", value)]
    if isinstance(value, dict | RecordError):
        value = [value]
    if not isinstance(value, list):
        raise RecordError(f"{field}: expected text, got {type(value).__name__}")
    turns = []
    for turn in value:
        message = _message(turn, field)
        if message.role != "system" or message.text.strip():
            turns.append(message)
    return turns


def _message(turn: Any, field: str) -> Turn:
    if isinstance(turn, RecordError):
        raise turn
    if not isinstance(turn, dict):
        raise RecordError(f"{field}: expected text in a turn, got {type(turn).__name__}")
    # In a table every turn has the keys of both spellings, and those of one spelling are empty.
    speaker, content = turn.get("role"), turn.get("content")
    speaker = str(turn.get("from") if speaker is None else speaker).lower()
    content = turn.get("value") if content is None else content
    images: list[Any] = []
    places = 0
    if isinstance(content, list):  # in TRL's layout, content may be a list of parts
        texts = []
        for part in content:
            text, image = _part(part, field)
            texts += [] if text is None else [text]
            images += [] if image is None else [image]
            places += text is None and image is None
        content = "\n".join(texts) if texts else None
    if not isinstance(content, str):
        raise RecordError(f"{field}: expected text in a turn, got {type(content).__name__}")
    for role, names in (("user", USER), ("assistant", ASSISTANT), ("system", {"system"})):
        if speaker in names:
            return Turn(role, content, tuple(images), places)
    raise RecordError(f"{field}: unknown speaker {speaker!r}")


def _part(part: Any, field: str) -> tuple[str | None, Any]:
    """The text and the image of a message part; one of them is None.

    Both are None if the part only marks the place of an image that the record holds elsewhere.

    Raises:
        RecordError: The part is of another type, such as audio.
    """
    if isinstance(part, str):
        return part, None
    if not isinstance(part, dict):
        raise RecordError(f"{field}: expected text in a turn, got {type(part).__name__}")
    kind = part.get("type")
    if kind is None:  # Qwen names no type; the name of the part's only field is the type
        known = (*TEXT_PARTS, *IMAGE_PARTS)
        kind = next((name for name in known if part.get(name) is not None), None)
    if kind in TEXT_PARTS:
        text = part.get("text", part.get(kind))
        if not isinstance(text, str):
            raise RecordError(f"{field}: expected text in a turn, got {type(text).__name__}")
        return text, None
    if kind not in IMAGE_PARTS:
        raise RecordError(f"{field}: a part of type {kind!r}; only text and images are read")
    return None, next((part[key] for key in PART_KEYS if part.get(key)), None)


def _prompt(record: dict, columns: ColumnsConfig) -> Turns | None:
    """The turns before the response; None if only the responses contain these turns."""
    if columns.prompt == "instruction" and record.get("instruction") is not None:
        return _alpaca(record)
    if columns.prompt:
        if record.get(columns.prompt) is None:
            raise RecordError(f"prompt: missing (column {columns.prompt!r})")
        return turns_of(record[columns.prompt])
    if record.get("conversations") is not None:
        return turns_of(record["conversations"])
    if record.get("instruction") is not None:
        return _alpaca(record)
    for name in ("prompt", "question"):
        if record.get(name) is not None:
            return turns_of(record[name])
    return None


def _alpaca(record: dict) -> Turns:
    turns: Turns = []
    for pair in record.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError("prompt: history must be a list of [question, answer]")
        turns += [Turn("user", str(pair[0])), Turn("assistant", str(pair[1]))]
    parts = [str(record.get(n) or "") for n in ("instruction", "input")]
    return [*turns, Turn("user", "\n".join(p for p in parts if p))]


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
            return turns_of(chosen[:shared]), [chosen[shared:], rejected[shared:]]
    raise RecordError("prompt: missing, and the answers have no first turns in common")


def _answer(value: Any, head: Turns, field: str) -> Turn:
    if isinstance(value, str):
        return Turn("assistant", value)
    turns = turns_of(value, field)
    repeated = [turn[:2] for turn in unmarked(turns[: len(head)])]
    if len(turns) > 1 and repeated == [turn[:2] for turn in unmarked(head)]:
        turns = turns[len(head) :]  # the response repeats the prompt's turns
    if len(turns) != 1 or turns[0].role != "assistant":
        raise RecordError(f"{field}: expected one turn of the assistant, got {len(turns)} turns")
    return turns[0]


def unmarked(turns: Turns) -> Turns:
    """Turns without `<image>` marks."""
    return [
        turn._replace(text=turn.text.replace(MARK, "").strip()) if MARK in turn.text else turn
        for turn in turns
    ]
