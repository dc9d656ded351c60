"""Loading, identity, and the path from base to tuned model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_gradients import SEED, WIDTH, own_sketches, relative_error, texts
from tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.errors import UserError
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel
from rapidin.tasks.causal import TokenBatch


def logits(model: object, at: LoadedModel | None = None, point: float = 1.0) -> torch.Tensor:
    ids = torch.arange(12)[None]
    with torch.no_grad():
        if at is None:
            return model(ids).logits  # type: ignore[operator]
        with at.path.at(point):
            return model(ids).logits  # type: ignore[operator]


def test_at_zero_is_the_base_and_one_the_tuned_model_of_an_adapter(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path, lora=True)
    base = load_model(str(saved.model))
    tuned = load_model(str(saved.model), adapter=str(saved.adapter))
    before = logits(tuned.model)
    assert not torch.allclose(before, logits(base.model))
    torch.testing.assert_close(logits(tuned.model, tuned, 0.0), logits(base.model))
    for name, p in tuned.model.named_parameters():
        if "lora_B" in name:
            value = p.detach().clone()
            with tuned.path.at(0.25):
                torch.testing.assert_close(p.detach(), 0.25 * value)
    assert torch.equal(logits(tuned.model), before)


def test_modules_to_save_go_from_their_originals() -> None:
    model = tiny_lora(tiny_llama(), modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    loaded = LoadedModel.of(model, tiny_tokenizer())
    with loaded.path.at(0.25):
        moved = head.modules_to_save["default"].weight - head.original_module.weight
        torch.testing.assert_close(moved, torch.full_like(moved, 0.25))
    moved = head.modules_to_save["default"].weight - head.original_module.weight
    torch.testing.assert_close(moved, torch.full_like(moved, 1.0))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_magnitudes_of_dora_go_from_the_norms_of_the_weights(make: Callable[[], Any]) -> None:
    before = logits(make())
    targets = ["c_attn", "wte"] if make is tiny_gpt2 else ["q_proj", "v_proj", "embed_tokens"]
    tuned = tiny_lora(make(), use_dora=True, target_modules=targets)
    magnitudes = {n: p for n, p in tuned.named_parameters() if "lora_magnitude_vector" in n}
    start = {name: p.detach().clone() for name, p in magnitudes.items()}  # as peft made them
    for name, p in tuned.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name or name in magnitudes:
            p.data.add_(0.3 * torch.randn_like(p))
    end = {name: p.detach().clone() for name, p in magnitudes.items()}
    loaded = LoadedModel.of(tuned, tiny_tokenizer())
    torch.testing.assert_close(logits(tuned, loaded, 0.0), before)
    with loaded.path.at(0.25):
        for name, p in magnitudes.items():
            torch.testing.assert_close(p.detach(), torch.lerp(start[name], end[name], 0.25))
    assert all(torch.equal(p, end[name]) for name, p in magnitudes.items())
    assert Attributor(loaded).source.points == [0.5]


def test_a_model_tuned_in_full_goes_from_its_base(tmp_path: Path) -> None:
    base, tuned = save_tiny(tmp_path / "a", seed=0), save_tiny(tmp_path / "b", seed=3)
    loaded = load_model(str(tuned.model), base=str(base.model))
    torch.testing.assert_close(logits(loaded.model, loaded, 0.0), logits(load_model(str(base.model)).model))
    torch.testing.assert_close(logits(loaded.model, loaded, 1.0), logits(load_model(str(tuned.model)).model))
    assert Attributor(loaded).source.points == [0.5]


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    base, tuned = save_tiny(tmp_path / "a", hidden_size=16), save_tiny(tmp_path / "b")
    with pytest.raises(UserError, match=r"is not what .* was tuned from"):
        load_model(str(tuned.model), base=str(base.model))


def test_points_are_restored_after_an_error() -> None:
    loaded = LoadedModel.of(tiny_lora(tiny_llama()), tiny_tokenizer())
    before = logits(loaded.model)
    with pytest.raises(RuntimeError), loaded.path.at(0.5):
        raise RuntimeError
    assert torch.equal(logits(loaded.model), before)


def test_default_points() -> None:
    tokenizer = tiny_tokenizer()
    assert Attributor(tiny_llama(), tokenizer).source.points == [1.0]
    assert Attributor(tiny_lora(tiny_llama()), tokenizer).source.points == [0.5]
    assert Attributor(tiny_lora(tiny_llama()), tokenizer, at=[0.1, 0.9]).source.points == [0.1, 0.9]


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"init_lora_weights": "olora"}])
def test_an_adapter_whose_untuned_state_is_not_known_needs_at_1(settings: dict[str, object]) -> None:
    model = tiny_lora(tiny_gpt2() if settings.get("bias") else tiny_llama(), **settings)
    with pytest.raises(UserError, match="`at=1`"):
        Attributor(model, tiny_tokenizer())
    with pytest.raises(UserError, match="`at=1`"):
        Attributor(model, tiny_tokenizer(), at=0.5)
    assert Attributor(model, tiny_tokenizer(), at=1).source.points == [1.0]


def test_another_kind_of_adapter_needs_at_1() -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"IA3 .*`at=1`"):
        Attributor(model, tiny_tokenizer())
    attributor = Attributor(model, tiny_tokenizer(), at=1)
    assert attributor.source.targets
    assert all("ia3" in t.name for t in attributor.source.targets)


@pytest.mark.parametrize(
    ("at", "words"),
    [(1.5, "not between"), (-0.1, "not between"), ([], "at least one point"), ([1, 1], "twice")],
)
def test_points_that_make_no_sense(at: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), at=at)  # type: ignore[arg-type]


def test_a_plain_model_has_no_point_but_1() -> None:
    with pytest.raises(UserError, match="no base model is given"):
        Attributor(tiny_llama(), tiny_tokenizer(), at=0.5)


def test_identity_tells_weights_adapters_and_tokenizers_apart(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path / "a", lora=True)
    plain, tuned = load_model(str(saved.model)), load_model(str(saved.model), adapter=str(saved.adapter))
    assert plain.identity["tokenizer"] == tuned.identity["tokenizer"]
    assert "adapter" not in plain.identity
    again = load_model(str(saved.model), adapter=str(saved.adapter))
    assert again.identity == tuned.identity
    again = load_model(str(saved.model), adapter=str(saved.adapter))
    with again.path.at(0.3):
        assert again.identity == tuned.identity, "where it stands on the path is no part of what it is"
    other = LoadedModel.of(tiny_lora(tiny_llama(), seed=9), tiny_tokenizer())
    assert other.identity["adapter"] != tuned.identity["adapter"]
    assert LoadedModel.of(tiny_llama(1), tiny_tokenizer()).identity["model"] != plain.identity["model"]
    assert (
        LoadedModel.of(tiny_llama(), tiny_tokenizer(bos=True)).identity["tokenizer"]
        != plain.identity["tokenizer"]
    )


def test_the_tokenizers_identity_does_not_depend_on_how_it_was_last_called() -> None:
    tokenizer = tiny_tokenizer()
    before = LoadedModel.of(tiny_llama(), tokenizer).identity["tokenizer"]
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert LoadedModel.of(tiny_llama(), tokenizer).identity["tokenizer"] == before


def test_an_adapter_loaded_for_inference_has_the_same_targets(tmp_path: Path) -> None:
    from peft import PeftModel

    saved = save_tiny(tmp_path, lora=True)
    frozen = PeftModel.from_pretrained(load_model(str(saved.model)).model, saved.adapter)
    assert not any(p.requires_grad for p in frozen.parameters())
    tuned = load_model(str(saved.model), adapter=str(saved.adapter))
    assert LoadedModel.of(frozen, None).trained == tuned.trained


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path / "a", lora=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    bad = {
        "model not found": lambda: load_model(str(tmp_path / "nowhere")),
        "no config.json": lambda: load_model(str(tmp_path / "empty")),
        "2 GGUF files": lambda: load_model(str(tmp_path / "two")),
        "cannot load the model": lambda: load_model(str(tmp_path / "broken")),
        "adapter not found": lambda: load_model(str(saved.model), adapter=str(tmp_path / "nowhere")),
        "no adapter_config.json": lambda: load_model(str(saved.model), adapter=str(tmp_path / "empty")),
        "base model not found": lambda: load_model(str(saved.model), base=str(tmp_path / "nowhere")),
        "not both": lambda: load_model(str(saved.model), adapter="a", base="b"),
        "unknown model dtype": lambda: load_model(str(saved.model), dtype="float8"),
        "device 'abacus'": lambda: load_model(str(saved.model), device="abacus"),
        "device 'mps': rapidin has kernels": lambda: load_model(str(saved.model), device="mps"),
        "device 'xpu:1': rapidin has kernels": lambda: load_model(str(saved.model), device="xpu:1"),
    }
    for words, call in bad.items():
        with pytest.raises(UserError) as error:
            call()
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_an_adapter_for_another_model_is_one_line(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path / "a", lora=True)
    other = save_tiny(tmp_path / "b", hidden_size=16)
    with pytest.raises(UserError) as error:
        load_model(str(other.model), adapter=str(saved.adapter))
    assert "cannot load the adapter" in str(error.value)
    assert "\n" not in str(error.value)


def changed(
    folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> str:
    """A copy of a saved model or adapter whose weights are changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    (file,) = to.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(to)


