"""Records as token ids, which tokens count in the loss, and batches of examples of similar length."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise, takewhile
from typing import Any, Protocol

from rapidin.data.chats import Chat, ChatTemplate
from rapidin.data.records import TEXTS, Record, message_counts, text_of_message, tokens_of
from rapidin.data.turns import Turns, alike
from rapidin.errors import UserError, short


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


def answer_start(counts: Sequence[bool]) -> int:
    """Where the tokens begin that count; the end if none does."""
    return counts.index(True) if True in counts else len(counts)


class Encoder:
    """Encodes records as token ids.

    Prompt and completion are tokenised together if the tokenizer reports offsets (fast ones do): a token
    counts if it reaches past the prompt's end. Other tokenizers get the two separately. What the tokenizer
    puts before a text (BOS) is kept, what it would put after it is not: with `eos`, its end-of-text token
    follows a completion and counts, unless the completion is empty or ends in it. In a chat, what the
    template marks by `{% generation %}` counts, or else everything that it writes for the assistant's turns,
    end marks included, or for the last of them alone (turns="last"); of a chat with a prompt and a completion
    all that follows the prompt counts. The template adds its own special tokens. Examples of more than
    max_length tokens are cut at the end ("truncate") or get Status.TOO_LONG ("skip").

    date: what a template writes as the present (`rapidin.data.chats.ChatTemplate`); rows: number of tokens
    that the model has an embedding of, None if that is not known.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos: bool = True,
        max_length: int,
        too_long: str = "truncate",
        turns: str = "all",
        date: str | None = None,
        rows: int | None = None,
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
        self.chats, self.rows = ChatTemplate(tokenizer, date), rows
        self.eos = eos
        self._eos: int | None = tokenizer.eos_token_id if eos else None
        special = set(tokenizer.all_special_ids)
        # The special tokens that the tokenizer itself puts before any text.
        self._prefix: list[int] = list(takewhile(special.__contains__, tokenizer("a")["input_ids"]))

    def dated(self, date: str | None) -> Encoder:
        """The same encoder with another date."""
        other = copy.copy(self)
        other.chats = ChatTemplate(self.tokenizer, date)
        return other

    def __call__(self, record: Record) -> Encoded:
        """A record of any of the forms; a missing completion counts as an empty one."""
        form = _known_form(record)
        if form == "messages":
            chat = Chat.of(record)
            return self.encode_chat(replace(chat, prompt=None) if self.turns == "last" else chat)
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
            chat = Chat.of(record)
            count = len(chat.messages)
            answered = bool(count) and chat.messages[-1]["role"] == "assistant"
            if answered and count == 1:
                text = self.chats.text(chat)
                spans = Turns(self.chats, chat, text).spans(last=True)
                return text[: spans[0][0]] if spans else text
            return self.chats.text(chat.to(count - answered), generation=True)
        if form == "tokens":
            ids, counts = tokens_of(record)
            return self._decode(ids[: answer_start(counts)])
        return ""

    def completion_text(self, record: Record) -> str | None:
        """The (last) completion, or None if it is missing or empty and the model has to generate it."""
        form = _known_form(record)
        if form == "messages":
            last = record["messages"][-1] if record["messages"] else {"role": ""}
            return (text_of_message(last) or None) if last["role"] == "assistant" else None
        if form == "tokens":
            ids, counts = tokens_of(record)
            return self._decode(ids[answer_start(counts) :]) or None
        return record.get(TEXTS.fields[form][-1]) or None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token (`pieces_of`)."""
        return pieces_of(self.tokenizer, ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded(self.tokenizer, ids)

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

    def encode_chat(self, chat: Chat) -> Encoded:
        """The encoding of a chat; the tokens of the completion count, or those of the assistant's turns."""
        if not chat.messages:
            return Encoded([], [], Status.EMPTY)
        text = self.chats.text(chat)
        made = self._finish(*self._chat_tokens(chat, text))
        self.chats.count(chat, text)
        return made

    def _chat_tokens(self, chat: Chat, text: str) -> tuple[list[int], list[bool]]:
        """The tokens of a chat's text, and which of them count."""
        prompt = self._prompt_of(chat)
        if not self.tokenizer.is_fast:
            if prompt is not None:
                return self._pieces_of(text, [(alike(prompt, text), len(text))])
            return self._pieces_of(text, Turns(self.chats, chat, text).spans(last=self.turns == "last"))
        ids, offsets = self._tokens_and_spans(text)

        def shared(before: str) -> int:
            """Number of tokens that another text begins with too."""
            pairs = zip(self._tokens(before), ids, strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

        if prompt is not None:
            start = shared(prompt)
            return ids, [n >= start for n in range(len(ids))]
        ends = [*(first for first, _ in offsets), len(text)]
        turns = Turns(self.chats, chat, text, lambda before: ends[shared(before)])
        spans = turns.spans(last=self.turns == "last")
        return ids, [any(start < last and end > first for first, last in spans) for start, end in offsets]

    def _prompt_of(self, chat: Chat) -> str | None:
        """The text before the completion of a chat that has one, all of which counts."""
        if chat.prompt is None or not all(map(message_counts, chat.messages[chat.prompt :])):
            return None
        return self.chats.text(chat.to(chat.prompt), generation=True)

    def _pieces_of(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The tokens of a text that is tokenised in pieces, of which the spans count."""
        ids: list[int] = []
        target: list[bool] = []
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for number, (start, end) in enumerate(pairwise(edges)):
            piece = self._tokens(text[start:end])
            ids += piece
            target += [number % 2 == 1] * len(piece)
        return ids, target

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
        if self.rows is not None and ids and max(ids) >= self.rows:
            raise unknown_token(self.tokenizer, max(ids), self.rows)
        target[:1] = [False] * len(target[:1])
        truncated = False
        if len(ids) > self.max_length:
            if self.too_long == "skip":
                return Encoded(ids, target, Status.TOO_LONG)
            ids, target, truncated = ids[: self.max_length], target[: self.max_length], True
        return Encoded(ids, target, Status.OK if any(target) else Status.NO_TARGET, truncated)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, as it is."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; concatenated they are the whole text. Of several tokens that make up one
    character, the last has its text and the others have none."""
    texts: list[str] = []
    # The text of a token depends on those before it, so the tokens since `start` are decoded again.
    start = done = 0
    for end in range(1, len(ids) + 1):
        before, text = decoded(tokenizer, ids[start:done]), decoded(tokenizer, ids[start:end])
        if end < len(ids) and (len(text) <= len(before) or text.endswith("\ufffd")):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, done = done, end
    return texts


def unknown_token(tokenizer: Any, token: int, rows: int) -> UserError:
    """The error of a text with a token that the model has no embedding of; rows: number of those it has."""
    return UserError(
        f"the text has the token {token} ({short(repr(tokenizer.decode([token])))}), but the model has "
        f"embeddings of {rows:,} tokens",
        "name the one that the model was tuned with as `tokenizer`, or the model that has its tokens",
    )


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
