"""What needs no gradients: BM25 of the words, and the cosine of the model's own hidden states."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapidin.evaluate.figures import Floats, needs
from rapidin.examples import FORMS, form_of
from rapidin.model import LoadedModel
from rapidin.report import record_parts


def plain_text(record: Mapping[str, Any]) -> str:
    """What a record says, without the form that it is put in for the model."""
    return " ".join(part for part in record_parts(record) if part).strip()


def asked_text(record: Mapping[str, Any], completion: str) -> str:
    """What a query says: as `plain_text`, with a completion that the model wrote where its own is missing."""
    record, form = dict(record), form_of(record, generations=True)
    if form == "messages":
        messages = list(record["messages"])
        if not messages or messages[-1]["role"] != "assistant":
            record["messages"] = [*messages, {"role": "assistant", "content": completion}]
    elif form in ("prompt", "instruction"):
        answer = FORMS[form][-1]
        record[answer] = record.get(answer) or completion
    return plain_text(record)


def bm25(texts: Sequence[str], queries: Sequence[str]) -> Floats:
    """Okapi BM25 with the defaults of rank-bm25, on lower-case words: [queries, texts]."""
    index = needs("rank_bm25").BM25Okapi([_words(text) or [""] for text in texts])
    return np.array([index.get_scores(_words(text)) for text in queries], dtype=np.float64)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def hidden_states(
    loaded: LoadedModel, texts: Sequence[str], queries: Sequence[str], *, max_length: int = 256
) -> Floats:
    """Cosine of the model's last hidden states, means over a text's tokens: [queries, texts]."""
    made = torch.stack([_mean_state(loaded, text, max_length) for text in (*queries, *texts)]).double()
    made = torch.nn.functional.normalize(made, dim=1)
    scores: Floats = (made[: len(queries)] @ made[len(queries) :].T).numpy()
    return scores


@torch.no_grad()
def _mean_state(loaded: LoadedModel, text: str, max_length: int) -> Tensor:
    ids = loaded.tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length).input_ids
    if not ids.shape[1]:
        return torch.zeros(loaded.model.config.hidden_size)
    out = loaded.model(input_ids=ids.to(loaded.device), output_hidden_states=True)
    state: Tensor = out.hidden_states[-1][0].mean(0).float().cpu()
    return state


def both(
    loaded: LoadedModel, texts: Sequence[str], queries: Sequence[str], *, max_length: int = 256
) -> dict[str, Floats]:
    """The scores of the baselines by name."""
    return {
        "BM25": bm25(texts, queries),
        "hidden states": hidden_states(loaded, texts, queries, max_length=max_length),
    }
