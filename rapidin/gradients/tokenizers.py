"""The tokenizer of a model: the one beside its adapter, its own, or another; and its hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rapidin.errors import UserError, reason_of

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(
    name: str,
    adapter: str | None = None,
    chosen: str | None = None,
    *,
    config: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, str, str]:
    """The tokenizer that is chosen, or the adapter's, or the model's; where it is from; and a message if it
    is another than the model's, "" if not.

    An adapter that has a chat template but no vocabulary has the model's. config: the model's, for folders
    that have none. Raises UserError if there is no tokenizer.
    """
    beside = None if adapter is None else _files(adapter)
    if chosen is None and beside and beside.intersection(_VOCABULARIES):
        chosen = adapter
    if chosen is not None and not _same_place(chosen, name):
        tokenizer = _load(chosen, trust_remote_code, config)
        what = "the adapter" if adapter is not None and _same_place(chosen, adapter) else f"'{chosen}'"
        return tokenizer, chosen, _other(tokenizer, name, trust_remote_code, what)
    tokenizer = _load(name, trust_remote_code, config)
    template = None if chosen is not None or adapter is None or not beside else _template(adapter, beside)
    if template is None or template == getattr(tokenizer, "chat_template", None):
        return tokenizer, name, ""
    tokenizer.chat_template = template
    assert adapter is not None
    return tokenizer, adapter, "the chat template beside the adapter is used: the model's is another"


def gguf_file(name: str) -> tuple[str, dict[str, str]]:
    """(folder or name, {"gguf_file": ...} if the model is a GGUF file)."""
    path = Path(name)
    if os.path.isfile(path) and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if os.path.isdir(path) and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"'{name}' contains {len(files)} GGUF files", "give one of them as the model")
        if files:
            return name, {"gguf_file": files[0].name}
    return name, {}


def _load(name: str, trust_remote_code: bool, config: Any) -> Any:
    from transformers import AutoTokenizer

    folder, extra = gguf_file(name)
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if local and not os.path.exists(path):
        raise UserError(f"tokenizer not found: '{name}'")
    # A folder or repository of an adapter has no config of a model, which some tokenizers need.
    lacks_config = os.path.isdir(path) and not (path / "config.json").exists()
    configs = [{}, {"config": config}] if config is not None and not extra else [extra]
    for given in reversed(configs) if lacks_config else configs:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **given)
        except Exception as error:  # transformers raises many kinds
            failure = error
    raise UserError(f"cannot load the tokenizer of '{name}': {reason_of(failure)}") from failure


def _files(adapter: str) -> set[str]:
    """The files of a tokenizer that an adapter has, in its folder or on the hub."""
    names = (*_VOCABULARIES, _CONFIG, _TEMPLATE)
    if os.path.exists(adapter):
        return {each for each in names if os.path.isfile(os.path.join(adapter, each))}
    return {each for each in names if _fetched(adapter, each) is not None}


def _fetched(name: str, file: str) -> str | None:
    """The path of a file of a folder, or of a repository on the hub; None if it is not there."""
    if os.path.exists(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # loading the adapter says what is wrong
        return None
    return None if found is None else str(found)


def _template(adapter: str, files: set[str]) -> Any:
    """The chat template beside an adapter without a vocabulary; None if there is none."""
    try:
        if _TEMPLATE in files and (path := _fetched(adapter, _TEMPLATE)):
            return Path(path).read_text(encoding="utf-8")
        if _CONFIG in files and (path := _fetched(adapter, _CONFIG)):
            return json.loads(Path(path).read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the chat template of '{adapter}': {reason_of(error)}") from error
    return None


def _same_place(one: str, other: str) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        return os.path.realpath(one) == os.path.realpath(other)
    return one == other


def _other(tokenizer: Any, name: str, trust_remote_code: bool, what: str) -> str:
    """A message of what differs between a tokenizer and the model's own; "" if nothing does."""
    try:
        own = _load(name, trust_remote_code, None)
    except UserError:
        return f"the tokenizer of {what} is used: the model has none"
    differs = [
        words
        for words, hashed in (("vocabulary", vocabulary_hash), ("chat template", template_hash))
        if hashed(tokenizer) != hashed(own)
    ]
    if not differs:
        return ""
    return (
        f"the tokenizer of {what} is used: its {' and '.join(differs)} differ{'s' * (len(differs) == 1)} "
        + ("from the model's")
    )


# ----------------------------------------------------------------------------------------------- hashes


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of all of a tokenizer."""
    return _hash([_core(tokenizer), [_chat_template(tokenizer), _special(tokenizer)]])


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of how a tokenizer makes tokens of a text."""
    return _hash([_core(tokenizer), _special(tokenizer)])


def template_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's chat template."""
    return _hash(_chat_template(tokenizer))


def _core(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    core = json.loads(backend.to_str())
    core.pop("truncation", None)  # these two say how it was last called, not what it is
    core.pop("padding", None)
    return core


def _special(tokenizer: Any) -> dict[str, str]:
    return {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}


def _chat_template(tokenizer: Any) -> Any:
    return tokenizer.chat_template


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
