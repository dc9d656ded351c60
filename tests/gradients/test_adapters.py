"""Adapters of every kind: what they train, in which state they are, and their gradients against autograd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_kinds
import peft
import pytest
import torch
from adapter_kinds import Adapter
from own_gradients import SEED, WIDTH, own_sketches, relative_error, texts
from tiny import records, save_tiny, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.data.encoding import Encoded, Status
from rapidin.errors import UserError
from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel

ON = {"target_modules": ["q_proj", "v_proj"]}
NAMES = [
    "LoRA", "LoRA, all linear layers", "LoRA, bias of its own", "LoRA, all biases", "LoRA, trained tokens",
    "LoRA, embedding", "LoRA, norms saved", "LoRA, tied head and embedding saved", "LoRA, PiSSA",
    "LoRA, layers repeated", "DoRA", "Prompt tuning", "Prefix tuning", "Adaption prompt", "IA3", "LN tuning",
    "Trained tokens", "AdaLoRA", "LoHa", "LoKr", "OFT", "BOFT", "HRA", "VeRA", "VB-LoRA", "FourierFT",
]  # fmt: skip
TIED = {"tie_word_embeddings": True}
KINDS: dict[str, Adapter] = {
    **{name: adapter_kinds.KINDS[name] for name in NAMES},
    "LoRA, tied head saved": Adapter("LoraConfig", on=TIED, **ON, modules_to_save=["lm_head"]),
}
if "ensure_weight_tying" in peft.LoraConfig.__dataclass_fields__:
    KINDS["LoRA, tied ends saved as one"] = Adapter(
        "LoraConfig", on=TIED, **ON, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
# For inference peft keeps the prompts that these networks made, instead of the networks.
REDUCED = {name: adapter_kinds.KINDS[name] for name in ("P-tuning", "Prefix tuning, projected")}


def make(folder: Path, kind: str) -> Any:
    """An adapter as if it had been trained; it is saved in folder/adapter, its model in folder/model."""
    adapter = (KINDS | REDUCED)[kind]
    base = save_tiny(folder, **adapter.on).model
    model = type(tiny_llama()).from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = getattr(peft, adapter.config)(task_type="CAUSAL_LM", **adapter.settings)
        tuned = peft.get_peft_model(model, config).eval()
        for p in tuned.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.05)
    tuned.save_pretrained(folder / "adapter")
    return tuned


def frozen(folder: Path) -> Any:
    """The adapter as peft loads it for inference."""
    model = type(tiny_llama()).from_pretrained(folder / "model")
    return peft.PeftModel.from_pretrained(model, folder / "adapter").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17)[None]).logits


def check_gradients(loaded: LoadedModel) -> None:
    """Sketches of texts, as a cache is made of them, against autograd's gradients of each text by itself."""
    source = Attributor(loaded, at=1.0, preconditioner="off", width=WIDTH, seed=SEED).source
    some = texts(n=3)
    for ids, _ in some:
        ids[1] = 5  # a token that some adapters train
    encoded = [Encoded(ids, target, Status.OK) for ids, target in some]
    source = source.with_check(source.checked(encoded))
    got, status = source.sketches(encoded)
    assert status.tolist() == [int(Status.OK)] * 3
    want = torch.stack([own_sketches(loaded.model, source.targets, text) for text in some])
    assert float(want.norm()) > 1e-3
    assert relative_error(got, want) < 1e-4


