"""Baselines without gradients: BM25 of the words, and the cosine of the model's hidden states."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rapidin.data.encoding import Encoded, Status, by_length
from rapidin.data.records import TEXTS, record_parts
from rapidin.errors import UserError, needs
from rapidin.gradients.model import LoadedModel
from rapidin.results.types import QueryResult, Standing
from rapidin.tasks.causal import TokenBatch
from rapidin.tasks.forward import evaluation_mode, takes

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
OnProgress = Callable[[int, int], None]  # the number of texts that are done, and of all

WORDS, STATES = "BM25", "hidden states"  # names of the baselines

EXTRA = "eval"
BATCH_TOKENS = 2048  # with padding


def plain_text(record: Mapping[str, Any]) -> str:
    """The text of a record, without the template that formats it for the model."""
    return " ".join(text for text in record_parts(record) if text).strip()


def query_text(record: Mapping[str, Any], completion: str) -> str:
    """The `plain_text` of a query, with the completion that the model generated if the record has none."""
    record, form = dict(record), TEXTS.of(record, generations=True)
    if form == "messages":
        messages = list(record["messages"])
        if not messages or messages[-1]["role"] != "assistant":
            record["messages"] = [*messages, {"role": "assistant", "content": completion}]
    elif form in ("prompt", "instruction"):
        answer = TEXTS.fields[form][-1]
        record[answer] = record.get(answer) or completion
    return plain_text(record)


def check() -> None:
    """Raises UserError if a package is missing, before hours of work."""
    needs("rank_bm25", "BM25", EXTRA)


def bm25(texts: Sequence[str], queries: Sequence[str]) -> Floats:
    """Okapi BM25 with the defaults of rank-bm25, on lower-case words: [queries, texts]."""
    index = needs("rank_bm25", "BM25", EXTRA).BM25Okapi([words(text) or [""] for text in texts])
    return np.array([index.get_scores(words(text)) for text in queries], dtype=np.float64)


def words(text: str) -> list[str]:
    """The words of a text in lower case, as BM25 counts them."""
    return re.findall(r"\w+", text.lower())


def hidden_states(
    loaded: LoadedModel,
    texts: Sequence[str],
    queries: Sequence[str],
    *,
    max_length: int = 256,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress | None = None,
) -> Floats:
    """Cosine of the model's last hidden states, averaged over a text's tokens: [queries, texts]; of the
    encoder's, if the model is an encoder-decoder.

    max_length: the first tokens of a text that are read; a text without tokens has a cosine of 0 with all
    others. batch_tokens: of a batch, with padding.
    """
    with evaluation_mode(loaded.model):
        states = _mean_states(loaded, [*queries, *texts], max_length, batch_tokens, on_progress).double()
    states = torch.nn.functional.normalize(states, dim=1)
    # Products of copies are computed once too: a matrix product rounds by the place of a column.
    unique = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    first = {text: n for n, text in reversed(list(enumerate(texts, len(queries))))}
    products: Floats = (states[: len(queries)] @ states[[first[text] for text in unique]].T).numpy()
    scores: Floats = products[:, [unique[text] for text in texts]]
    return scores


@torch.no_grad()
def _mean_states(
    loaded: LoadedModel,
    texts: Sequence[str],
    max_length: int,
    batch_tokens: int,
    on_progress: OnProgress | None,
) -> Tensor:
    """The mean hidden state of each text: [texts, hidden size] float32 on the CPU, from batches of texts of
    similar length. Copies are read once, so that they have the same bits in whatever batch."""
    copies = Counter(texts)
    unique = list(copies)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in unique]
    encoded = [Encoded(tokens, [False] * len(tokens), Status.NO_TARGET) for tokens in ids]
    nonempty = [n for n in range(len(encoded)) if encoded[n].ids]
    encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else None
    extra: dict[str, Any] = {"use_cache": False, "output_hidden_states": True}
    if takes(model, "logits_to_keep"):  # they are not needed, and are the largest output
        extra["logits_to_keep"] = 1
    states: Tensor | None = None
    done = len(texts) - sum(copies[unique[n]] for n in nonempty)
    for chosen in reversed(by_length(nonempty, encoded, batch_tokens)):
        batch = TokenBatch.of([(encoded[n].ids, encoded[n].target) for n in chosen], loaded.device)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        if encoder is not None:
            state = encoder(**inputs).last_hidden_state.float()
        else:
            state = model(**inputs, **extra).hidden_states[-1].float()
        mask = batch.mask.to(state.device)[:, :, None]
        mean = state.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
        if states is None:
            states = torch.zeros(len(unique), mean.shape[1], device="cpu")
        states[chosen] = mean.cpu()
        done += sum(copies[unique[n]] for n in chosen)
        if on_progress:
            on_progress(done, len(texts))
    if states is None:
        return torch.zeros(len(texts), 1, device="cpu")
    position = {text: n for n, text in enumerate(unique)}
    return states[[position[text] for text in texts]]


def scores_of_baselines(
    loaded: LoadedModel,
    texts: Sequence[str],
    queries: Sequence[str],
    *,
    max_length: int = 256,
    reads: Callable[[Floats], Bools] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Floats]:
    """The scores of the baselines by name, [queries, texts].

    reads: which texts the model reads, [texts], given the scores of BM25; by default all. The others have NaN
    as their similarity of hidden states.
    """
    by_words = bm25(texts, queries)
    read = np.flatnonzero(np.ones(len(texts), dtype=np.bool_) if reads is None else reads(by_words)).tolist()
    by_states = np.full(by_words.shape, np.nan)
    by_states[:, read] = hidden_states(
        loaded, [texts[n] for n in read], queries, max_length=max_length, on_progress=on_progress
    )
    return {WORDS: by_words, STATES: by_states}


def check_texts(loaded: LoadedModel, what: str) -> None:
    """Raises UserError if the model reads no texts, or is spread over processes; what: needs them, in
    words."""
    if loaded.tokenizer is None:
        raise UserError(
            f"{what} compares texts, and this model has no tokenizer that reads them", f"leave out {what}"
        )
    if loaded.sharded:
        raise UserError(f"{what} needs an unsharded model", "leave out `shard_model`")


def with_standings(result: QueryResult, tables: Mapping[str, Floats], counted: Tensor) -> QueryResult:
    """The result with the score and rank of its hits in each baseline.

    tables: by name, the scores of one query with all training examples [rows], NaN for rows that were not
    compared, which get none; counted: [rows] bool, the
    examples that have a sketch: ranks are among them, and equal scores share the best rank. `overlaps` is the
    number of helpful hits that are among as many best of the baseline, of equal scores the first.
    """
    keep = counted.cpu().numpy()
    standings: dict[int, dict[str, Standing]] = {hit.row: {} for hit in (*result.top, *result.bottom)}
    overlaps = {}
    for name, scores in tables.items():
        scores = scores[: len(keep)]
        of_counted = scores[keep[: len(scores)]]
        others = np.sort(of_counted[~np.isnan(of_counted)])
        for row, by_name in standings.items():
            if np.isnan(scores[row]):
                continue
            better = len(others) - int(np.searchsorted(others, scores[row], side="right"))
            by_name[name] = Standing(float(scores[row]), better + 1)
        ranked = np.argsort(np.where(keep[: len(scores)], -scores, np.inf), kind="stable")
        best = set(ranked[: len(result.helpful)].tolist())
        overlaps[name] = sum(hit.row in best for hit in result.helpful)
    top, bottom = (
        [replace(hit, standings=standings[hit.row]) for hit in hits] for hits in (result.top, result.bottom)
    )
    return replace(result, top=top, bottom=bottom, overlaps=overlaps)
