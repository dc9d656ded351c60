"""What caching finds out about a model first: gradients unlike autograd's, and what does not count."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_types import tiny_causal
from fitted import fitted
from own_gradients import own_sketches
from passes import at_pass
from tiny import records, tiny_llama, tiny_lora, tiny_tokenizer
from torch import Tensor, nn

from rapidin import Attributor, Cache, CoverageWarning, UserError, ops
from rapidin.attribution.plan import make_plan
from rapidin.attribution.progress import Watch
from rapidin.attribution.provenance import source_of
from rapidin.cache import Manifest
from rapidin.cache.merge import merge
from rapidin.cache.names import shard_name
from rapidin.cache.progress import Progress
from rapidin.gradients.coverage import Coverage, coverage_of
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import all_parameters, find_targets
from rapidin.gradients.preconditioner import PreconditionerConfig

SETTINGS: dict[str, Any] = {"width": 128, "seed": 11, "preconditioner": "off"}
DOWN = "model.layers.0.mlp.down_proj.weight"


class TwiceUsed(nn.Linear):
    """A linear layer whose weight counts twice, which its type does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + 0.5 * nn.functional.linear(x, self.weight)


def wrong_model() -> Any:
    model = tiny_llama()
    layer = model.model.layers[0].mlp.down_proj
    other = TwiceUsed(layer.in_features, layer.out_features, bias=False)
    other.load_state_dict(layer.state_dict())
    model.model.layers[0].mlp.down_proj = other
    return model


def attributor_of(model: Any, **settings: Any) -> Attributor:
    return Attributor(model, tiny_tokenizer(), **SETTINGS | settings)


def test_a_wrong_gradient_is_named_in_the_manifest_and_right_in_cache_and_query(tmp_path: Path) -> None:
    model = wrong_model()
    attributor = attributor_of(model)
    seen: list[Progress] = []
    cache = attributor.cache(records(6), tmp_path / "cache", dtype="float32", on_progress=seen.append)
    messages = [p.message for p in seen if p.message]
    assert len(messages) == 2
    assert "autograd computes those of 1, one example at a time" in messages[0]
    assert f"(such as '{DOWN}', relative error" in messages[0]
    assert messages[1].startswith("examples are processed one at a time: autograd computes the gradient")
    check = json.loads((cache.path / "manifest.json").read_text())["gradient"]["check"]
    assert list(check["by_autograd"]) == [DOWN]
    assert check["compared"] == check["total"] == 14
    assert check["by_autograd"][DOWN] == pytest.approx(1 / 3, rel=0.01)
    assert cache.info()["gradient"]["check"] == check

    source = source_of(cache.manifest, LoadedModel.of(model, tiny_tokenizer()))
    assert source.sketcher.single_names == [DOWN]
    texts = [source.encoder(record) for record in records(6)]
    expected = torch.stack([own_sketches(model, source.targets, (t.ids, t.target)) for t in texts])
    got, _ = source.sketches(texts)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    rows = cache.sketches(range(6)).view(6, 14, 128) * cache.lengths(range(6))[..., None]
    assert (rows - expected).norm() < 1e-5 * expected.norm()

    record = records(6)[4]
    pair = [(record["prompt"], record["completion"])]
    (result,) = attributor.query(cache, pair, errors=False, normalize="layer")
    assert result.top[0].index == 4
    assert result.top[0].score == pytest.approx(1.0, abs=1e-4)

    unchecked = attributor.cache(records(6), tmp_path / "unchecked", dtype="float32", check=False)
    assert "check" not in unchecked.manifest.gradient
    wrong = unchecked.sketches(range(6)).view(6, 14, 128) * unchecked.lengths(range(6))[..., None]
    names = [target.name for target in source.targets]
    errors = (wrong - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))
    assert [name for name, error in zip(names, errors, strict=True) if error > 1e-4] == [DOWN]


