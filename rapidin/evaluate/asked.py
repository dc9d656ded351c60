"""What models say: the log-probabilities of generations, and greedy answers to their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidin.cache import Manifest
from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.errors import UserError
from rapidin.evaluate.training import losses
from rapidin.evaluate.tuned import MAX_LENGTH
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.reader import embedded_tokens, max_length_of
from rapidin.tasks.causal import Causal


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model says: of each generation its log-probability, and the greedy answer to its prompt."""

    log_probabilities: tuple[float, ...]
    answers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return {"log_probabilities": list(self.log_probabilities), "answers": list(self.answers)}


class Asked:
    """Generations that models are asked about.

    encoder: of the training texts; most: tokens of an answer. A generation ends without an end token, since
    it may have been cut short. Raises UserError for one without a token to predict.
    """

    def __init__(self, queries: Sequence[Mapping[str, Any]], encoder: Encoder, most: int) -> None:
        self.texts = [(str(query["prompt"]), str(query["completion"])) for query in queries]
        self._most, self._task = most, Causal(encoder, "sum")
        self._encoded = [_without_end(encoder.encode_pair(*text), encoder) for text in self.texts]
        for text, encoded in zip(self.texts, self._encoded, strict=True):
            Generation(*text, False, encoded).check()

    @property
    def tokens(self) -> list[int]:
        """How many tokens each generation has."""
        return [sum(encoded.target) for encoded in self._encoded]

    def measured(self, model: Any) -> Measured:
        """What a model says of them."""
        found = losses(model, self._encoded, task=self._task)
        answers = [self._task.answer(model, prompt, self._most).completion for prompt, _ in self.texts]
        return Measured(tuple((-found).tolist()), tuple(answers))


def _without_end(encoded: Encoded, encoder: Encoder) -> Encoded:
    """The encoding of a generation without the end token that the encoder put behind it."""
    if not encoder.eos or encoded.truncated or encoded.ids[-1:] != [encoder.tokenizer.eos_token_id]:
        return encoded
    ids, target = encoded.ids[:-1], encoded.target[:-1]
    return Encoded(ids, target, Status.OK if any(target) else Status.NO_TARGET)


def text_encoder(loaded: LoadedModel, manifest: Manifest | None, max_length: int | None) -> Encoder:
    """The encoder of the texts that were trained on, as the cache read them."""
    text = {} if manifest is None else manifest.text
    turns = "all" if manifest is None else manifest.gradient.get("turns") or "all"
    longest = max_length or text.get("max_length")
    return Encoder(
        loaded.tokenizer,
        eos=bool(text.get("eos", True)),
        max_length=max_length_of(loaded.context_length or MAX_LENGTH, longest),
        too_long=text.get("too_long", "truncate"),
        turns=turns,
        date=text.get("date"),
        rows=embedded_tokens(loaded.model),
    )


def usable_rows(examples: Examples, encoder: Encoder) -> dict[int, Encoded]:
    """The encodings of the rows that have a token to learn."""
    encoded = {}
    for row, record in examples.good():
        try:
            made = encoder(record)
        except UserError:  # such as a chat that the template refuses
            continue
        if made.status == Status.OK:
            encoded[row] = made
    if not encoded:
        raise UserError("no row of the training data has a completion token to train on")
    return encoded