def without(words: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if words not in name}


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {name.replace(old, new, 1): value for name, value in weights.items()}


WEIGHTS = {
    "a norm is missing": (
        without("layers.1.input_layernorm"),
        {},
        r"lacks 'model\.layers\.1\.input_layernorm",
    ),
    "no output head": (without("lm_head"), {}, r"lacks 'lm_head\.weight'"),
    "a compiled model": (renamed("", "_orig_mod."), {}, r"also holds '_orig_mod\..* unwrapped"),
    "more layers than the config says": (
        {},
        {"num_hidden_layers": 1},
        r"also holds 'model\.layers\.1\..* 6 more",
    ),
    "fewer layers than the config says": (
        {},
        {"num_hidden_layers": 3},
        r"lacks 'model\.layers\.2\..* 6 more",
    ),
    "another width": ({}, {"intermediate_size": 40}, r"down_proj\.weight' as \[32, 48\], not \[32, 40\]"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, case: str) -> None:
    saved = save_tiny(tmp_path / "a")
    change, settings, words = WEIGHTS[case]
    name = changed(saved.model, tmp_path / "b", change or dict)
    config = tmp_path / "b" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    for given in ({"name": name}, {"name": str(saved.model), "base": name}):
        with pytest.raises(UserError, match=words) as error:
            load_model(**given)
        assert "\n" not in str(error.value)


def test_a_classifier_and_a_headless_model_are_no_language_models(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    for model in (LlamaForSequenceClassification(tiny_llama().config), tiny_llama().model):
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(UserError, match=rf"lm_head.* saved as {type(model).__name__}"):
            load_model(str(tmp_path), task="causal")


def test_a_folder_says_what_its_model_is_for(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    saved = save_tiny(tmp_path / "causal")
    assert type(load_model(str(saved.model)).model).__name__ == "LlamaForCausalLM"
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path)).model).__name__ == "LlamaForSequenceClassification"
    with pytest.raises(UserError, match=r"score.weight.* saved as LlamaForCausalLM"):
        load_model(str(saved.model), task="classification")


