"""The tokenizer beside an adapter, another by its name, and vocabularies that grew in tuning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Saved, save_tiny, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin import Attributor
from rapidin.cache import Manifest
from rapidin.errors import UserError
from rapidin.gradients.load import load_model

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Ho."}]}
    for n in range(4)
]
DIFFERS = "the tokenizer of the adapter is used: its chat template differs from the model's"


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return save_tiny(tmp_path, lora=True, chat=True)


def loaded(saved: Saved, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(str(saved.model), adapter=str(saved.adapter), **options)


def with_template(folder: Path | None, template: str = TEMPLATE) -> Any:
    """A tokenizer with another template, saved in a folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert folder is not None
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_tokenizer_beside_an_adapter_is_used(saved: Saved) -> None:
    own = loaded(saved)
    assert own.notes == []
    assert own.source["tokenizer"] == str(saved.model)
    with_template(saved.adapter)
    tuned = loaded(saved)
    assert tuned.notes == [DIFFERS]
    assert tuned.tokenizer.chat_template == TEMPLATE
    assert tuned.source["tokenizer"] == str(saved.adapter)
    with pytest.warns(UserWarning, match="its chat template differs"):
        load_model(str(saved.model), adapter=str(saved.adapter))
    tiny_tokenizer(chat=True).save_pretrained(saved.adapter)  # the same as the model's: nothing to say
    assert loaded(saved).notes == []


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_alone_beside_an_adapter(saved: Saved, where: str) -> None:
    assert saved.adapter is not None
    text = TEMPLATE if where.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (saved.adapter / where).write_text(text)
    tuned = loaded(saved)
    assert tuned.tokenizer.chat_template == TEMPLATE
    assert tuned.notes == ["the chat template beside the adapter is used: the model's is another"]
    assert tuned.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_model_without_a_template_and_an_adapter_with_one(saved: Saved, tmp_path: Path) -> None:
    (saved.model / "chat_template.jinja").unlink()
    with_template(saved.adapter)
    cache = Attributor(loaded(saved), width=64, preconditioner="off").cache(CHATS, tmp_path / "cache")
    assert cache.info()["counts"]["ok"] == len(CHATS)


def test_another_tokenizer_by_its_name(saved: Saved, tmp_path: Path) -> None:
    with_template(saved.adapter)
    other = with_template(tmp_path / "other", TEMPLATE.replace("[", "<"))
    chosen = loaded(saved, tokenizer=str(tmp_path / "other"))
    assert chosen.tokenizer.chat_template == other.chat_template
    assert chosen.notes == [
        f"the tokenizer of '{tmp_path / 'other'}' is used: its chat template differs from the model's"
    ]
    own = loaded(saved, tokenizer=str(saved.model))
    assert (own.tokenizer.chat_template, own.notes) == (tiny_tokenizer(chat=True).chat_template, [])
    with pytest.raises(UserError, match="tokenizer not found: '/nowhere'"):
        loaded(saved, tokenizer="/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load the tokenizer of '.*empty'"):
        loaded(saved, tokenizer=str(tmp_path / "empty"))


