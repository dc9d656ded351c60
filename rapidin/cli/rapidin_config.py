"""`--rapidin-config FILE`: the options of a command from RapidIn's own configuration.

RapidIn is the implementation of the RapidIn paper (Lin et al., ACL 2024). Its configuration is one JSON file
for both of its stages, with the sections ``data``, ``influence`` and ``model``
(https://github.com/huawei-lin/RapidIn). What a command has an option for becomes that option's default, so
that options which are given count instead; everything else in the file is named, with the reason.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from rapidin.cli.options import ARGUMENTS
from rapidin.errors import UserError

_EXAMPLE = "give a file like examples/config_caching.json of RapidIn"
_KINDS = {str: "a text", bool: "true or false", int: "a whole number"}

# What a key that has no option stands for here, and why it is not used.
_UNUSED = {
    "data.begin_id": "all rows are cached; use --limit for the first ones",
    "data.end_id": "all rows are cached; use --limit for the first ones",
    "data.test_begin_id": "all rows of the file are queried",
    "data.test_end_id": "all rows of the file are queried",
    "influence.outdir": "results go to standard output, --json and --report",
    "influence.load_from_grads_path": "a query always reads the cache",
    "influence.save_to_grads_path": "gradients are always cached",
    "influence.delete_model": "the scan needs no model",
    "influence.n_threads": "torchrun runs one process for each GPU",
    "influence.RapidGrad.RapidGrad_M": "a sketch is made once",
    "influence.RapidGrad.shuffle_lambda": "one keyed permutation takes the place of the shuffles",
    "influence.deepspeed.enable": "use --device auto or --shard-model for a model that is too large",
    "influence.deepspeed.config_path": "use --device auto or --shard-model for a model that is too large",
    "influence.offload_test_grad": "memory is used as there is",
    "influence.offload_train_grad": "memory is used as there is",
    "influence.calculate_infl_in_gpu": "--device says where the scan runs",
    "influence.skip_test": "caching and queries are two commands",
    "influence.skip_influence": "caching and queries are two commands",
    "influence.IF.recursion_depth": "there is no method with this recursion",
    "influence.IF.r_averaging": "there is no method with this recursion",
    "influence.IF.scale": "there is no method with this recursion",
}
_RAPIDGRAD = "influence.RapidGrad.enable"
_OF_CACHE = ("data.train_data_path", "influence.seed", "model.lora_path", "model.max_length")
_OF_QUERY = ("data.test_data_path", "influence.top_k", "influence.cal_words_infl")


@dataclass
class _Config:
    """The values of a configuration by their whole names, such as ``model.lora_path``.

    defaults: of the command's parameters; unused: names with the reason for which they have no effect; known:
    names that were asked for.
    """

    path: str
    values: Mapping[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)

    @staticmethod
    def read(path: str) -> "_Config":
        """Raises UserError for a file that is no configuration."""
        try:
            document = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"'{path}' cannot be read: {error.strerror}", _EXAMPLE) from None
        except ValueError as error:
            raise UserError(f"'{path}' is not JSON: {error}", _EXAMPLE) from None
        sections = document if isinstance(document, dict) else {}
        if not sections or not all(isinstance(section, dict) for section in sections.values()):
            raise UserError(f"'{path}' is no configuration of RapidIn", _EXAMPLE)
        return _Config(path, dict(_flat(sections)))

    def get(self, name: str, kind: type) -> Any:
        """A value, None for none. Raises UserError for one of another kind."""
        self.known.add(name)
        value = self.values.get(name)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise UserError(f"'{name}' in '{self.path}' must be {_KINDS[kind]}, got {json.dumps(value)}")
        return value

    def take(self, name: str, kind: type, parameter: str, made: Callable[[Any], Any] = lambda x: x) -> None:
        """Make a value, if there is one, the default of a parameter."""
        value = self.get(name, kind)
        if value is not None:
            self.defaults[parameter] = made(value)

    def leave(self, name: str, why: str) -> None:
        """Say why a value, if there is one that is not switched off, is not used."""
        self.known.add(name)
        if self.values.get(name) not in (None, False):
            self.unused[name] = why


def _flat(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sections.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _for_cache(config: _Config, given: Collection[str]) -> None:
    config.take("model.model_path", str, "model")
    config.take("model.lora_path", str, "adapter")
    config.take("model.max_length", int, "max_length")
    config.take("data.train_data_path", str, "data", lambda path: [path])
    config.take("influence.grads_path", str, "out")
    config.take("influence.seed", int, "seed")
    # RapidIn's scores are products of gradients of the tuned model, as they are.
    config.defaults |= {"at": "1", "preconditioner": "off"}
    enabled = config.get(_RAPIDGRAD, bool)
    size = "influence.RapidGrad.RapidGrad_K"
    if "--projection" in given:
        for name in (_RAPIDGRAD, size):
            config.leave(name, "--projection is given")
    elif enabled:
        config.defaults |= {"projection": "rapidgrad", "width": 65536}
        if isinstance(config.values.get(size), list):
            raise UserError(
                f"'{size}' in '{config.path}' has several sizes", "name one, and make a cache of each"
            )
        config.take(size, int, "width")
    else:
        if _RAPIDGRAD in config.values:
            config.unused[_RAPIDGRAD] = "whole gradients are not stored; they are sketched"
        config.leave(size, "RapidGrad is not enabled")
    config.leave("model.load_in_4bit", "a model is loaded in 4 bits if it is stored so; see --model-dtype")
    for name in _OF_QUERY:
        config.leave(name, "it is an option of 'rapidin query'")


def _for_query(config: _Config, given: Collection[str]) -> None:
    config.take("influence.grads_path", str, "cache", lambda path: [path])
    if {"--ask", "--prompt"}.isdisjoint(given):
        config.take("data.test_data_path", str, "data")
    else:
        config.leave("data.test_data_path", "another generation is given")
    config.take("influence.top_k", int, "top_k")
    if config.get(_RAPIDGRAD, bool):
        config.leave("influence.cal_words_infl", "tokens have no scores of their own with RapidGrad")
    else:
        config.take("influence.cal_words_infl", bool, "tokens")
    for name in (*_OF_CACHE, "model.model_path", "model.load_in_4bit"):
        config.leave(name, "the cache says it")
    for name in ("enable", "RapidGrad_K"):
        config.leave(f"influence.RapidGrad.{name}", "the cache says it")


_COMMANDS: dict[str, Callable[[_Config, Collection[str]], None]] = {"cache": _for_cache, "query": _for_query}


def defaults_of(
    path: str, command: str, given: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """(defaults of the parameters of a command, why other values of the file are not used, by their names).

    command: "cache" or "query"; given: the flags of the command line. Raises UserError for a file that is no
    configuration of RapidIn, or that has a value of another kind.
    """
    config = _Config.read(path)
    _COMMANDS[command](config, given)
    for name, why in _UNUSED.items():
        config.leave(name, why)
    method = "influence.infl_method"
    config.known.add(method)
    if config.values.get(method) != "TracIn":
        config.leave(method, "scores are products of gradients, as by TracIn")
    for name in config.values:
        if name not in config.known:
            config.unused[name] = "RapidIn has no such option"
    return config.defaults, config.unused


def _read(context: typer.Context, path: str | None) -> str | None:
    if path is None or context.resilient_parsing:
        return path
    from rapidin.cli.console import line
    from rapidin.distributed import world

    given = {argument.partition("=")[0] for argument in context.meta.get(ARGUMENTS, ())}
    defaults, unused = defaults_of(path, str(context.info_name), given)
    context.default_map = {**(context.default_map or {}), **defaults}
    if unused and world().leads and given.isdisjoint(("--quiet", "-q")):
        reasons: dict[str, list[str]] = {}
        for name, why in unused.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            line(f"not used of {path}: {', '.join(names)}: {why}")
    return path


RapidInConfig = Annotated[
    str | None,
    typer.Option(
        "--rapidin-config",
        metavar="FILE",
        help="Take the options that are not given, MODEL and CACHE included, from RapidIn's own JSON "
        "configuration. What has no meaning here is named.",
        is_eager=True,
        callback=_read,
        show_default=False,
        rich_help_panel="Data",
    ),
]