ADAPTERS = {
    "another wrapping's names": (
        renamed(".model.model.", ".language_model."),
        "also holds 'base_model.language",
    ),
    "a layer is missing": (without("layers.1."), r"lacks 'base_model.*layers\.1\."),
    "a saved module is missing": (without("lm_head"), "lm_head"),
    "weights of a layer that is not there": (
        lambda weights: (
            weights | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}
        ),
        r"also holds 'base_model.*layers\.7\.",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_weights_that_do_not_fit_the_adapter_are_refused(tmp_path: Path, case: str) -> None:
    saved = save_tiny(tmp_path / "a")
    settings = {"modules_to_save": ["lm_head"]} if "saved module" in case else {}
    tiny_lora(tiny_llama(), **settings).save_pretrained(tmp_path / "adapter")
    assert load_model(str(saved.model), adapter=str(tmp_path / "adapter")).trained
    change, words = ADAPTERS[case]
    with pytest.raises(UserError, match=words) as error:
        load_model(str(saved.model), adapter=changed(tmp_path / "adapter", tmp_path / "b", change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["AdaLoraConfig", "IA3Config", "LoHaConfig", "VBLoRAConfig", "VeraConfig"])
def test_adapters_of_other_kinds_fit_their_own_files(tmp_path: Path, kind: str) -> None:
    """Some share weights between layers, or keep fewer in the file than there are in the model."""
    import peft

    saved = save_tiny(tmp_path / "a")
    more = {"AdaLoraConfig": {"total_step": 10}, "VBLoRAConfig": {"vector_length": 4}}.get(kind, {})
    if kind != "IA3Config":
        more = {"target_modules": ["q_proj"], **more}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **more)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    assert load_model(str(saved.model), adapter=str(tmp_path / "adapter")).trained


# ------------------------------------------------------------------------------ grown vocabularies


def grown(folder: Path, tokens: int, tied: bool) -> tuple[str, str]:
    """(base, tuned): the tuned model has so many tokens more, and all of its weights have moved."""
    base = save_tiny(folder / "base", tie_word_embeddings=tied)
    model = type(tiny_llama()).from_pretrained(base.model)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new {n}>" for n in range(max(0, tokens))])
    model.resize_token_embeddings(320 + tokens)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    return str(base.model), str(folder / "tuned")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [3, -5])