QUICK = ("LoRA", "DoRA", "IA3", "Prompt tuning", "Prefix tuning", "VeRA")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS]
)
def test_what_an_adapter_trains_is_the_same_however_it_comes(tmp_path: Path, kind: str) -> None:
    tuned = make(tmp_path, kind)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    answer = logits(tuned)
    in_memory = LoadedModel.of(tuned, tiny_tokenizer())
    from_disk = load_model(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    for_inference = LoadedModel.of(frozen(tmp_path), tiny_tokenizer())
    for loaded in (in_memory, from_disk, for_inference):
        assert loaded.trained == trained
        torch.testing.assert_close(logits(loaded.model), answer)
        assert loaded.identity == in_memory.identity
    check_gradients(from_disk)


@pytest.mark.parametrize("kind", REDUCED)
def test_prompts_of_a_network_are_the_prompts_themselves_for_inference(tmp_path: Path, kind: str) -> None:
    tuned = make(tmp_path, kind)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) > 1
    assert LoadedModel.of(tuned, None).trained == trained
    from_disk = load_model(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    assert from_disk.trained == ["prompt_encoder.default.embedding.weight"]
    assert LoadedModel.of(frozen(tmp_path), None).trained == from_disk.trained
    torch.testing.assert_close(logits(from_disk.model), logits(tuned))
    check_gradients(LoadedModel.of(tuned, tiny_tokenizer()))
    check_gradients(from_disk)


def test_biases_of_the_adapted_layers_alone() -> None:
    tuned = tiny_lora(tiny_llama(attention_bias=True), bias="lora_only")
    trained = LoadedModel.of(tuned, None).trained or []
    assert sum("bias" in name for name in trained) == 4
    tuned.requires_grad_(False)
    assert LoadedModel.of(tuned, None).trained == trained


def test_an_adapter_that_was_partly_frozen_by_hand_counts_in_part() -> None:
    tuned = tiny_lora(tiny_llama())
    for name, p in tuned.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    trained = LoadedModel.of(tuned, None).trained
    assert trained
    assert all("lora_B" in name for name in trained)


def merged() -> Any:
    tuned = tiny_lora(tiny_llama())
    tuned.merge_adapter()
    return tuned


def disabled() -> Any:
    tuned = tiny_lora(tiny_llama())
    tuned.base_model.disable_adapter_layers()
    return tuned


def disabled_in_the_model() -> Any:
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(**ON))
    model.disable_adapters()
    return model


def inactive() -> Any:
    tuned = tiny_lora(tiny_llama())
    tuned.base_model.set_adapter([])
    return tuned


