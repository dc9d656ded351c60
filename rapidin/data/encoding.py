"""Records to token ids, and which tokens count."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise, takewhile
from typing import Any

from rapidin.data.examples import Examples
from rapidin.data.records import EXPECTED_QUERY, FORMS, Record, form_of
from rapidin.errors import UserError


class Status(IntEnum):
    """Why an example has a sketch or has none; stored as uint8 in the cache."""

    OK = 0
    EMPTY = 1  # no text at all
    NO_TARGET = 2  # no token whose loss counts: an empty completion, or all of it cut away
    TOO_LONG = 3  # longer than the context, and such examples are to be skipped
    NONFINITE = 4  # its gradient holds NaN or Inf
    MALFORMED = 5  # cannot be read, and such examples are to be skipped
    TOO_LARGE = 6  # its gradient does not fit into memory, even alone


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as the model sees it. ids and target have one entry a token; `target[t]` is True where the
    loss of predicting token t counts (never for t = 0, which nothing predicts)."""

    ids: list[int]
    target: list[bool]
    status: Status
    truncated: bool = False


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca form with one header: it stays the same where there is an input section."""
    section = f"### Input:\n{input}\n\n" if input else ""
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{section}### Response:\n"
    )


def _known_form(record: Record) -> str:
    form = form_of(record, generations=True)
    if form is None:
        raise UserError(f"a record with the fields {', '.join(map(repr, record)) or 'none'}", EXPECTED_QUERY)
    return form


class Encoder:
    """Records to token ids.

    Prompt and completion are tokenised together where the tokenizer reports offsets (fast ones do): a token
    counts when it reaches past the prompt's end. Other tokenizers take the two apart. What the tokenizer puts
    in front of a text (BOS) is kept, what it would put behind it is not: with `eos`, its end-of-text token
    follows a completion and counts, unless the completion is empty or ends in it. In a chat, all that the
    template writes for the assistant's turns counts, end marks included; it adds its own special tokens.
    Examples of more than max_length tokens are cut at the end ("truncate") or have Status.TOO_LONG ("skip").
    """

    def __init__(
        self, tokenizer: Any, *, eos: bool = True, max_length: int, too_long: str = "truncate"
    ) -> None:
        if too_long not in ("truncate", "skip"):
            raise UserError(f"too_long is {too_long!r}", "give 'truncate' or 'skip'")
        if max_length < 2:
            raise UserError(
                f"max_length is {max_length}", "give 2 or more: the first token is never predicted"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.too_long = too_long
        self._eos: int | None = tokenizer.eos_token_id if eos else None
        special = set(tokenizer.all_special_ids)
        # What the tokenizer itself puts in front of any text.
        self._lead: list[int] = list(takewhile(special.__contains__, tokenizer("a")["input_ids"]))

    def __call__(self, record: Record) -> Encoded:
        """A record of any of the four forms; a missing completion counts as an empty one."""
        if _known_form(record) == "messages":
            return self._encode_messages(record["messages"])
        return self.encode_pair(self.prompt_text(record), self.completion_text(record) or "")

    def check(self, examples: Examples) -> None:
        """Encode every example once; those that a chat template refuses are malformed, or UserError names
        the first."""
        for row, record in examples.good():
            try:
                self(record)
            except UserError as error:
                examples.refuse(row, error)

    def example(self, record: Record | None) -> Encoded:
        """A record, or None for a malformed one."""
        return Encoded([], [], Status.MALFORMED) if record is None else self(record)

    def encode_pair(self, prompt: str, completion: str) -> Encoded:
        text = prompt + completion
        if not text:
            return Encoded([], [], Status.EMPTY)
        lead = self._lead_of(text)
        if self.tokenizer.is_fast:
            ids, spans = self._tokens_and_spans(text)
            target = [end > len(prompt) for _, end in spans]
        else:
            head, tail = self._tokens(prompt), self._tokens(completion)
            ids = head + tail
            target = [False] * len(head) + [True] * len(tail)
        ids = lead + ids
        target = [False] * len(lead) + target
        if completion and self._eos is not None and ids[-1:] != [self._eos]:
            ids.append(self._eos)
            target.append(True)
        return self._finish(ids, target)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt that the model is to continue."""
        return self._lead_of(prompt) + self._tokens(prompt)

    def prompt_text(self, record: Record) -> str:
        """The text up to where the (last) completion starts; "" for a record of the text form."""
        form = _known_form(record)
        if form == "prompt":
            return str(record["prompt"])
        if form == "instruction":
            return alpaca_prompt(record["instruction"], record.get("input") or "")
        if form == "messages":
            messages = record["messages"]
            answered = bool(messages) and messages[-1]["role"] == "assistant"
            return self._render(messages[:-1] if answered else messages, generation=True)
        return ""

    def completion_text(self, record: Record) -> str | None:
        """The (last) completion, or None where it is missing or empty, so that a model is to write it."""
        form = _known_form(record)
        if form == "messages":
            last = record["messages"][-1] if record["messages"] else {"role": "", "content": ""}
            return (last["content"] or None) if last["role"] == "assistant" else None
        return record.get(FORMS[form][-1]) or None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token says; together they are the text. Tokens that are parts of one character say
        nothing, but for the last of them."""
        found: list[str] = []
        begun = read = 0  # some context is decoded again, since what a token says depends on those before
        for end in range(1, len(ids) + 1):
            known, text = self._decode(ids[begun:read]), self._decode(ids[begun:end])
            if end < len(ids) and (len(text) <= len(known) or text.endswith("\ufffd")):
                found.append("")
                continue
            found.append(text[len(known) :])
            begun, read = read, end
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""

    def _encode_messages(self, messages: list[Record]) -> Encoded:
        if not messages:
            return Encoded([], [], Status.EMPTY)
        text = self._render(messages, generation=False)
        spans = self._assistant_spans(messages, text)
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
        """Where the assistant's turns lie in the rendered chat, as [start, end) in characters."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], generation=True)
            through = self._render(messages[: number + 1], generation=False)
            end = self._turn_end(text, through, len(before), message["content"])
            if end is None or not (text.startswith(before) and through.startswith(before)):
                raise UserError(
                    "the chat template rewrites what it has written when a message is added "
                    f"(messages[{number}]), so the assistant's tokens cannot be told apart",
                    "give the data as 'prompt' and 'completion', or the tokenizer a template that only adds",
                )
            spans.append((len(before), end))
        return spans

    @staticmethod
    def _turn_end(text: str, through: str, start: int, content: str) -> int | None:
        """Where the turn that starts at `start` ends in the chat; `through`: the chat up to there."""
        if text.startswith(through):
            return len(through)
        # Some templates write something before the last answer only (Qwen3: an empty thought). The answer
        # itself and its end mark then still stand where the turn starts.
        answer = content.strip()
        turn = answer + through[through.rfind(answer) + len(answer) :]
        return start + len(turn) if text.startswith(turn, start) else None

    def _render(self, messages: list[Record], *, generation: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the data holds chats ('messages'), but the model's tokenizer has no chat template",
                "give the data as 'prompt' and 'completion', or use a model tuned for chats",
            )
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            roles = ", ".join(str(message["role"]) for message in messages) or "none"
            raise UserError(
                f"the chat template refuses a chat with the roles {roles}: {error or type(error).__name__}",
                "give chats as the model's template expects them",
            ) from error

    def _lead_of(self, text: str) -> list[int]:
        # A rendered chat may carry its own BOS; a second one would be a different text.
        bos = self.tokenizer.bos_token
        return [] if bos and text.startswith(bos) else list(self._lead)

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


def by_length(chosen: Sequence[int], encoded: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
    """Batches of at most batch_tokens padded tokens, of examples of like length; the longest are last."""
    batches: list[list[int]] = []
    for n in sorted(chosen, key=lambda n: (len(encoded[n].ids), n)):
        longest = len(encoded[n].ids)
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(n)
        else:
            batches.append([n])
    return batches
