"""Records as token ids, which tokens count in the loss, and batches of examples of similar length."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise, takewhile
from typing import Any, Protocol

from rapidin.data.records import TEXTS, Record, message_counts, tokens_of
from rapidin.errors import UserError


class Status(IntEnum):
    """Why an example has a sketch or has none; stored as uint8 in the cache."""

    OK = 0
    EMPTY = 1  # no text at all
    NO_TARGET = 2  # no token whose loss counts: an empty completion, or one that is truncated to nothing
    TOO_LONG = 3  # longer than the context, where such examples are skipped
    NONFINITE = 4  # its gradient has NaN or Inf
    MALFORMED = 5  # cannot be read, where such examples are skipped
    TOO_LARGE = 6  # its gradient does not fit into memory, even alone


class AnyExample(Protocol):
    """An example as a task reads it (`rapidin.tasks`).

    length: positions that the model computes for it, by which batches are made; status: why it has no sketch;
    truncated: whether some of it was left out.
    """

    @property
    def length(self) -> int: ...

    @property
    def status(self) -> Status: ...

    @property
    def truncated(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as a causal model reads it.

    ids and target have one entry per token; `target[t]` is True if the loss of predicting token t counts
    (never for t = 0, which nothing predicts).
    """

    ids: list[int]
    target: list[bool]
    status: Status
    truncated: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca template, with the same header whether or not there is an input section."""
    section = f"### Input:\n{input}\n\n" if input else ""
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{section}### Response:\n"
    )


def _known_form(record: Record) -> str:
    form = TEXTS.of(record, generations=True)
    if form is None:
        fields = ", ".join(map(repr, record)) or "none"
        raise UserError(
            f"a record has none of the known forms; its fields are {fields}", TEXTS.expected_query
        )
    return form


def _answer_start(counts: list[bool]) -> int:
    """Where the tokens begin that count; the end if none does."""
    return counts.index(True) if True in counts else len(counts)


class Encoder:
    """Encodes records as token ids.

    Prompt and completion are tokenised together if the tokenizer reports offsets (fast ones do): a token
    counts if it reaches past the prompt's end. Other tokenizers get the two separately. What the tokenizer
    puts before a text (BOS) is kept, what it would put after it is not: with `eos`, its end-of-text token
    follows a completion and counts, unless the completion is empty or ends in it. In a chat, everything that
    the template writes for the assistant's turns counts, or for the last of them alone (turns="last"), end
    marks included; the template adds its own special tokens. Examples of more than max_length tokens are cut
    at the end ("truncate") or get Status.TOO_LONG ("skip").
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos: bool = True,
        max_length: int,
        too_long: str = "truncate",
        turns: str = "all",
    ) -> None:
        if too_long not in ("truncate", "skip"):
            raise UserError(f"unknown too_long {too_long!r}", "use 'truncate' or 'skip'")
        if max_length < 2:
            raise UserError(
                f"max_length must be at least 2, got {max_length}", "the first token is never predicted"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.too_long, self.turns = too_long, turns
        self.eos = eos
        self._eos: int | None = tokenizer.eos_token_id if eos else None
        special = set(tokenizer.all_special_ids)
        # The special tokens that the tokenizer itself puts before any text.
        self._prefix: list[int] = list(takewhile(special.__contains__, tokenizer("a")["input_ids"]))

    def __call__(self, record: Record) -> Encoded:
        """A record of any of the forms; a missing completion counts as an empty one."""
        form = _known_form(record)
        if form == "messages":
            return self._encode_messages(record["messages"])
        if form == "tokens":
            return self._encode_tokens(record)
        return self.encode_pair(self.prompt_text(record), self.completion_text(record) or "")

    def encode_pair(self, prompt: str, completion: str) -> Encoded:
        """The encoding of a prompt and its completion; the tokens of the completion count."""
        text = prompt + completion
        if not text:
            return Encoded([], [], Status.EMPTY)
        prefix = self._prefix_of(text)
        if self.tokenizer.is_fast:
            ids, spans = self._tokens_and_spans(text)
            target = [end > len(prompt) for _, end in spans]
        else:
            prompt_ids, completion_ids = self._tokens(prompt), self._tokens(completion)
            ids = prompt_ids + completion_ids
            target = [False] * len(prompt_ids) + [True] * len(completion_ids)
        ids = prefix + ids
        target = [False] * len(prefix) + target
        if completion and self._eos is not None and ids[-1:] != [self._eos]:
            ids.append(self._eos)
            target.append(True)
        return self._finish(ids, target)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt that the model is to continue."""
        return self._prefix_of(prompt) + self._tokens(prompt)

    def prompt_text(self, record: Record) -> str:
        """The text before the (last) completion; "" for a record of the text form."""
        form = _known_form(record)
        if form == "prompt":
            return str(record["prompt"])
        if form == "instruction":
            return alpaca_prompt(record["instruction"], record.get("input") or "")
        if form == "messages":
            messages = record["messages"]
            answered = bool(messages) and messages[-1]["role"] == "assistant"
            return self._render(messages[:-1] if answered else messages, generation=True)
        if form == "tokens":
            ids, counts = tokens_of(record)
            return self._decode(ids[: _answer_start(counts)])
        return ""

    def completion_text(self, record: Record) -> str | None:
        """The (last) completion, or None if it is missing or empty and the model has to generate it."""
        form = _known_form(record)
        if form == "messages":
            last = record["messages"][-1] if record["messages"] else {"role": "", "content": ""}
            return (last["content"] or None) if last["role"] == "assistant" else None
        if form == "tokens":
            ids, counts = tokens_of(record)
            return self._decode(ids[_answer_start(counts) :]) or None
        return record.get(TEXTS.fields[form][-1]) or None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; concatenated they are the whole text. Of several tokens that make up one
        character, the last has its text and the others have none."""
        texts: list[str] = []
        # The text of a token depends on those before it, so the tokens since `start` are decoded again.
        start = done = 0
        for end in range(1, len(ids) + 1):
            before, text = self._decode(ids[start:done]), self._decode(ids[start:end])
            if end < len(ids) and (len(text) <= len(before) or text.endswith("\ufffd")):
                texts.append("")
                continue
            texts.append(text[len(before) :])
            start, done = done, end
        return texts

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""

    def _encode_tokens(self, record: Record) -> Encoded:
        ids, counts = tokens_of(record)
        if not ids:
            return Encoded([], [], Status.EMPTY)
        if max(ids) >= len(self.tokenizer):
            raise UserError(
                f"input_ids has the token {max(ids)}, but the tokenizer has {len(self.tokenizer):,} tokens",
                "use the tokenizer that made the data",
            )
        return self._finish(ids, counts)

    def _encode_messages(self, messages: list[Record]) -> Encoded:
        if not messages:
            return Encoded([], [], Status.EMPTY)
        text = self._render(messages, generation=False)
        spans = self._assistant_spans(messages, text)
        if self.turns == "last":
            spans = spans[-1:]
        if self.tokenizer.is_fast:
            ids, offsets = self._tokens_and_spans(text)
            target = [any(start < last and end > first for first, last in spans) for start, end in offsets]
        else:
            ids, target = [], []
            edges = [0, *(edge for span in spans for edge in span), len(text)]
            for number, (start, end) in enumerate(pairwise(edges)):
                piece = self._tokens(text[start:end])
                ids += piece
                target += [number % 2 == 1] * len(piece)
        return self._finish(ids, target)

    def _assistant_spans(self, messages: list[Record], text: str) -> list[tuple[int, int]]:
        """The ranges of the assistant's turns in the rendered chat, as [start, end) in characters."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or not message_counts(message):
                continue
            before = self._render(messages[:number], generation=True)
            through = self._render(messages[: number + 1], generation=False)
            end = self._turn_end(text, through, len(before), message["content"])
            if end is None or not (text.startswith(before) and through.startswith(before)):
                raise UserError(
                    "the chat template changes earlier text when a message is added "
                    f"(messages[{number}]), so the assistant's tokens cannot be located",
                    "give the data as 'prompt' and 'completion', or use a template that only appends",
                )
            spans.append((len(before), end))
        return spans

    @staticmethod
    def _turn_end(text: str, through: str, start: int, content: str) -> int | None:
        """The end of the turn that starts at `start` in the chat, or None if it cannot be located. through:
        the chat rendered up to this turn."""
        if text.startswith(through):
            return len(through)
        # Some templates write something before the last answer only (Qwen3: an empty thought). Earlier turns
        # then still start with the answer itself and its end mark.
        answer = content.strip()
        turn = answer + through[through.rfind(answer) + len(answer) :]
        return start + len(turn) if text.startswith(turn, start) else None

    def _render(self, messages: list[Record], *, generation: bool) -> str:
        return render_chat(self.tokenizer, messages, generation=generation)

    def _prefix_of(self, text: str) -> list[int]:
        # A rendered chat may have its own BOS; a second one would make it a different text.
        bos = self.tokenizer.bos_token
        return [] if bos and text.startswith(bos) else list(self._prefix)

    def _tokens(self, text: str) -> list[int]:
        return (
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        )

    def _tokens_and_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoding["input_ids"]), list(encoding["offset_mapping"])

    def _finish(self, ids: list[int], target: list[bool]) -> Encoded:
        target[:1] = [False] * len(target[:1])
        truncated = False
        if len(ids) > self.max_length:
            if self.too_long == "skip":
                return Encoded(ids, target, Status.TOO_LONG)
            ids, target, truncated = ids[: self.max_length], target[: self.max_length], True
        return Encoded(ids, target, Status.OK if any(target) else Status.NO_TARGET, truncated)


def render_chat(tokenizer: Any, messages: list[Record], *, generation: bool) -> str:
    """A chat as the tokenizer's template writes it; generation: up to where the assistant begins to speak.

    Raises UserError if there is no template, or it rejects the chat.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the data has chats ('messages'), but the model's tokenizer has no chat template",
            "give the data as 'prompt' and 'completion', or use a model tuned for chats",
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(str(message["role"]) for message in messages) or "none"
        raise UserError(
            f"the chat template rejects a chat with the roles {roles}: {error or type(error).__name__}",
            "give chats in the form that the model's template expects",
        ) from error


def by_length(chosen: Sequence[int], encoded: Sequence[AnyExample], batch_tokens: int) -> list[list[int]]:
    """Batches of at most batch_tokens padded tokens, of examples of similar length, the longest last. A
    single example that is longer has a batch of its own.

    No batch has as many examples as tokens in the longest of them, so that the axes of its tensors can be
    told apart by their sizes.
    """
    batches: list[list[int]] = []
    for n in sorted(chosen, key=lambda n: (encoded[n].length, n)):
        longest = encoded[n].length
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(n)
        else:
            batches.append([n])
    for at in reversed(range(len(batches))):
        batch = batches[at]
        if len(batch) == encoded[batch[-1]].length > 1:
            batches[at : at + 1] = [batch[:1], batch[1:]]
    return batches
