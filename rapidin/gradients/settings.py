"""How gradients are taken and sketched: what a cache records, and a query must repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rapidin.data.chats import moment
from rapidin.errors import UserError
from rapidin.settings import Settings, documented, option
from rapidin.tasks.names import CAUSAL, LossKind, TaskName, Turns

if TYPE_CHECKING:  # both import torch, which the command line's help must not wait for
    from rapidin.gradients.dropout import DropoutMask
    from rapidin.gradients.preconditioner import PreconditionerConfig
    from rapidin.tasks.task import Task

Projection = Literal["tensor", "flat", "rapidgrad"]

HASH = "lowbias32-1"  # the definition of bins and signs in docs/reference/sketch.md
RAPIDGRAD_WIDTH = 65536  # the setting of the RapidIn paper

_WITH_BETA = ("preference", "kto")  # tasks
_SMALL_WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def points_of(text: str) -> tuple[float, ...]:
    """The numbers in a text of `at`; raises UserError if there is none or one is not a number."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise UserError(f"`at` must be numbers separated by commas, got {text}", "as in 0.5") from None


@documented
@dataclass(frozen=True)
class GradientSettings(Settings):
    """How gradients are taken and sketched.

    Raises UserError for values that do not go together; what depends on the model is checked by
    `rapidin.gradients.source.GradientSource`.
    """

    at: tuple[float, ...] | float | None = option(
        None,
        help="Points between the base model (0) and the tuned model (1) where gradients are taken; "
        "several add up.",
        metavar="A[,A...]",
        panel="Gradients",
        default="0.5 if the base model is known, else 1",
        parse=points_of,
    )
    include: tuple[str, ...] = option(
        (),
        help="Use only parameters whose name matches the pattern; may be repeated.",
        metavar="PATTERN",
        panel="Gradients",
    )
    exclude: tuple[str, ...] = option(
        (),
        help="Leave out parameters whose name matches the pattern; may be repeated.",
        metavar="PATTERN",
        panel="Gradients",
    )
    task: Task | str | None = option(
        None,
        help="Task that the model was tuned for, which determines the loss (docs/guide/tasks.md).",
        panel="Gradients",
        choices=get_args(TaskName),
        default="determined by the model's class; causal if that does not name a task",
        parse=str,
    )
    loss: LossKind = option(
        "mean",
        help="Loss of an example: mean or sum over its completion tokens.",
        panel="Gradients",
        choices=get_args(LossKind),
    )
    turns: Turns = option(
        "all",
        help="Assistant turns of a chat that have a loss.",
        panel="Gradients",
        choices=get_args(Turns),
    )
    beta: float = option(
        0.1,
        help="Beta of the losses of preference (DPO) and kto, as in tuning.",
        metavar="B",
        panel="Gradients",
    )
    preconditioner: PreconditionerConfig | str | Path | None = option(
        "auto",
        help="Precondition gradients by an inverse root of their second moment. kfac: K-FAC, from a sample "
        "of the data; sample: Adam's, from a sample; FILE: Adam's, from the optimizer's state (optimizer.pt, "
        "optimizer.bin, or the folder of a checkpoint of a Trainer, FSDP or DeepSpeed); off: none; auto: "
        "kfac, or off for the projection 'rapidgrad'.",
        flag="precondition",
        metavar="auto|kfac|off|sample|FILE",
        panel="Gradients",
        parse=str,
    )
    dropout: DropoutMask | None = option(
        None, help="Take gradients of the model with this fixed dropout mask.", flag=None, panel="Gradients"
    )
    projection: Projection = option(
        "tensor",
        help="tensor: sketch a layer's gradient from its two factors; flat: sketch the formed gradient; "
        "rapidgrad: one sketch for the whole layer-normalized gradient (the RapidIn paper's setting).",
        panel="Storage",
        choices=("tensor", "flat", "rapidgrad"),
    )
    width: int | None = option(
        None,
        help="Sketch dimension per layer: larger is more accurate and takes more disk.",
        metavar="N",
        panel="Storage",
        limits=(1, None),
        default="chosen from the number of layers: 512 for hundreds of layers, more for fewer",
    )
    seed: int = option(
        0, help="Random seed of the sketch.", metavar="N", panel="Storage", limits=(0, 2**64 - 1)
    )
    eos: bool = option(True, help="End completions with the end-of-text token.", panel="Data")
    date: str | None = option(
        None,
        help="Date that a chat template writes as the present, as 2026-01-31: that of the training, if it is "
        "known.",
        metavar="DATE",
        panel="Data",
        default="today, if the template writes it",
    )
    max_length: int | None = option(
        None,
        help="Maximum number of tokens per example.",
        metavar="N",
        panel="Data",
        limits=(2, None),
        default="the model's context",
    )
    too_long: Literal["truncate", "skip"] = option(
        "truncate",
        help="Whether longer examples are truncated or skipped.",
        panel="Data",
        choices=("truncate", "skip"),
    )
    batch_tokens: int = option(
        1024,
        help="Padded tokens per batch: larger is faster, up to a point, and needs more memory.",
        metavar="N",
        panel="Run",
        limits=(1, None),
    )

    def __post_init__(self) -> None:
        at = points_of(self.at) if isinstance(self.at, str) else self.at
        at = (at,) if isinstance(at, int | float) else at
        object.__setattr__(self, "at", None if at is None else tuple(float(point) for point in at))
        for name in ("include", "exclude"):
            patterns = getattr(self, name) or ()
            object.__setattr__(self, name, (patterns,) if isinstance(patterns, str) else tuple(patterns))
        if self.width == "auto":  # type: ignore[comparison-overlap]
            object.__setattr__(self, "width", None)
        if self.dropout is not None and not self.dropout.rate:
            object.__setattr__(self, "dropout", None)
        self._check()

    def _check(self) -> None:
        self.check_values()
        if self.projection not in get_args(Projection):
            raise UserError(
                f"unknown projection '{self.projection}'", f"use one of {', '.join(get_args(Projection))}"
            )
        if self.date is not None:
            moment(self.date)
        if not 0 < self.beta < float("inf"):
            raise UserError(f"`beta` must be above 0, got {self.beta:g}")
        if self.at == ():
            raise UserError("`at` must name at least one point")
        whole = self.width is None or self.width % 128 == 0 or self.width in _SMALL_WIDTHS
        if self.projection != "tensor" and not whole:
            raise UserError(
                f"`width` must be a multiple of 128 with the {self.projection} projection, got {self.width}"
            )

    @property
    def task_name(self) -> str:
        """The name of the task; "" as long as the model's class is to tell it."""
        return self.task if isinstance(self.task, str) else "" if self.task is None else self.task.name

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The parts 'sketch', 'gradient' and 'text' of a manifest, without where the preconditioner's file
        is.

        Of settings that a `GradientSource` has completed. What is not used is left out of 'gradient', as in
        caches that are older than it.
        """
        config = self.preconditioner
        assert isinstance(self.at, tuple)
        assert config is not None
        assert not isinstance(config, str | Path)
        gradient: dict[str, Any] = {
            "at": list(self.at),
            "loss": self.loss,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "preconditioner": config.to_json(),
        }
        if self.task_name != CAUSAL:
            gradient["task"] = self.task_name
        if self.turns != "all":
            gradient["turns"] = self.turns
        if self.task_name in _WITH_BETA:
            gradient["beta"] = self.beta
        if self.dropout is not None:
            gradient["dropout"] = self.dropout.to_json()
        return {
            "sketch": {
                "projection": self.projection, "width": self.width, "seed": self.seed, "hash": HASH,
            },
            "gradient": gradient,
            "text": {
                "eos": self.eos, "max_length": self.max_length, "too_long": self.too_long,
                **({} if self.date is None else {"date": self.date}),
            },
        }  # fmt: skip

    @staticmethod
    def from_record(
        record: Mapping[str, Mapping[str, Any]], config: PreconditionerConfig
    ) -> GradientSettings:
        """The settings that `recorded` wrote. Raises KeyError or TypeError if the record is something
        else."""
        from rapidin.gradients.dropout import DropoutMask

        sketch, gradient, text = record["sketch"], record["gradient"], record["text"]
        dropout = gradient.get("dropout")
        return GradientSettings(
            at=tuple(gradient["at"]),
            include=tuple(gradient["include"]),
            exclude=tuple(gradient["exclude"]),
            task=gradient.get("task", CAUSAL),
            turns=gradient.get("turns", "all"),
            beta=gradient.get("beta", 0.1),
            loss=gradient["loss"],
            preconditioner=config,
            dropout=DropoutMask(**dropout) if dropout else None,
            projection=sketch["projection"],
            width=sketch["width"],
            seed=sketch["seed"],
            eos=text["eos"],
            max_length=text["max_length"],
            too_long=text["too_long"],
            date=text.get("date"),
        )
