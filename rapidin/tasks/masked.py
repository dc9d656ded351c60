"""Masked language models: every token of a text is masked once, and predicted from the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rapidin.data.encoding import Status
from rapidin.data.generations import Generation
from rapidin.data.records import Record
from rapidin.errors import UserError
from rapidin.ops.transfer import upload
from rapidin.tasks.forward import device_of, evaluation_mode
from rapidin.tasks.names import LossKind, forms_of, texts_of
from rapidin.tasks.task import Batch, Example, ReadText, Task
from rapidin.tasks.texts import IGNORED, TextEncoder, label_losses, padded

GROUPS = 7  # of tokens that are masked together: one in seven is close to the 15% of usual training


class Masked(Task):
    """The tokens of a text, each predicted once by a masked language model.

    The n-th token that is not a special one is masked in pass n modulo `GROUPS`. The passes of an example are
    its parts in the batch. Nothing is random, so equal texts have equal gradients. kind: whether the loss is
    the mean or the sum over the tokens. A query may contain mask tokens: then the model fills them in, and
    only the filled-in tokens have a loss.
    """

    name = "masked"
    forms = forms_of("masked")

    def __init__(self, encoder: TextEncoder, kind: LossKind) -> None:
        self.encoder, self.kind = encoder, kind
        if encoder.tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer has no mask token, so this is not a masked language model",
                "use another `task`",
            )
        self.mask: int = encoder.tokenizer.mask_token_id
        self._special = set(encoder.tokenizer.all_special_ids)

    def example(self, record: Record) -> Example:
        text = self.encoder(*texts_of(record))
        ids = text.inputs["input_ids"]
        ordinary = [n for n, token in enumerate(ids) if token not in self._special]
        group = [-1] * len(ids)
        for at, n in enumerate(ordinary):
            group[n] = at % GROUPS
        status = text.status
        if status == Status.OK and not ordinary:
            status = Status.NO_TARGET
        return self._example(text.inputs, group, status, text.truncated)

    def _example(
        self, inputs: dict[str, list[int]], group: list[int], status: Status, truncated: bool = False
    ) -> Example:
        """group: of each token, the pass in which it is masked, -1 for none."""
        return Example(inputs | {"group": group}, GROUPS * len(group), status, truncated)

    def texts(self, example: Example) -> list[ReadText]:
        group = example.inputs["group"]
        return [ReadText("", example.inputs["input_ids"], [each >= 0 for each in group])]

    def batch(self, examples: Sequence[Example], device: torch.device) -> Batch:
        names = [name for name in examples[0].inputs if name != "group"]
        texts = [{k: each.inputs[k] for k in names} for each in examples]
        inputs = self.encoder.padded(texts, device, GROUPS)
        length = inputs["input_ids"].shape[1]
        group = upload(padded([each.inputs["group"] for each in examples], -1, length), device)
        inputs = {name: value.repeat_interleave(GROUPS, 0) for name, value in inputs.items()}
        now = torch.arange(GROUPS, device=device).repeat(len(examples))
        masked = group.repeat_interleave(GROUPS, 0) == now[:, None]
        ids = inputs["input_ids"]
        labels = ids.masked_fill(~masked, IGNORED)
        inputs["input_ids"] = ids.masked_fill(masked, self.mask)
        return Batch(inputs | {"labels": labels}, len(examples), GROUPS, GROUPS * length, pooled=False)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        return label_losses(model(**batch.without("labels")).logits, labels, batch.rows, self.kind)

    def generation(self, model: nn.Module, record: Record, max_new_tokens: int) -> Generation:
        text = self.encoder(*texts_of(record))
        prompt, ids = "\n".join(texts_of(record)), text.inputs["input_ids"]
        masks = [n for n, token in enumerate(ids) if token == self.mask]
        if not masks:
            return Generation(prompt, "", False, self.example(record))
        inputs = self.encoder.padded([text.inputs], device_of(model))
        with torch.no_grad(), evaluation_mode(model):
            best: list[int] = model(**inputs).logits[0].argmax(1).tolist()
        filled, group = list(ids), [-1] * len(ids)
        for n in masks:
            filled[n], group[n] = best[n], 0
        answer = str(self.encoder.tokenizer.decode([filled[n] for n in masks])).strip()
        encoded = self._example(text.inputs | {"input_ids": filled}, group, text.status, text.truncated)
        return Generation(prompt, answer, True, encoded)

    def filler(self) -> Example:
        return self._example({"input_ids": [0], "attention_mask": [1]}, [0], Status.OK)