@pytest.mark.parametrize(
    ("make_model", "words"),
    [
        (merged, r"merged .*unmerge_adapter\(\)"),
        (disabled, r"disabled.*enable_adapter_layers\(\)"),
        (disabled_in_the_model, r"disabled.*enable_adapters\(\)"),
        (inactive, "no adapter .* active"),
    ],
)
def test_an_adapter_that_takes_no_part_says_why(make_model: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Attributor(make_model(), tiny_tokenizer())
    assert "\n" not in str(error.value)


def test_a_disabled_prompt_says_so(tmp_path: Path) -> None:
    tuned = make(tmp_path, "Prompt tuning")
    with tuned.disable_adapter(), pytest.raises(UserError, match="disabled"):
        LoadedModel.of(tuned, None)
    assert LoadedModel.of(tuned, None).trained


def test_a_model_whose_adapter_was_merged_and_removed_is_a_plain_model() -> None:
    assert LoadedModel.of(tiny_lora(tiny_llama()).merge_and_unload(), None).trained is None


def test_only_the_active_adapter_counts_and_moves() -> None:
    tuned = tiny_lora(tiny_llama())
    tuned.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", **ON))
    loaded = LoadedModel.of(tuned, None)
    assert loaded.trained
    assert all(".default." in name for name in loaded.trained)
    moved = {id(p) for p, _, _ in loaded.path.ends}
    assert {id(p) for n, p in tuned.named_parameters() if "lora_B.default" in n} == moved


# ------------------------------------------------------------------------- transformers' own adapters


def with_own_adapter(folder: Path) -> Path:
    """A model's folder that holds an adapter too, as some repositories do."""
    saved = save_tiny(folder, lora=True)
    assert saved.adapter is not None
    shutil.copytree(saved.model, folder / "both")
    for path in saved.adapter.glob("adapter_*"):
        shutil.copy(path, folder / "both")
    return folder / "both"


def test_an_adapter_inside_of_the_model_is_as_one_around_it(tmp_path: Path) -> None:
    own = with_own_adapter(tmp_path)
    around = load_model(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    inside = type(tiny_llama()).from_pretrained(tmp_path / "model")
    inside.load_adapter(str(tmp_path / "adapter"))
    sketches = []
    for loaded in (LoadedModel.of(inside, tiny_tokenizer()), load_model(str(own))):
        assert loaded.trained == [name.removeprefix("base_model.model.") for name in around.trained or ()]
        torch.testing.assert_close(logits(loaded.model), logits(around.model))
        assert len(loaded.path.ends) == len(around.path.ends)
        with loaded.path.at(0.5), around.path.at(0.5):
            torch.testing.assert_close(logits(loaded.model), logits(around.model))
        check_gradients(loaded)
        source = Attributor(loaded, preconditioner="off", width=64).source
        assert source.points == [0.5]
        sketches.append(source.sketches([source.encoder(record) for record in records(3)])[0])
    torch.testing.assert_close(*sketches)


def test_a_new_adapter_inside_of_the_model_counts() -> None:
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(**ON))
    trained = LoadedModel.of(model, None).trained
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    assert LoadedModel.of(model, None).trained == trained


def test_the_weights_of_an_adapter_in_the_models_folder_are_checked(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = with_own_adapter(tmp_path)
    file = own / "adapter_model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "layers.1." not in n}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\."):
        load_model(str(own))


def test_folders_that_are_mixed_up_say_so(tmp_path: Path) -> None:
    own = with_own_adapter(tmp_path)
    model, adapter = str(tmp_path / "model"), str(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is an adapter, not a model; .*`adapter`"):
        load_model(adapter)
    with pytest.raises(UserError, match="already contains an adapter"):
        load_model(str(own), adapter=adapter)
    with pytest.raises(UserError, match="leave `base` out"):
        load_model(str(own), base=model)
    assert load_model(str(own), adapter=str(own)).trained == load_model(str(own)).trained


def test_an_adapter_for_another_task_is_refused(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path, lora=True)
    assert saved.adapter is not None
    config = saved.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match="made for the task SEQ_CLS"):
        load_model(str(saved.model), adapter=str(saved.adapter))


# ---------------------------------------------------------------------------------- another base


def made_for(folder: Path, recorded: str | None) -> list[str]:
    """What loading notes of an adapter whose config names this base model."""
    config = folder / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": recorded}
    config.write_text(json.dumps(settings))
    return load_model(str(folder / "model"), adapter=str(folder / "adapter")).notes


@pytest.mark.filterwarnings("ignore:the adapter was made for")
def test_an_adapter_of_another_base_is_noted(tmp_path: Path) -> None:
    save_tiny(tmp_path, lora=True)
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    other = save_tiny(tmp_path / "other", seed=5).model
    downloads = "/hub/models--some-lab--model/snapshots/0123"
    for same in (None, str(tmp_path / "model"), str(tmp_path / "copy"), "some-lab/model", downloads):
        assert made_for(tmp_path, same) == [], same
    for another in (str(other), "some-lab/another-model", "/gone/another"):
        (note,) = made_for(tmp_path, another)
        assert another in note


def test_the_note_is_a_warning(tmp_path: Path) -> None:
    save_tiny(tmp_path, lora=True)
    with pytest.warns(UserWarning, match="made for the model 'some-lab/another-model'"):
        made_for(tmp_path, "some-lab/another-model")


def test_a_tied_head_of_gpt2_has_its_own_gradient() -> None:
    tuned = tiny_lora(tiny_gpt2(), modules_to_save=["lm_head"])
    check_gradients(LoadedModel.of(tuned, tiny_tokenizer()))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("XLoraConfig", {}),
        ("PolyConfig", ON | {"r": 4, "n_tasks": 1, "n_skills": 2}),
        ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_tasks": 2}),
    ],
)
def test_adapters_that_need_more_than_a_text_are_refused(name: str, settings: dict[str, Any]) -> None:
    config = getattr(peft, name)(task_type="CAUSAL_LM", **settings)
    model = tiny_llama()
    model.config.use_cache = False
    with pytest.raises(UserError) as error:
        Attributor(peft.get_peft_model(model, config), tiny_tokenizer(), at=1)
    assert "\n" not in str(error.value)
