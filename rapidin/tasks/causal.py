"""Causal language models: batches of texts, and the loss of each text's completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.generations import Generation
from rapidin.data.records import TEXTS, Record
from rapidin.errors import UserError
from rapidin.ops.transfer import upload
from rapidin.tasks.forward import cache_use, device_of, greedy, takes
from rapidin.tasks.names import CAUSAL, LossKind
from rapidin.tasks.task import Task
from rapidin.tasks.texts import IGNORED, padded


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Texts padded on the right.

    ids: [B, T] int64, 0 for padding, to which the model does not attend; mask: [B, T] bool, real tokens;
    target: [B, T] bool, tokens whose loss counts; first: the first position that predicts a target token of
    some text, 0 if none does; parts: texts of each example, one after the other; alike: whether all texts
    have the same tokens. What preferences need of each example (`rapidin.tasks.preference`): reference: [B,
    parts], log-probabilities before tuning; sign: [B], 1 or -1; plain: [B] bool, has the loss of a causal
    text instead.
    """

    ids: Tensor
    mask: Tensor
    target: Tensor
    first: int
    parts: int = 1
    alike: bool = False
    reference: Tensor | None = None
    sign: Tensor | None = None
    plain: Tensor | None = None

    pooled: ClassVar[bool] = False

    @property
    def rows(self) -> int:
        """Number of examples."""
        return self.ids.shape[0] // self.parts

    @property
    def length(self) -> int:
        """Positions of an example, padding included."""
        return self.ids.shape[1] * self.parts

    @property
    def device(self) -> torch.device:
        """The device of the tokens."""
        return self.ids.device

    @staticmethod
    def of(
        texts: Sequence[tuple[Sequence[int], Sequence[bool]]],
        device: torch.device | str = "cpu",
        parts: int = 1,
    ) -> TokenBatch:
        """The batch of (token ids, target flags) pairs; parts: how many of them make an example."""
        length = max(len(ids) for ids, _ in texts)
        if parts > 1 and length == len(texts):
            length += 1  # axes are told apart by their sizes; batches of one text each are made to be unlike
        device = torch.device(device)
        ids = padded([tokens for tokens, _ in texts], 0, length)
        mask = padded([[1] * len(tokens) for tokens, _ in texts], 0, length).bool()
        target = padded([flags for _, flags in texts], 0, length).bool()
        # Found on the CPU, since reading it from a GPU would wait for it.
        predicted = target[:, 1:].any(0).nonzero()
        first = int(predicted[0]) if len(predicted) else 0
        alike = parts == 1 < len(ids) and bool((ids == ids[0]).all()) and bool(mask.all())
        return TokenBatch(
            upload(ids, device), upload(mask, device), upload(target, device), first, parts, alike
        )


def example_losses(model: nn.Module, batch: TokenBatch, kind: LossKind = "mean") -> Tensor:
    """Each example's loss over its target tokens: [B] float32.

    Position t's logits predict token t + 1; ``mean`` divides by the example's own number of target tokens.
    """
    # Logits before the first target token are never needed, and the output head is a large part of a small
    # model.
    logits, following, target = _predictions(model, batch, batch.first, use_cache=cache_use(model))
    token_loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view(
        target.shape
    )
    # where, not a product: a token that does not count must not contribute its NaN.
    loss = torch.where(target, token_loss, token_loss.new_zeros(())).sum(1)
    return loss / target.sum(1).clamp(min=1) if kind == "mean" else loss


def batch_loss(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The mean loss over all target tokens of a batch, as trainers minimise it: a float32 scalar."""
    # None leaves the cache of keys to the model's config: with dropout, GPT-2's gradients depend on it.
    logits, following, target = _predictions(model, batch, 0, use_cache=None)
    labels = following.masked_fill(~target, IGNORED)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _predictions(
    model: nn.Module, batch: TokenBatch, first: int, use_cache: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the positions from `first` to the last but one: the logits [B, P, V] float32, the id of the token
    after each [B, P], and whether that token is a target [B, P]."""
    kept = batch.ids.shape[1] - first
    extra: dict[str, Any] = {"logits_to_keep": kept} if takes(model, "logits_to_keep") else {}
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=use_cache, **extra).logits
    logits = logits[:, -kept:-1] if kept > 1 else logits[:, :0]
    return logits.float(), batch.ids[:, first + 1 :], batch.target[:, first + 1 :]


