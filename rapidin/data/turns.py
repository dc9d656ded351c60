"""Where the assistant's turns are in a chat that a template has written.

The start of a turn is found by rendering the messages before it with the template's generation prompt, the
end by rendering the messages through it. A template may write these otherwise in the whole chat: it may strip
earlier thoughts, or write something at the end of a chat only. Then the contents of messages are located by
rendering the chat with another content.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property

from rapidin.data.chats import SENTINEL, Chat, ChatTemplate
from rapidin.data.records import Record, message_counts
from rapidin.errors import UserError

_HEADER_COUNTS = (
    "the chat template has no generation prompt, and the header of the assistant's turns is not found: it "
    "counts as answer"
)


class Turns:
    """The assistant's turns in a chat's text.

    boundary: of another text, where the first token begins in `text` that the two do not share; None: where
    the first character does.
    """

    def __init__(
        self,
        template: ChatTemplate,
        chat: Chat,
        text: str,
        boundary: Callable[[str], int] | None = None,
    ) -> None:
        self._template, self._chat, self._text = template, chat, text
        self._messages = chat.messages
        self._boundary = boundary or (lambda other: alike(other, text))
        self._rendered = cache(self._render)
        self._content = cache(self._locate_content)

    def spans(self, *, last: bool = False) -> list[tuple[int, int]]:
        """The turns whose tokens count, or the last one alone, as [start, end) in characters.

        Raises UserError if a turn cannot be located.
        """
        numbers = [n for n, message in enumerate(self._messages) if message["role"] == "assistant"]
        counted = [n for n in numbers if message_counts(self._messages[n])]
        counted = counted[-1:] if last else counted
        marked = self._template.marked(self._chat, self._text)
        if marked is None:
            return [self._span(number) for number in counted]
        if counted == numbers:
            return marked
        if len(marked) == len(numbers):
            return [span for number, span in zip(numbers, marked, strict=True) if number in counted]
        ranges = [(self._whole_start(number), self._span(number)[1]) for number in counted]
        return [(a, b) for a, b in marked if any(first <= a < end for first, end in ranges)]

    def _span(self, number: int) -> tuple[int, int]:
        start = self._start(number)
        end = None if start is None else self._end(number, start)
        if start is None or end is None:
            raise UserError(
                "the chat template changes earlier text when a message is added "
                f"(messages[{number}]), so the assistant's tokens cannot be located",
                "give the data as 'prompt' and 'completion', or use a template that only appends",
            )
        return start, end

    def _whole_start(self, number: int) -> int:
        """Where a turn starts with its header."""
        return alike(self._rendered(number, False), self._text) if number else 0

    # ---------------------------------------------------------------------------------------------- start

    def _start(self, number: int) -> int | None:
        if not number:
            return self._first_start()
        before, plain = self._rendered(number, True), self._rendered(number, False)
        if self._text.startswith(before):
            return len(before) + (self._header(number, before) if before == plain else 0)
        # The generation prompt may open a thought that the turn does not have.
        if before.startswith(plain) and self._text.startswith(plain):
            return max(len(plain), self._boundary(before))
        return self._start_after_content(number)

    def _first_start(self) -> int:
        """The start of a turn that no message precedes: behind the generation prompt, if the template writes
        it there, or else behind what it writes before a content."""
        shared = 0
        with suppress(UserError):
            asked = self._chat.to(0, {"role": "user", "content": SENTINEL})
            shared = alike(self._text, self._template.text(asked))
        prompt = self._generation_prompt
        lengths = [alike(self._text[at:], prompt) for at in range(shared + 1)]
        best = max(range(shared + 1), key=lambda at: (lengths[at], -at))
        if prompt[: lengths[best]].strip():
            return best + lengths[best]
        return shared + self._header(0, self._text[:shared])

    def _header(self, number: int, before: str) -> int:
        """The length of what the template writes before an answer that follows the text `before`; 0 if that
        is blank."""
        answer = self._chat.to(number, {"role": "assistant", "content": SENTINEL})
        with suppress(UserError):
            text = self._template.text(answer)
            at = text.find(SENTINEL)
            if text.startswith(before) and at >= len(before):
                header = text[len(before) : at]
                if not header.strip() or self._text.startswith(header, len(before)):
                    return len(header) if header.strip() else 0
        self._template.unplaced[_HEADER_COUNTS] += 1
        return 0

    def _start_after_content(self, number: int) -> int | None:
        """The start by what follows the content of the message before."""
        previous, own = self._content(number - 1), self._content(number)
        if previous is None or own is None or previous[1] > own[0]:
            return None
        earlier = self._chat.to(number - 1, _with_sentinel(self._messages[number - 1]))
        follows = self._after_sentinel(self._template.text(earlier, generation=True))
        between = self._text[previous[1] : own[0]]
        if follows is None or (between and not alike(follows, between)):
            return None
        return previous[1] + alike(follows, between)

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes where the assistant begins to speak; "" if that is not known."""
        asked = self._chat.to(0, {"role": "user", "content": SENTINEL})
        with suppress(UserError):
            plain, prompted = (self._template.text(asked, generation=each) for each in (False, True))
            return prompted.removeprefix(plain) if prompted.startswith(plain) else ""
        return ""

    # ------------------------------------------------------------------------------------------------ end

    def _end(self, number: int, start: int) -> int | None:
        if number == len(self._messages) - 1:
            return len(self._text)
        through = self._rendered(number + 1, False)
        if self._text.startswith(through):
            return len(through)
        # A template may end a chat otherwise than a turn that others follow.
        prompt = self._generation_prompt
        prompted = self._rendered(number + 1, True) if prompt else ""
        if prompted.endswith(prompt) and prompted != through:
            ended = prompted[: -len(prompt)]
            if len(ended) > start and self._text.startswith(ended):
                return len(ended)
        return self._end_after_content(number) or self._end_before_next(number, start)

    def _end_after_content(self, number: int) -> int | None:
        """The end by what follows the turn's content."""
        own, after = self._content(number), self._next(number)
        following = self._content(after)
        if own is None or following is None or own[1] > following[0]:
            return None
        through = self._template.text(self._chat.to(number, _with_sentinel(self._messages[number])))
        follows = self._after_sentinel(through)
        if follows is None:
            return None
        between = self._text[own[1] : following[0]]
        if between.startswith(follows):
            return own[1] + len(follows)
        header = self._header_of(self._messages[after], between)
        if header:
            return following[0] - len(header)
        return own[1] + alike(follows, between) or None

    def _next(self, number: int) -> int:
        """The number of the next message that the template writes: it may leave out those of some roles."""
        for after in range(number + 1, len(self._messages) - 1):
            others = [*self._messages[:after], *self._messages[after + 1 :]]
            with suppress(UserError):
                if self._template.text(Chat(others, self._chat.arguments)) == self._text:
                    continue
            return after
        return len(self._messages) - 1

    def _header_of(self, message: Record, between: str) -> str:
        """What the template writes at the end of `between` to begin a message of this role; "" if that is not
        known."""
        with suppress(UserError):
            alone = self._template.text(self._chat.to(0, _with_sentinel(message)))
            before = alone[: max(0, alone.find(SENTINEL))]
            length = alike(before[::-1], between[::-1])
            return between[len(between) - length :] if length < len(between) else ""
        return ""

    def _end_before_next(self, number: int, start: int) -> int | None:
        """The end of a turn whose content is not found, such as one of tool calls: as if it were the last,
        without the thought that may then begin it, or where the header of the next message begins."""
        before, through = self._rendered(number, True), self._rendered(number + 1, False)
        turn = through[alike(before, through) :]
        for at in range(len(turn) // 2):
            if self._text.startswith(turn[at:], start):
                return start + len(turn) - at
        after = self._next(number)
        following, message = self._content(after), self._messages[after]
        if following is None or following[0] < start:
            return None
        between = self._text[start : following[0]]
        header = ""
        with suppress(UserError):
            rendered = self._template.text(self._chat.to(number + 1, _with_sentinel(message)))
            if rendered.startswith(through) and SENTINEL in rendered[len(through) :]:
                header = rendered[len(through) : rendered.index(SENTINEL)]
        if not header or not between.endswith(header):
            header = self._header_of(message, between)
        return following[0] - len(header) if header else None

    # ------------------------------------------------------------------------------------------ rendering

    def _render(self, count: int, generation: bool) -> str:
        return self._template.text(self._chat.to(count), generation=generation)

    def _locate_content(self, number: int) -> tuple[int, int] | None:
        """Where the content of a message is in the text; None if it is not there once."""
        messages = list(self._messages)
        messages[number] = _with_sentinel(messages[number])
        with suppress(UserError):
            rendered = self._template.text(Chat(messages, self._chat.arguments))
            first, found, rest = rendered.partition(SENTINEL)
            alone = found and SENTINEL not in rest and len(first) + len(rest) <= len(self._text)
            if alone and self._text.startswith(first) and self._text.endswith(rest):
                return len(first), len(self._text) - len(rest)
        return None

    @staticmethod
    def _after_sentinel(text: str) -> str | None:
        _, found, rest = text.partition(SENTINEL)
        return rest if found else None


def _with_sentinel(message: Record) -> Record:
    return {**message, "content": SENTINEL}


def alike(one: str, other: str) -> int:
    """The number of characters that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
