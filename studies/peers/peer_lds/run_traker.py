"""traker (TRAK of Park et al., 2023): runs in its own environment.

It has no causal language models; the model output given here is what its paper takes for text, the log odds
log(p / (1 - p)) of each counted token, their mean over the text, and the loss's derivative by it, 1 - p,
likewise. `loss`: minus the loss itself instead. The gradients are of the linear layers of the blocks. On a
CPU it draws its matrix of normal numbers anew for every batch, so all texts are one batch; and in half
precision, its default, one projection is not done after twelve minutes, so float32 it is. With an adapter
the texts come in batches of 16, since all at once do not fit into memory; the seed makes the matrix of each
the same. It takes the gradient of each text by every parameter, whatever it projects, so the frozen ones of
an adapter's model are made buffers.

What is kept of an example is the `features` row, in float16 by default; the gradients it was made from are on
disk too, but not needed for scores. More dimensions than texts make the matrix that it inverts singular; its
default adds nothing, so other values of `lambda_reg` are tried as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from setting import NOT_A_TARGET, Case, Setting, Texts, losses, main
from torch import Tensor

DIMENSIONS = (512, 1024, 2048)
ADAPTER_BATCH = 16
LAMBDAS = (0.0, 1e-5, 1e-3, 1e-1, 1.0, 10.0, 100.0)


def model_output(kind: str) -> Any:
    from trak.modelout_functions import AbstractModelOutput

    def token_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(log p of each wanted token, 1 where it counts), each [n, T - 1]."""
        wanted = labels[:, 1:]
        counted = wanted != NOT_A_TARGET
        log_p = logits[:, :-1].log_softmax(-1)
        return log_p.gather(2, wanted.clamp(min=0)[..., None])[..., 0], counted

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(
            model: Any, weights: Any, buffers: Any, ids: Tensor, mask: Tensor, labels: Tensor
        ) -> Tensor:
            given = {"input_ids": ids[None], "attention_mask": mask[None]}
            logits = torch.func.functional_call(model, (weights, buffers), (), given).logits
            if kind == "loss":
                return -losses(logits, labels[None])[0]
            log_p, counted = token_probabilities(logits, labels[None])
            odds = log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
            return (odds * counted).sum() / counted.sum()

        @staticmethod
        def get_out_to_loss_grad(model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            ids, mask, labels = batch
            if kind == "loss":
                return torch.ones(len(ids), 1)
            with torch.no_grad():
                logits = torch.func.functional_call(
                    model, (weights, buffers), (), {"input_ids": ids, "attention_mask": mask}
                ).logits
                log_p, counted = token_probabilities(logits, labels)
            return (((1 - log_p.exp()) * counted).sum(1) / counted.sum(1))[:, None]

    return Output()


def freeze(model: torch.nn.Module) -> None:
    """Make buffers of all parameters that are not an adapter's."""
    for name, module in model.named_modules():
        if ".lora_" not in name:
            for own, value in list(module.named_parameters(recurse=False)):
                delattr(module, own)
                module.register_buffer(own, value.detach())


def batches(setting: Setting, texts: Texts) -> Iterator[tuple[Tensor, ...]]:
    """The columns of all texts, or of as many as fit into memory."""
    size = ADAPTER_BATCH if setting.is_adapter else len(texts)
    for start in range(0, len(texts), size):
        yield tuple(column[start : start + size] for column in texts.columns)


Projected = tuple[Tensor, Tensor, Tensor]


def projected(
    setting: Setting, kind: str, dimension: int, seed: int, folder: Path
) -> tuple[Tensor, Projected]:
    """(the scores that TRAKer itself ends with, [train, test]; the projected gradients of the training texts
    and of the test texts, and the weights of the training texts, as TRAKer keeps them)."""
    from trak import TRAKer

    model = setting.model(attn_implementation="eager")
    if setting.is_adapter:
        freeze(model)
    traker = TRAKer(
        model=model,
        task=model_output(kind),
        train_set_size=len(setting.train),
        save_dir=str(folder),
        device="cpu",
        proj_dim=dimension,
        projector_seed=seed,
        use_half_precision=False,
        grad_wrt=[f"{name}.weight" for name in setting.linear_layers(model)],
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    traker.load_checkpoint(state, model_id=0)
    for columns in batches(setting, setting.train):
        traker.featurize(batch=columns, num_samples=len(columns[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint("lds", state, model_id=0, num_targets=len(setting.test))
    for columns in batches(setting, setting.test):
        traker.score(batch=columns, num_samples=len(columns[0]))
    found = torch.as_tensor(traker.finalize_scores("lds")).float()
    store = traker.saver.current_store
    kept = (torch.tensor(store[name]).float() for name in ("grads", "lds_grads", "out_to_loss"))
    return found, tuple(kept)  # type: ignore[return-value]


class Projections:
    """What is projected once for all values of `lambda_reg`: a tenth of a billion random numbers a text."""

    def __init__(self, setting: Setting, kind: str, dimension: int, seed: int) -> None:
        self.options = (setting, kind, dimension, seed)
        self.dimension = dimension
        self.made: tuple[Tensor, Projected] | None = None
        self.failed = ""

    def scores(self, ridge: float, folder: Path) -> tuple[Tensor, float]:
        from trak.score_computers import BasicScoreComputer

        if self.failed:  # no other value would change that
            raise RuntimeError(self.failed)
        if self.made is None:
            try:
                self.made = projected(*self.options, folder)
            except Exception as error:
                self.failed = f"{type(error).__name__}: {error}"
                raise
        found, (train, test, weights) = self.made
        if ridge:
            computer = BasicScoreComputer(dtype=torch.float32, device="cpu", lambda_reg=ridge)
            features = computer.get_x_xtx_inv(train, computer.get_xtx(train))
            found = features @ test.T * weights
        return found.T, 2.0 * self.dimension


def cases(setting: Setting) -> Iterator[Case]:
    note = "computed in float32; bytes as in float16, its default"
    for seed in setting.seeds:
        for kind, dimension in (*(("log odds", d) for d in DIMENSIONS), ("loss", 1024)):
            if seed and dimension != 1024:
                continue
            made = Projections(setting, kind, dimension, seed)
            for ridge in LAMBDAS:
                about = {"output": kind, "dimension": dimension, "lambda_reg": ridge, "seed": seed}
                main = kind == "log odds" and dimension == 1024
                yield Case("TRAK", about, partial(made.scores, ridge), note, main=main)


if __name__ == "__main__":
    main("traker", cases)