def _as_one_text(examples: Sequence[Encoded]) -> list[tuple[Sequence[int], Sequence[bool]]]:
    """The (token ids, target flags) of examples. If all are beginnings of the longest they are completed to
    that, which changes no loss of a causal model: copies of one text share a forward pass."""
    longest = max(examples, key=lambda each: len(each.ids)).ids
    if any(longest[: len(each.ids)] != each.ids for each in examples):
        return [(each.ids, each.target) for each in examples]
    return [(longest, [*each.target, *[False] * (len(longest) - len(each.ids))]) for each in examples]


class Causal(Task):
    """The next token: the loss of a completion under a causal language model.

    kind: whether an example's loss is the mean or the sum over its completion's tokens.
    """

    name = CAUSAL
    forms = TEXTS

    def __init__(self, encoder: Encoder, kind: LossKind = "mean") -> None:
        self.encoder, self.kind = encoder, kind

    def example(self, record: Record) -> Encoded:
        return self.encoder(record)

    def batch(self, examples: Sequence[Encoded], device: torch.device) -> TokenBatch:
        return TokenBatch.of(_as_one_text(examples), device)

    def losses(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        return example_losses(model, batch, self.kind)

    def check(self, record: Record) -> None:
        if "messages" in record:  # a template may refuse a chat
            self.encoder(record)

    def filler(self) -> Encoded:
        return Encoded([0, 0], [False, True], Status.OK)

    needs_causal = True
    has_tokens = True

    def tokens(self, example: Encoded) -> tuple[list[int], list[bool]]:
        return example.ids, example.target

    def generation(self, model: nn.Module, record: Record, max_new_tokens: int) -> Generation:
        prompt = self.encoder.prompt_text(record)
        completion = self.encoder.completion_text(record)
        if completion:
            return Generation(prompt, completion, False, self.encoder(record))
        return self.answer(model, prompt, max_new_tokens)

    def answer(self, model: Any, prompt: str, max_new_tokens: int) -> Generation:
        return self.answers(model, [prompt], max_new_tokens)[0]

    def answers(self, model: Any, prompts: Sequence[str], max_new_tokens: int) -> list[Generation]:
        """The model's greedy completions of prompts, made in one batch, as generations to explain.

        Raises UserError for an empty prompt, or one that fills the context.
        """
        tokenizer, texts = self.encoder.tokenizer, [self._answerable(prompt) for prompt in prompts]
        longest, device = max(map(len, texts)), device_of(model)
        gaps = [longest - len(ids) for ids in texts]
        # Padded on the left, where nothing is read, so that all are continued at the same position.
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        padded = [[pad] * gap + ids for gap, ids in zip(gaps, texts, strict=True)]
        mask = [[0] * gap + [1] * len(ids) for gap, ids in zip(gaps, texts, strict=True)]
        written = greedy(
            model,
            tokenizer,
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=min(max_new_tokens, self.encoder.max_length - longest),
        )
        ends = _end_ids(model)
        return [
            self._answered(prompt, ids, _up_to_end(row[longest:], ends))
            for prompt, ids, row in zip(prompts, texts, written, strict=True)
        ]

    def _answerable(self, prompt: str) -> list[int]:
        """The tokens of a prompt that the model can answer. Raises UserError for any other."""
        ids = self.encoder.prompt_ids(prompt)
        if not ids:
            raise UserError("the prompt is empty, so the model cannot continue it", "give a `completion` too")
        if len(ids) >= self.encoder.max_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens and fills the context of {self.encoder.max_length}: "
                "it cannot be answered"
            )
        return ids

    def _answered(self, prompt: str, ids: list[int], answer: list[int]) -> Generation:
        tokenizer = self.encoder.tokenizer
        # The generated tokens are kept, not encoded again from text: a truncated answer has no end token.
        kept = answer if self.encoder.eos else [i for i in answer if i != tokenizer.eos_token_id]
        target = [False] * len(ids) + [True] * len(kept)
        encoded = Encoded(ids + kept, target, Status.OK if kept else Status.NO_TARGET)
        return Generation(prompt, str(tokenizer.decode(answer, skip_special_tokens=True)), True, encoded)


def _end_ids(model: Any) -> frozenset[int]:
    """The tokens that end what a model generates."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def _up_to_end(answer: list[int], ends: frozenset[int]) -> list[int]:
    """An answer up to the first token that ends it, without the padding of a batch behind that."""
    end = next((n for n, token in enumerate(answer) if token in ends), len(answer))
    return answer[: end + 1]