def test_a_resumed_cache_keeps_its_check_and_is_not_begun_again_with_another(tmp_path: Path) -> None:
    attributor = attributor_of(wrong_model())
    whole = attributor.cache(records(6), tmp_path / "whole", shard_rows=2)
    (whole.path / shard_name(1)).unlink()
    again = attributor.cache(records(6), whole.path, shard_rows=2, check=False)  # as it was begun
    assert again.manifest == whole.manifest

    begun = attributor.cache(records(6), tmp_path / "begun", shard_rows=2, check=False)
    (begun.path / shard_name(1)).unlink()
    with pytest.raises(UserError, match=rf"was begun without the check, .* are wrong: .*{DOWN}"):
        attributor.cache(records(6), begun.path, shard_rows=2)
    right = attributor_of(tiny_llama())
    begun = right.cache(records(6), tmp_path / "right", shard_rows=2, check=False)
    (begun.path / shard_name(1)).unlink()
    finished = right.cache(records(6), begun.path, shard_rows=2)
    assert finished.manifest.gradient["check"]["by_autograd"] == {}


def test_a_manifest_without_check_and_coverage_opens_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    cache = attributor_of(model).cache(records(6), tmp_path / "cache")
    path = cache.path / "manifest.json"
    whole = json.loads(path.read_text())
    earlier = json.loads(path.read_text())
    del earlier["gradient"]["check"], earlier["gradient"]["coverage"]
    path.write_text(json.dumps(earlier))
    (result,) = attributor_of(model).query(Cache(cache.path), [("one", " two")])
    assert len(result.top) == 6
    for key, part, value in [
        ("check", "by_autograd", {"a": "much"}),
        ("check", "compared", -1),
        ("check", "mixed", None),
        ("check", "unchecked", [3]),
        ("coverage", "total", 0),
        ("coverage", "weights", "all"),
        ("coverage", "left_out", [{"kind": "norms", "parameters": 1, "elements": 1, "names": []}]),
    ]:
        damaged = json.loads(json.dumps(whole))
        damaged["gradient"][key][part] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="damaged"):
            Manifest.read(cache.path)
        del damaged["gradient"][key][part]
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="damaged"):
            Manifest.read(cache.path)


def test_a_cache_with_experts_sketched_in_another_way_is_refused(tmp_path: Path) -> None:
    model = tiny_causal("mixtral")
    cache = attributor_of(model).cache(records(6), tmp_path / "cache")
    path = cache.path / "manifest.json"
    earlier = json.loads(path.read_text())
    del earlier["gradient"]["stack_sketch"]
    path.write_text(json.dumps(earlier))
    with pytest.raises(UserError, match="sketched routed experts in another way"):
        attributor_of(model).query(Cache(cache.path), [("one", " two")])
    with pytest.raises(UserError, match="stack_sketch"):
        attributor_of(model).cache(records(6), tmp_path / "cache")


def test_data_without_any_gradient_are_not_checked(tmp_path: Path) -> None:
    seen: list[Progress] = []
    empty = [{"prompt": "one", "completion": ""}] * 3
    cache = attributor_of(tiny_llama()).cache(empty, tmp_path / "cache", on_progress=seen.append)
    assert [p.message for p in seen if p.message] == [
        "gradients are not compared with autograd's: no example has a gradient"
    ]
    assert "check" not in cache.manifest.gradient


# --------------------------------------------------------------------------------- what does not count


