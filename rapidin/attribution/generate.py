"""The generations to explain: the caller's records, with completions that the model generates if missing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rapidin import distributed
from rapidin.data.encoding import Encoded, Status
from rapidin.data.generations import Generation, as_records
from rapidin.data.records import Record
from rapidin.data.spans import HOTWORDS, Targets, check_targets, find_spans, split_words
from rapidin.errors import UserError, short
from rapidin.gradients.batch import evaluation_mode
from rapidin.gradients.source import GradientSource


def generations_of(
    source: GradientSource, values: Any, max_new_tokens: int = 64, targets: Targets | None = None
) -> list[Generation]:
    """The generations to explain, with their targets.

    values: as for `rapidin.Ensemble.query`; the model of `source` generates missing completions. Raises
    UserError if there is no generation, or one has no token to explain.
    """
    records = as_records(values)
    if not records:
        raise UserError("there is no generation to explain")
    check_targets(targets, len(records))
    generations = [_generation(source, record, max_new_tokens) for record in records]
    for generation in generations:
        generation.check()
    return [
        _with_targets(source, generation, record, targets if isinstance(targets, str | None) else targets[n])
        for n, (generation, record) in enumerate(zip(generations, records, strict=True))
    ]


def _generation(source: GradientSource, record: Record, max_new_tokens: int) -> Generation:
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UserError(f"the weight {short(weight)} is not a number", "fix the column 'weight'")
    prompt = source.encoder.prompt_text(record)
    completion = source.encoder.completion_text(record)
    if completion:
        return Generation(prompt, completion, False, source.encoder(record), float(weight))
    return replace(generate(source, prompt, max_new_tokens), weight=float(weight))


def _with_targets(source: GradientSource, generation: Generation, record: Record, targets: Any) -> Generation:
    """The generation with its targets; targets: "tokens", "hotwords", None, or a list of words and spans."""
    if targets is None:
        return generation
    words = split_words(record.get(HOTWORDS) or ())
    if targets == "hotwords" and not words:
        return generation
    pieces = source.encoder.pieces(generation.encoded.ids)
    counted = [piece for piece, counts in zip(pieces, generation.encoded.target, strict=True) if counts]
    chosen = None if targets == "tokens" else words if targets == "hotwords" else targets
    spans, missing = find_spans(chosen, counted, generation.completion)
    return replace(generation, pieces=tuple(counted), spans=tuple(spans), missing=tuple(missing))


def generate(source: GradientSource, prompt: str, max_new_tokens: int) -> Generation:
    """The model's greedy completion of a prompt, as a generation to explain.

    Raises UserError for an empty prompt, or one that fills the context.
    """
    loaded = source.loaded
    tokenizer, model = loaded.tokenizer, loaded.model
    ids = source.encoder.prompt_ids(prompt)
    if not ids:
        raise UserError("the prompt is empty, so the model cannot continue it", "give a --completion too")
    longest = source.encoder.max_length
    if len(ids) >= longest:
        raise UserError(f"the prompt has {len(ids)} tokens and the context {longest}: no room to answer")
    inputs = torch.tensor([ids], device=loaded.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad(), evaluation_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = partial(
            model.generate,
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(max_new_tokens, longest - len(ids)),
            pad_token_id=pad,
        )
        written = distributed.world().collective(run)
    answer = written[0, len(ids) :].tolist()
    # The generated tokens are kept, not encoded again from text: a truncated answer has no end token.
    kept = answer if source.settings.eos else [i for i in answer if i != tokenizer.eos_token_id]
    target = [False] * len(ids) + [True] * len(kept)
    encoded = Encoded(ids + kept, target, Status.OK if kept else Status.NO_TARGET)
    return Generation(prompt, str(tokenizer.decode(answer, skip_special_tokens=True)), True, encoded)