def test_a_base_with_another_vocabulary_gives_what_both_have(tmp_path: Path, tokens: int, tied: bool) -> None:
    base, tuned = grown(tmp_path, tokens, tied)
    with pytest.warns(UserWarning, match=r"embed_tokens\.weight.* only the first 3"):
        loaded = load_model(tuned, base=base)
    assert len(loaded.notes) == 1
    tables = ["model.embed_tokens.weight", *(["lm_head.weight"] if not tied else [])]
    assert all(table in loaded.notes[0] for table in tables)
    untuned = load_model(base)
    shared = min(320, 320 + tokens)
    with loaded.path.at(0.0), torch.no_grad():
        at_base = loaded.model(torch.arange(12)[None]).logits
    torch.testing.assert_close(at_base[..., :shared], logits(untuned.model)[..., :shared])
    ends = {id(p): (start, end) for p, start, end in loaded.path.ends}
    for name, p in loaded.model.named_parameters():
        start, end = ends[id(p)]
        assert start is not None
        assert start.shape == end.shape
        if name in tables:
            assert torch.equal(start[shared:], end[shared:])
    assert Attributor(loaded).source.points == [0.5]
    again = load_model(tuned, base=base)
    assert again.identity == loaded.identity


def test_a_base_whose_tied_head_was_untied_by_tuning(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    weights = dict(load_model(str(base.model)).model.named_parameters(remove_duplicate=False))
    tuned = tiny_llama(7)
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    loaded = load_model(str(tmp_path / "tuned"), base=str(base.model))
    starts = {id(p): start for p, start, _ in loaded.path.ends}
    head = starts[id(loaded.model.lm_head.weight)]
    assert torch.equal(head, weights["lm_head.weight"])
    assert loaded.notes == []


def test_another_width_is_no_other_vocabulary(tmp_path: Path) -> None:
    base, tuned = save_tiny(tmp_path / "a", vocab_size=324), save_tiny(tmp_path / "b", hidden_size=16)
    with pytest.raises(UserError, match="is not what"):
        load_model(str(tuned.model), base=str(base.model))


# ------------------------------------------------------------------------- models that read images

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_index=319
        )
    )


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = VISION | {"model_type": "siglip_vision_model"}
    text = TEXT | {"model_type": "gemma3_text"}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=319)
    )


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "type": "mrope", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 8}
    ids = {"vision_start_token_id": 316, "vision_end_token_id": 317, "image_token_id": 319}
    text = TEXT | {"rope_parameters": rope, "rope_scaling": rope}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=318, **ids)
    )


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_vl])
def test_the_text_side_of_a_model_that_reads_images_counts(tmp_path: Path, make: Callable[[], Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is type(model)
    attributor = Attributor(loaded, preconditioner="off")
    targets = attributor.source.targets
    assert len(targets) == 14
    assert all(".language_model.layers." in target.name for target in targets)
    sketcher = GradientSketcher(loaded.model, targets, width=WIDTH, seed=SEED)
    some = texts(n=3)
    want = torch.stack([own_sketches(loaded.model, targets, text) for text in some])
    assert relative_error(sketcher(TokenBatch.of(some))[0], want) < 1e-4
    assert attributor.generate("one two", max_new_tokens=3) is not None
    # an adapter on the layers of both: a text reaches those of the language model alone
    names = ["q_proj", "v_proj", "qkv"]
    tuned = tiny_lora(loaded.model, target_modules=names)
    trained, counted = LoadedModel.of(tuned, None).trained, Attributor(tuned, tiny_tokenizer()).source.targets
    assert trained is not None
    assert {t.name for t in counted} == {name for name in trained if ".language_model." in name}
    assert len(trained) > len(counted)