@pytest.mark.full
def test_an_adapter_on_the_hub_brings_its_tokenizer(saved: Saved, tmp_path: Path) -> None:
    with_template(saved.adapter)
    assert saved.adapter is not None
    home = tmp_path / "home" / "hub" / "models--owner--tuned"
    shutil.copytree(saved.adapter, home / "snapshots" / "abc")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    code = (
        "import sys; from rapidin import load_model\n"
        "loaded = load_model(sys.argv[1], adapter='owner/tuned')\n"
        "print(loaded.notes, loaded.source['tokenizer'], '[assistant]' in loaded.tokenizer.chat_template)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(saved.model)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert run.stdout.strip() == f"{[DIFFERS]} owner/tuned True"


# ------------------------------------------------------------------------------------------------- caches


def cached(saved: Saved, path: Path) -> Any:
    return Attributor(loaded(saved), width=64, preconditioner="off").cache(CHATS, path)


@pytest.mark.filterwarnings("ignore")
def test_a_query_loads_the_tokenizer_that_made_the_cache(saved: Saved, tmp_path: Path) -> None:
    with_template(saved.adapter)
    made = cached(saved, tmp_path / "cache")
    assert made.manifest.model["source"]["tokenizer"] == str(saved.adapter)
    again = Attributor.from_cache(tmp_path / "cache")
    assert again.loaded.tokenizer.chat_template == TEMPLATE
    # A tokenizer that moved with its adapter is found there.
    assert saved.adapter is not None
    moved = saved.adapter.rename(tmp_path / "moved")
    found = Attributor.from_cache(tmp_path / "cache", adapter=str(moved))
    assert found.loaded.tokenizer.chat_template == TEMPLATE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("vocabulary", "template", "what"),
    [
        (False, True, "its chat template is not the same"),
        (True, False, "its vocabulary is not the same"),
        (True, True, "its vocabulary and chat template are not the same"),
    ],
)
def test_another_tokenizer_than_at_caching_is_said(
    saved: Saved, tmp_path: Path, vocabulary: bool, template: bool, what: str
) -> None:
    with_template(saved.adapter)
    cached(saved, tmp_path / "cache")
    other = tiny_tokenizer(bos=vocabulary)
    other.chat_template = TEMPLATE + "!" if template else TEMPLATE
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"made with another tokenizer: {what}; name .*`tokenizer`"):
        Attributor.from_cache(tmp_path / "cache", tokenizer=str(tmp_path / "other"))


@pytest.mark.filterwarnings("ignore")
def test_a_cache_that_names_no_tokenizer_opens_with_the_models(saved: Saved, tmp_path: Path) -> None:
    """Earlier versions used the model's, whatever lay beside the adapter."""
    made = cached(saved, tmp_path / "cache")
    with_template(saved.adapter)
    manifest = Manifest.read(made.path)
    manifest.model = {name: manifest.model[name] for name in ("source", "identity")}
    del manifest.model["source"]["tokenizer"]
    manifest.write(made.path)
    opened = Attributor.from_cache(made.path)
    assert opened.loaded.tokenizer.chat_template == tiny_tokenizer(chat=True).chat_template
    assert opened.query(made.path, CHATS[:1])[0].top
    with_template(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer: its contents are not the same"):
        Attributor.from_cache(made.path, tokenizer=str(tmp_path / "other"))


# ------------------------------------------------------------------------------------------- vocabularies


def grown_tokenizer() -> Any:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<x>"]})
    return tokenizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": [320, 321]},
    ],
    ids=["resized", "saved", "adapted", "single tokens"],
)
def test_adapters_with_a_grown_vocabulary(tmp_path: Path, config: dict[str, Any], tied: bool) -> None:
    base = tiny_llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    base.name_or_path = str(tmp_path / "model")
    torch.manual_seed(0)
    base.resize_token_embeddings(323)
    tuned = tiny_lora(base, **config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter")
    grown_tokenizer().save_pretrained(tmp_path / "adapter")
    saved = Saved(tmp_path / "model", tmp_path / "adapter")
    made, again = loaded(saved), loaded(saved)
    ids = torch.tensor([[5, 320, 321, 7, 322]])
    with torch.no_grad():
        wanted = tuned(input_ids=ids).logits
        torch.testing.assert_close(made.model(input_ids=ids).logits, wanted)
    assert made.identity == again.identity
    at = 1.0 if "trainable_token_indices" in config else 0.5
    attributor = Attributor(made, width=64, preconditioner="off", at=at)
    cache = attributor.cache([{"text": "Hi<|im_end|>"}, {"text": "One, two.<x>"}], tmp_path / "cache")
    assert cache.info()["counts"]["ok"] == 2


@pytest.mark.filterwarnings("ignore")
def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path)
    grown_tokenizer().save_pretrained(tmp_path / "grown")
    source = Attributor(
        load_model(str(saved.model), tokenizer=str(tmp_path / "grown")), width=64, preconditioner="off"
    ).source
    what = r"the text has the token 321 \('<\|im_end\|>'\), but the model has embeddings of 320 tokens"
    assert any(source.example({"text": "Howdy!"}).target)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=what):
        source.example({"text": "Howdy!<|im_end|>"})
    from rapidin.data.examples import open_examples

    source.check_records(open_examples([{"text": "Howdy!"}]))
    with pytest.raises(UserError, match=rf"examples\[1\]: {what}"):
        source.check_records(open_examples([{"text": "Howdy!"}, {"text": "<|im_end|>"}]))