class Tables(nn.Module):
    """An MLP beside parameters of a kind that does not count unless it is asked for."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.expert_table = nn.Parameter(torch.randn(size, 4, 4, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output * self.expert_table.square().mean().exp()


def mostly_uncounted() -> Any:
    model = tiny_llama()
    model.model.layers[1].mlp = Tables(model.model.layers[1].mlp, 400)
    return model


def test_what_does_not_count_is_named_by_kind() -> None:
    model = tiny_llama(attention_bias=True)
    targets = find_targets(model)
    coverage = coverage_of(model, targets)
    assert [part.kind for part in coverage.left_out] == ["embeddings", "output head", "norms", "biases"]
    counts = {part.kind: (part.parameters, part.elements) for part in coverage.left_out}
    assert counts == {
        "embeddings": (1, 320 * 32),
        "output head": (1, 320 * 32),
        "norms": (5, 5 * 32),
        "biases": (8, 2 * (32 + 16 + 16 + 32)),
    }
    total = sum(p.numel() for p in model.parameters())
    assert coverage.counted + sum(part.elements for part in coverage.left_out) == coverage.total == total
    assert not coverage.is_low
    assert coverage.weights == 1.0
    assert Coverage.from_json(json.loads(json.dumps(coverage.to_json()))) == coverage
    assert coverage_of(model, all_parameters(model)).text == "100.0% of the model's parameters are used"

    few = coverage_of(model, targets[:10])
    assert few.is_low
    assert 0.5 < few.weights < 0.9
    assert "other (" in few.text
    assert not coverage_of(model, targets[:10], chosen=True).is_low


def test_an_adapter_and_chosen_parameters_are_quiet(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        lora = attributor_of(tiny_lora(tiny_llama()))
        assert lora.source.coverage.left_out == ()
        assert 0 < lora.coverage < 0.1
        lora.cache(records(4), tmp_path / "lora")
        attributor_of(tiny_llama()).cache(records(4), tmp_path / "dense")
        chosen = attributor_of(mostly_uncounted(), exclude=["q_proj"])
        cache = chosen.cache(records(4), tmp_path / "chosen")
    kinds = [part["kind"] for part in cache.manifest.gradient["coverage"]["left_out"]]
    assert kinds == ["experts", "embeddings", "output head", "norms", "other"]


def test_a_model_of_which_little_counts_is_warned_about(tmp_path: Path) -> None:
    attributor = attributor_of(mostly_uncounted())
    with pytest.warns(CoverageWarning, match=r"only 37.\d% of the model's weights") as caught:
        cache = attributor.cache(records(4), tmp_path / "cache")
    message = str(caught[0].message)
    assert "experts (41.6%: 1 parameters such as 'model.layers.1.mlp.expert_table')" in message
    record = cache.manifest.gradient["coverage"]
    assert record["left_out"][0] == {
        "kind": "experts",
        "parameters": 1,
        "elements": 25600,
        "names": ["model.layers.1.mlp.expert_table"],
    }
    assert issubclass(CoverageWarning, UserWarning)


def test_a_plan_says_what_counts_and_is_checked() -> None:
    plan = make_plan(attributor_of(wrong_model()).source, 100, tokens=12)
    assert plan.check is not None
    assert list(plan.check.by_autograd) == [DOWN]
    assert plan.coverage.left_out[0].kind == "embeddings"


# ------------------------------------------------- the preconditioner's sample is sketched as it is fitted


FEW = {"width": 64, "preconditioner": PreconditionerConfig("kfac", sample=40, rank=5), "batch_tokens": 1}
ROWS = 48  # of which 32 are in the sample: a quarter would be fewer
COMPACT = {"bytes": 250, "sample": 24}


def few_rows(**settings: Any) -> Attributor:
    return Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), **FEW | settings)


def in_one_pass(where: Path, attributor: Attributor | None = None, **options: Any) -> Cache:
    made = attributor or few_rows()
    return made.cache(records(ROWS), where, shard_rows=16, check=False, null=False, **options)


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cache]:
    """whole_of(**options): the cache that in_one_pass makes, once for all tests, which leave it as it is."""
    made: dict[str, Cache] = {}

    def of(**options: Any) -> Cache:
        name = json.dumps(options, sort_keys=True)
        if name not in made:
            made[name] = in_one_pass(tmp_path_factory.mktemp("whole"), **options)
        return made[name]

    return of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_sample_of_the_preconditioner_takes_one_pass(tmp_path: Path) -> None:
    """With a batch for each row, passes are counted by row; at two points the sample takes two."""
    for at, passes in ([0.5], ROWS), ([0.0, 0.5], 2 * (ROWS + 32)):
        attributor = few_rows(at=at)
        with at_pass(-1) as begun:
            cache = attributor.cache(records(ROWS), tmp_path / str(passes), check=False, null=False)
        assert len(begun) == passes
        assert not {"sample", "fitted"} & {path.name for path in cache.path.iterdir()}


@pytest.fixture(scope="module")
def sketched_apart(whole_of: Callable[..., Cache]) -> tuple[Tensor, Tensor]:
    """The sketches of all rows by a pass of their own, and their status."""
    source = fitted(few_rows(), whole_of(dtype="float32")).source
    return source.sketches([source.example(record) for record in records(ROWS)])


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {}, {"dtype": "int8"}, COMPACT])
def test_its_rows_are_those_of_a_pass_of_their_own(
    whole_of: Callable[..., Cache], sketched_apart: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    cache = whole_of(**options)
    assert cache.manifest.gradient == whole_of(dtype="float32").manifest.gradient
    sketches, status = sketched_apart
    unit, length = ops.unit_blocks(sketches)
    assert torch.equal(cache.status(), status)
    # All rows alike, in the sample or not: in float32 they lose nothing on the way, and in others what
    # storing them loses.
    encoded = cache.codec.encode(unit, length)
    want = cache.codec.decode(encoded)
    tolerance = 1e-5 if options.get("dtype") == "float32" else 2e-3 if not options else 2e-2
    got = cache.sketches().view_as(want)
    if options == COMPACT:  # a bit that stands for a number near zero may be the other one
        assert float((got - want).abs().gt(tolerance).float().mean()) < 0.01
    else:
        assert float((got - want).abs().max()) < tolerance * float(want.abs().max())
    torch.testing.assert_close(cache.lengths(), cache.codec.lengths(encoded), rtol=1e-2, atol=1e-6)


def test_examples_of_the_sample_are_done_before_caching_begins(tmp_path: Path) -> None:
    now = [0.0]
    watch = Watch(clock=lambda: now[0])
    stages: list[tuple[str, int, int]] = []

    def see(progress: Progress) -> None:
        now[0] += 1.0
        watch(progress)
        if progress.stage is not None:
            stages.append((progress.stage.name, progress.stage.done, progress.done))
        assert (progress.stage is None) or progress.done <= 32

    in_one_pass(tmp_path, on_progress=see)
    assert ("fitting the preconditioner", 32, 0) in stages
    assert ("sketching the sample", 31, 32) in stages
    assert stages[-1] == ("sketching the sample", 32, 32)
    rate = (ROWS - 32) / (watch.seconds - watch.preparation)  # of the others
    assert f"{watch.preparation:.0f} s of preparation, then {rate:.1f} examples/s" in watch.done_text


class Stopped(Exception):
    """What ends a run here."""


def stop_when(when: Callable[[Progress], bool]) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if when(progress):
            raise Stopped

    return stop


@pytest.mark.parametrize("options", [{}, COMPACT])
@pytest.mark.parametrize(
    ("when", "kept"),
    [
        (lambda p: p.stage is not None and p.stage.done == 20, 0),  # as the moments are gathered
        (lambda p: p.stage is not None and p.done == 10, 0),  # as the sample is sketched
        (lambda p: p.done == 33, 32),  # before any shard is written
        (lambda p: p.done == 42, 32),
    ],
)
def test_a_run_stopped_around_the_fit_goes_on_to_the_same_bytes(
    whole_of: Callable[..., Cache],
    tmp_path: Path,
    when: Callable[[Progress], bool],
    kept: int,
    options: dict[str, Any],
) -> None:
    whole = whole_of(**options)
    with pytest.raises(Stopped):
        in_one_pass(tmp_path / "cache", on_progress=stop_when(when), **options)
    seen: list[Progress] = []
    again = in_one_pass(tmp_path / "cache", on_progress=seen.append, **options)
    assert contents(again.path) == contents(whole.path)
    assert seen[0].done == seen[0].resumed >= kept
    assert (seen[0].resumed == 0) == (kept == 0)
    counts = [progress.done for progress in seen]
    assert counts == sorted(counts)
    assert (counts[-1], seen[-1].stage) == (ROWS, None)


def test_sketches_that_were_made_in_another_way_do_not_count(
    whole_of: Callable[..., Cache], tmp_path: Path
) -> None:
    """Of a run that was killed before it had recorded its preconditioner, or altered since."""
    whole = whole_of(dtype="float32")
    stopped = tmp_path / "stopped"
    with pytest.raises(Stopped):
        in_one_pass(stopped, dtype="float32", on_progress=stop_when(lambda p: p.done == 33))
    for damage in ("other", "layers", "cut", "manifest"):
        place = shutil.copytree(stopped, tmp_path / damage)
        (shard,) = (place / "fitted").glob("shard-*")
        manifest = place / "fitted" / "manifest.json"
        record = json.loads(manifest.read_text())
        if damage == "other":
            record["gradient"]["preconditioner"]["sha256"] = "0" * 64
            manifest.write_text(json.dumps(record))
        elif damage == "layers":
            record["layers"][0]["name"] += "x"
            manifest.write_text(json.dumps(record))
        elif damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-8])
        else:
            manifest.write_text("{")
        attributor = few_rows()
        with at_pass(-1) as begun:
            cache = in_one_pass(place, attributor, dtype="float32")
        assert len(begun) == ROWS  # all are sketched again
        torch.testing.assert_close(cache.sketches(), whole.sketches(), rtol=1e-4, atol=1e-6)
        assert not (place / "fitted").exists()


def test_sketches_that_a_later_check_finds_wrong_do_not_count(tmp_path: Path) -> None:
    def cached(place: Path, **options: Any) -> Cache:
        return attributor_of(wrong_model(), preconditioner=FEW["preconditioner"]).cache(
            records(ROWS), place, null=False, dtype="float32", **options
        )

    place = tmp_path / "cache"
    with pytest.raises(Stopped):
        cached(place, check=False, on_progress=stop_when(lambda p: p.done > 32))
    assert (place / "fitted").exists()
    cache = cached(place)
    source = source_of(cache.manifest, LoadedModel.of(wrong_model(), tiny_tokenizer()))
    assert source.sketcher.single_names == [DOWN]
    want, _ = source.sketches([source.example(record) for record in records(ROWS)])
    got = cache.sketches().view_as(want) * cache.lengths()[..., None]
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_a_link_in_the_place_of_the_samples_sketches_is_not_followed(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        in_one_pass(tmp_path / "cache", on_progress=stop_when(lambda p: p.done == 33))
    fitted_folder = tmp_path / "cache" / "fitted"
    elsewhere = fitted_folder.rename(tmp_path / "elsewhere")
    fitted_folder.symlink_to(elsewhere)
    in_one_pass(tmp_path / "cache")
    assert (elsewhere / "manifest.json").exists()
    assert not fitted_folder.is_symlink()


def test_parts_take_the_samples_sketches_from_the_folder_that_was_learned_once(
    whole_of: Callable[..., Cache], tmp_path: Path
) -> None:
    whole = whole_of()
    attributor = few_rows()
    with at_pass(-1) as begun:
        in_one_pass(tmp_path / "shared", attributor, part=(0, 2))
    assert len(begun) == 32
    for number in (1, 2):
        shutil.copytree(tmp_path / "shared", tmp_path / str(number))
        seen: list[Progress] = []
        in_one_pass(tmp_path / str(number), part=(number, 2), on_progress=seen.append)
        assert seen[-1].done == seen[-1].total
        assert 0 < seen[0].resumed < 32  # those of its own shards
    merged = merge(tmp_path / "merged", [tmp_path / "1", tmp_path / "2"])
    assert torch.equal(merged.sketches(), whole.sketches())
    assert torch.equal(merged.lengths(), whole.lengths())


@pytest.mark.parametrize("lost", ["preconditioner.safetensors", "decoys"])
def test_a_shard_that_was_lost_is_made_again_as_it_was(
    whole_of: Callable[..., Cache], tmp_path: Path, lost: str
) -> None:
    """With the preconditioner, or without anything else."""
    whole = whole_of()
    place = shutil.copytree(whole.path, tmp_path / "cache")
    for name in (lost, shard_name(1)):
        (place / name).unlink(missing_ok=True)
    again = in_one_pass(place)
    assert len(again) == ROWS
    assert contents(place) == contents(whole.path)


def test_a_resumed_run_does_not_try_again_what_cannot_be_kept(tmp_path: Path) -> None:
    """An empty folder says so."""
    with pytest.raises(Stopped):
        in_one_pass(tmp_path, on_progress=stop_when(lambda p: p.done == 33))
    for path in (tmp_path / "fitted").iterdir():
        path.unlink()
    attributor = few_rows()
    with at_pass(-1) as begun:
        in_one_pass(tmp_path, attributor)
    assert len(begun) == ROWS
