"""Tests with a few tokens whether a model is a causal language model.

The loss of a completion has a meaning only if each token is predicted from the tokens before it. Many model
classes return logits of the right shape without that: BERT and similar models attend to the whole text unless
their config says that they are decoders. So the model is run: another last token must not change the logits
of earlier tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.errors import UserError, reason_of
from rapidin.gradients.model import LoadedModel
from rapidin.tasks.forward import cache_use, evaluation_mode, inner_model

_TEXT = "The quick brown fox jumps over the lazy dog"
_LENGTH = 6  # tokens that the model sees
_TRIES = 3
_REMEDY = "use a model that AutoModelForCausalLM loads with all of its weights, or another `task`"


def check_causal(loaded: LoadedModel) -> None:
    """Raises UserError, which says what the model is, unless it predicts each token of a text from those
    before it. With a sharded model, all processes must call this together."""
    model = loaded.model
    kind = type(inner_model(model)).__name__
    if getattr(getattr(inner_model(model), "config", None), "is_encoder_decoder", False):
        raise UserError(f"{kind} is an encoder-decoder model, not a causal language model", _REMEDY)
    vocabulary = _vocabulary(model)
    ids = _probe_ids(loaded.tokenizer, vocabulary)
    one = torch.tensor([ids], device=loaded.device)
    try:
        output = _outputs(model, one, loaded.sharded)
    except distributed.PeerError:
        raise
    except Exception as error:  # of any kind: what a model needs beside tokens only it knows
        raise UserError(f"{kind} cannot run on token ids alone: {reason_of(error)}") from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(f"{kind} has no output head, so it predicts no tokens", _REMEDY)
    if logits.ndim != 3 or logits.shape[1] < len(ids) or 2 * logits.shape[-1] < vocabulary:
        shape = " x ".join(str(size) for size in logits.shape[1:])
        raise UserError(
            f"{kind} is not a language model: for {len(ids)} tokens it returns {shape} numbers instead of "
            f"logits over its vocabulary of {vocabulary:,} tokens, as classifiers and reward models do",
            _REMEDY,
        )
    try:
        causal = is_causal(model, ids, device=loaded.device, sharded=loaded.sharded)
        _outputs(model, one, loaded.sharded)
    except distributed.PeerError:
        raise
    except Exception as error:
        raise UserError(
            f"{kind} keeps a state of its last call, which a batch of another size does not fit: "
            f"{reason_of(error)}",
            "it may work with a newer version of transformers",
        ) from error
    if not causal:
        raise UserError(
            f"{kind} is not causal: what it predicts in a text depends on later tokens, so the loss of a "
            "completion has no meaning for it",
            _REMEDY,
        )


def is_causal(
    model: Any, ids: Sequence[int], *, device: torch.device | str = "cpu", sharded: bool = False
) -> bool:
    """Whether another last token leaves a model's logits of earlier tokens as they are.

    ids: of a short text, of two different tokens or more; the model returns logits [B, T, V] (of more than T
    positions, the last T are used). The batch has the text twice, which shows how far the model's results
    differ for equal texts, and a third time with another last token. Rounding errors of experts or a random
    choice in the model may cause a difference once, so a model is not causal only if several texts show one.
    sharded: all processes that share the model must call this together.
    """
    for shift in range(_TRIES):
        text = [*ids[shift:], *ids[:shift]]
        other = next((i for i in text if i != text[-1]), None)
        if other is None:
            raise ValueError("the text must have two different tokens")
        rows = torch.tensor([text, text, [*text[:-1], other]], device=device)
        logits = _outputs(model, rows, sharded).logits[:, -len(text) : -1].float()
        size = logits[0].norm()
        moved, noise = ((logits[row] - logits[0]).norm() / size for row in (2, 1))
        if not bool(moved > _tolerance(model) + 3 * noise):
            return True
    return False


def _tolerance(model: Any) -> float:
    """The relative difference between logits that rounding may cause: larger in half precision and with
    quantized weights."""
    dtypes = {p.dtype for p in model.parameters()}
    return 1e-4 if dtypes <= {torch.float32, torch.float64} else 2e-2


def _outputs(model: Any, ids: Tensor, sharded: bool) -> Any:
    """What the model returns for ids [B, T] in evaluation mode; then the modes of its modules and the random
    state of the CPU are restored."""
    world = distributed.world() if sharded else distributed.World()
    with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng(devices=[]):
        mask, cache = torch.ones_like(ids), cache_use(model)
        return world.collective(lambda: model(input_ids=ids, attention_mask=mask, use_cache=cache))


def _vocabulary(model: Any) -> int:
    """The number of tokens that the model knows: its config's, or the rows of its table if fewer."""
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    sizes = [int(getattr(config and config.get_text_config(), "vocab_size", None) or 0)]
    with contextlib.suppress(AttributeError, NotImplementedError, IndexError):
        sizes.append(int(inner.get_input_embeddings().weight.shape[0]))
    return min((size for size in sizes if size > 1), default=2)


def _probe_ids(tokenizer: Any, vocabulary: int) -> list[int]:
    """Some tokens of ordinary text, as a model for text takes them; without a tokenizer any."""
    ids: list[int] = []
    if tokenizer is not None:
        ids = [i for i in tokenizer(_TEXT, add_special_tokens=False)["input_ids"] if i < vocabulary]
    if len(set(ids[:_LENGTH])) < 2:
        ids = [vocabulary * n // (_LENGTH + 1) for n in range(1, _LENGTH + 1)]
    return ids[:_LENGTH]
