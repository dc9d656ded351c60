"""The optimizer's preconditioner: its scales, sketches made with it, where it comes from, what a cache
keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_gradients import SEED, WIDTH, Scaled, exact_gradients, own_gradients, relative_error, texts
from tiny import records, save_tiny, tiny_gpt2, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin import ops
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.provenance import checked, read_fitted
from rapidin.cache import Cache, Manifest
from rapidin.cache.progress import Progress
from rapidin.cli import main
from rapidin.errors import UserError
from rapidin.gradients.adam import Moments, second_moments
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.kfac import (
    FactorMoments,
    SideMoment,
    Spectrum,
    kfac_scale,
    kfac_scales,
    needed_directions,
)
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.parameters import Target, Use, block_seed, find_targets, matrix_shape
from rapidin.gradients.preconditioner import (
    DAMPING,
    EXPONENT,
    FLOOR,
    KFAC_SAMPLE,
    TOLERANCE,
    Preconditioner,
    PreconditionerConfig,
)
from rapidin.gradients.scale import Factors, Scale
from rapidin.gradients.squares import embedding_squares, factor_squares, formed_squares
from rapidin.ops import LowRank
from rapidin.tasks.causal import TokenBatch

P = EXPONENT


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_sums(got: tuple[torch.Tensor, torch.Tensor], formed: torch.Tensor) -> None:
    """The sums of squares are those of gradients [B, O, I] formed in float64."""
    for sums, axis in zip(got, (2, 1), strict=True):
        assert sums.dtype == torch.float64
        want = formed.double().square().sum(axis)
        # A sum in which nearly everything cancels is rounded as its terms are.
        torch.testing.assert_close(sums, want, rtol=2e-5, atol=1e-7 * float(want.max()))


# -------------------------------------------------------------------------------- sums of squares


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-18, 1e15])
@pytest.mark.parametrize(("tokens", "n_in", "n_out"), [(3, 40, 30), (50, 7, 5), (9, 1, 64), (1, 2, 2)])
def test_squares_from_factors_are_those_of_the_formed_gradient(
    tokens: int, n_in: int, n_out: int, size: float
) -> None:
    columns, rows = noise(4, tokens, n_in) * size, noise(4, tokens, n_out, seed=1) * size
    rows[2] = 0.0  # an example without gradient
    assert_sums(factor_squares(columns, rows), rows.double().mT @ columns.double())


def test_squares_of_embeddings_add_a_token_that_comes_twice_first() -> None:
    ids, grads = torch.tensor([[1, 4, 1, 0], [2, 2, 2, 2]]), noise(2, 4, 6) * 1e-20
    formed = torch.zeros(2, 5, 6, dtype=torch.float64)
    formed.scatter_add_(1, ids[..., None].expand(-1, -1, 6), grads.double())
    assert_sums(embedding_squares(ids, grads, 5), formed)


def test_squares_of_formed_gradients_and_of_what_is_not_finite() -> None:
    grads = noise(3, 4, 5) * 1e-30
    assert_sums(formed_squares(grads), grads)
    grads[1, 2, 3] = float("inf")
    for sums in formed_squares(grads):
        assert sums.isfinite().all(1).tolist() == [True, False, True]
    columns, rows = noise(2, 30, 3), noise(2, 30, 4)
    columns[0, 1, 1] = float("nan")
    for sums in factor_squares(columns, rows):
        assert sums.isfinite().all(1).tolist() == [False, True]


MODELS = {
    "llama": lambda: tiny_llama(),
    "llama tied": lambda: tiny_llama(tie_word_embeddings=True),
    "llama biases": lambda: tiny_llama(attention_bias=True),
    "gpt2": lambda: tiny_gpt2(),
    "lora": lambda: tiny_lora(tiny_llama()),
    "lora gpt2": lambda: tiny_lora(tiny_gpt2()),
}


def all_targets(model: Any) -> list[Target]:
    trained = LoadedModel.of(model, None).trained if hasattr(model, "peft_config") else None
    return find_targets(model, trained=trained, include=() if trained else ["*"])


def own_matrices(model: Any, targets: Sequence[Target], rows: Any = None) -> list[torch.Tensor]:
    """Each target's gradients [B, O, I] of each text, by autograd."""
    each = [own_gradients(model, text) for text in (rows or texts())]
    return [torch.stack([g[t.name] for g in each]).view(len(each), *matrix_shape(t.shape)) for t in targets]


@pytest.mark.parametrize("kind", MODELS)
def test_squares_of_every_parameter(kind: str) -> None:
    model = MODELS[kind]()
    targets = all_targets(model)
    found = GradientSketcher(model, targets, width=8, seed=0).squares(TokenBatch.of(texts()))
    for target, squares, formed in zip(targets, found, own_matrices(model, targets), strict=True):
        for sums, axis in zip(squares, (2, 1), strict=True):
            want = formed.double().square().sum(axis)
            torch.testing.assert_close(sums, want, rtol=1e-3, atol=1e-6 * float(want.max()), msg=target.name)


# ------------------------------------------------------------------------------------------ scales


def test_a_scale_is_the_power_of_the_product_of_row_and_column_means() -> None:
    second = noise(6, 9).square() * 1e-9
    r, c = second.double().mean(1), second.double().mean(0)
    scale = Scale.of(r, c, P, FLOOR)
    want = (r[:, None] * c / r.mean()).pow(-P)
    torch.testing.assert_close(scale.rows[:, None].double() * scale.columns, want, rtol=1e-5, atol=0.0)
    vector = Scale.of(r, r.mean()[None], 0.3, 0.0)  # of a vector it is V itself
    torch.testing.assert_close(vector.rows.double() * vector.columns, r.pow(-0.3), rtol=1e-5, atol=0.0)


def test_rows_without_gradient_neither_explode_nor_give_nan() -> None:
    r, c = torch.tensor([4.0, 0.0, 0.0, 4.0]), torch.tensor([2.0, 2.0, 0.0, 4.0])
    scale = Scale.of(r, c, P, FLOOR)
    torch.testing.assert_close(scale.rows, torch.tensor([4.0, 2 * FLOOR, 2 * FLOOR, 4.0]).pow(-P))
    torch.testing.assert_close(scale.columns, torch.tensor([1.0, 1.0, FLOOR, 2.0]).pow(-P))
    nothing = Scale.of(torch.zeros(4), torch.zeros(3), P, FLOOR)
    assert nothing.rows.tolist() == [1.0] * 4
    assert nothing.columns.tolist() == [1.0] * 3


def test_moments_leave_out_what_is_not_finite() -> None:
    target = Target("w", (3, 2), ())
    grads = noise(5, 3, 2)
    grads[1, 0, 0] = float("nan")
    moments = Moments([target])
    moments.add([formed_squares(grads[:2])])
    moments.add([formed_squares(grads[2:])])
    assert moments.examples == 4
    second = grads[[0, 2, 3, 4]].double().square().mean(0)
    want, got = Scale.of(second.mean(1), second.mean(0), P, FLOOR), moments.scales(P, FLOOR)["w"]
    torch.testing.assert_close(got.rows, want.rows)
    torch.testing.assert_close(got.columns, want.columns)
    with pytest.raises(UserError, match="no example of the preconditioner's sample has a gradient"):
        Moments([target]).scales(P, FLOOR)


# ------------------------------------------------------------------------------------------ sketches


def some_preconditioner(targets: Sequence[Target], points: int = 1) -> Preconditioner:
    tables = []
    for point in range(points):
        table = {}
        for n, target in enumerate(targets):
            o, i = matrix_shape(target.shape)
            seed = 1000 * point + n
            table[target.name] = Scale(noise(o, seed=seed).exp(), noise(i, seed=seed + 500).exp())
        tables.append(table)
    return Preconditioner(tables)


@pytest.mark.parametrize("projection", ["tensor", "flat", "rapidgrad"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_sketch_with_preconditioner_is_that_of_the_scaled_gradient(kind: str, projection: Any) -> None:
    model = MODELS[kind]()
    targets = all_targets(model)
    preconditioner = some_preconditioner(targets)
    sketcher = GradientSketcher(
        model, targets, width=WIDTH, seed=SEED, projection=projection, preconditioner=preconditioner
    )
    got, _ = sketcher(TokenBatch.of(texts()))
    blocks = []
    for target, formed in zip(targets, own_matrices(model, targets), strict=True):
        scale, seed = preconditioner.at(None)[target.name], block_seed(SEED, target.name)
        scaled = formed * scale.rows[:, None] * scale.columns
        if projection == "tensor":
            blocks.append(ops.matrix_sketch(scaled, WIDTH, seed=seed, backend="reference"))
        else:
            flat = scaled.flatten(1)
            blocks.append(ops.flat_sketch([flat], WIDTH, seed=seed, batched=True, backend="reference"))
    want = torch.stack(blocks, 1).float()
    if projection == "rapidgrad":
        want = torch.nn.functional.normalize(want, dim=-1).sum(1, keepdim=True)
    assert relative_error(got, want) < 1e-4


def test_a_parameter_that_comes_by_autograd_is_scaled_and_measured_too() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    targets = find_targets(model, include=["gain"])
    preconditioner = some_preconditioner(targets)
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED, preconditioner=preconditioner)
    text = texts()[1]
    (formed,) = own_matrices(model, targets, [text])
    assert formed.shape == (1, 2, 12)
    scale = preconditioner.at(None)[targets[0].name]
    want = ops.matrix_sketch(
        formed * scale.rows[:, None] * scale.columns, WIDTH, seed=block_seed(SEED, targets[0].name)
    )
    assert relative_error(sketcher(TokenBatch.of([text]))[0][:, 0], want) < 1e-4
    assert_sums(sketcher.squares(TokenBatch.of([text]))[0], formed)  # of the gradient as it is


def test_exact_gradients_are_scaled_and_a_point_must_be_named_where_points_differ() -> None:
    model = tiny_gpt2()
    targets = find_targets(model)
    preconditioner = some_preconditioner(targets, points=2)
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED, preconditioner=preconditioner)
    exact = [exact_gradients(sketcher, text, 1) for text in texts()]
    for n, (target, formed) in enumerate(zip(targets, own_matrices(model, targets), strict=True)):
        scale = preconditioner.points[1][target.name]
        want = formed * scale.rows[:, None] * scale.columns
        torch.testing.assert_close(torch.stack([g[n] for g in exact]), want, rtol=1e-3, atol=1e-5)
    with pytest.raises(TypeError, match="the preconditioner differs between 2 points"):
        sketcher(TokenBatch.of(texts()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_are_scaled_without_leaving_their_range(dtype: torch.dtype) -> None:
    x, scale = torch.tensor([[[1e-4, 2.0, -60000.0]]]).to(dtype), torch.tensor([1e7, 1e3, 1e2])
    got = Scale(torch.ones(2), scale).factors(x, x[..., :2]).applied()[0]
    torch.testing.assert_close(got.float(), x.float() * scale, rtol=2**-8, atol=0.0)


# ------------------------------------------------------------------------------------------ K-FAC


def damped_root(moment: torch.Tensor, damping: float, p: float = P) -> torch.Tensor:
    """``(M / m + d)^-p m^-p`` by its eigenvalues, m their mean."""
    values, vectors = torch.linalg.eigh(moment)
    mean = float(values.mean())
    return (vectors * ((values / mean + damping) * mean).pow(-p)) @ vectors.T


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_a_side_is_the_damped_root_of_its_moment(size: float) -> None:
    x = noise(200, 24) * torch.linspace(0.1, 3, 24) * size
    side = SideMoment(24, 12, 0, torch.device("cpu"))  # twelve and twice twelve: all directions are kept
    for part in x.split(70):
        side.add(part)
    spectrum = side.spectrum(200)
    assert spectrum is not None
    scale = kfac_scale((spectrum, spectrum), (24, 24), P, 0.1, 0.0)
    want = damped_root(x.double().T @ x.double() / 200, 0.1)
    assert scale.row_low_rank is not None
    got = scale.row_low_rank(torch.eye(24)).double() * scale.rows
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_of_a_wide_side_the_strongest_directions_are_known_and_the_rest_is_alike() -> None:
    n, rank, strong = 300, 16, 16
    rotation = torch.linalg.qr(noise(n, n, seed=1)).Q
    values = torch.full((n,), 0.01)
    values[:strong] = torch.linspace(100, 5, strong)
    x = (noise(4000, n) * values.sqrt()) @ rotation.T
    side = SideMoment(n, rank, 5, torch.device("cpu"))
    for part in x.split(512):
        side.add(part)
    spectrum = side.spectrum(len(x))
    assert spectrum is not None
    exact, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    exact, vectors = exact.flip(0), vectors.flip(1)
    # One pass leaves a little of the rest in the strong ones: that is no error of floats.
    torch.testing.assert_close(spectrum.leading, exact[:rank], rtol=0.03, atol=0.0)
    overlap = (spectrum.eigenvectors.T @ vectors[:, :rank]).square().sum() / rank
    assert float(overlap) > 0.999
    assert exact[rank:].mean() < spectrum.trailing < 2 * exact[rank:].mean()
    assert spectrum.mean == pytest.approx(float(exact.mean()), rel=1e-5)
    # and what is done to them: the low-rank form is the matrix itself
    scale = kfac_scale((spectrum, spectrum), (n, n), P, 0.1, 0.0)
    filled = torch.cat([spectrum.leading, torch.full((n - rank,), spectrum.trailing, dtype=torch.float64)])
    rest = torch.linalg.qr(torch.cat([spectrum.eigenvectors, noise(n, n - rank).double()], 1)).Q[:, rank:]
    whole = torch.cat([spectrum.eigenvectors, rest], 1)
    want = damped_root((whole * filled) @ whole.T, 0.1)
    y = noise(3, 7, n)
    got, _ = scale.factors(y, y).applied()
    torch.testing.assert_close(got.double(), y.double() @ want, rtol=1e-3, atol=1e-3 * float(got.std()))


def side_of(values: torch.Tensor, known: int) -> Spectrum:
    """A side with these eigenvalues [n], descending, of which the first `known` are."""
    n = len(values)
    vectors = torch.linalg.qr(noise(n, n).double()).Q[:, :known]
    trailing = float(values[known:].mean()) if known < n else 0.0
    return Spectrum(float(values.mean()), values[:known], trailing, vectors)


def root_of_side(spectrum: Spectrum, damping: float, tolerance: float) -> torch.Tensor:
    """[n, n]: what a side's vectors are multiplied by."""
    n = len(spectrum.eigenvectors)
    scale = kfac_scale((spectrum, spectrum), (n, n), P, damping, tolerance)
    whole = torch.eye(n, dtype=torch.float64) * scale.columns[0]
    low_rank = scale.column_low_rank
    return whole if low_rank is None else low_rank(torch.eye(n)).double() * scale.columns


@pytest.mark.parametrize("known", [64, 200])
@pytest.mark.parametrize("damping", [1.0, 0.1])
@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_the_fewest_directions_are_kept_that_change_gradients_by_the_tolerance(
    known: int, damping: float, tolerance: float
) -> None:
    n = 200
    values = torch.arange(1, n + 1, dtype=torch.float64).pow(-1.2)
    spectrum = side_of(values, known)
    filled = torch.cat([spectrum.leading, torch.full((n - known,), spectrum.trailing, dtype=torch.float64)])
    vectors = torch.linalg.qr(torch.cat([spectrum.eigenvectors, noise(n, n, seed=3).double()], 1)).Q
    moment = (vectors * filled) @ vectors.T
    whole = root_of_side(spectrum, damping, 0.0)

    def change(root: torch.Tensor) -> float:
        """E |(root - whole) x|^2 / E |whole x|^2 of vectors x with this moment."""
        of_both = [torch.trace(y @ moment @ y.T) for y in (root - whole, whole)]
        return float(of_both[0] / of_both[1])

    kept = needed_directions(spectrum, P, damping, tolerance)
    assert kept % 16 == 0 or kept == known
    low_rank = kfac_scale((spectrum, spectrum), (n, n), P, damping, tolerance).column_low_rank
    assert (0 if low_rank is None else low_rank.rank) == kept
    assert change(root_of_side(spectrum, damping, tolerance)) <= tolerance * 1.001
    if kept:  # a step fewer would change more
        less = (kept - 1) // 16 * 16
        fewer = replace(
            spectrum,
            leading=spectrum.leading[:less],
            eigenvectors=spectrum.eigenvectors[:, :less],
            trailing=float(filled[less:].mean()),
        )
        assert change(root_of_side(fewer, damping, 0.0)) > tolerance


def test_a_side_that_is_alike_in_all_directions_needs_none() -> None:
    spectrum = side_of(torch.full((40,), 3.0, dtype=torch.float64), 20)
    scale = kfac_scale((spectrum, spectrum), (40, 40), P, 1.0, TOLERANCE)
    assert scale.row_low_rank is None
    assert scale.column_low_rank is None
    torch.testing.assert_close(scale.rows, torch.full((40,), (2 * 3.0) ** -P))
    again = Preconditioner.of_tensors(Preconditioner([{"w": scale}]).tensors).points[0]["w"]
    assert again.row_low_rank is None
    assert torch.equal(again.rows, scale.rows)


def test_what_is_far_larger_than_the_rest_does_not_drown_it_in_small_dtypes() -> None:
    n = 200
    x = noise(500, n)
    x[:, 3] *= 3000.0  # as a few features of large models are
    side = SideMoment(n, 8, 0, torch.device("cpu"))
    side.add(x)
    spectrum = side.spectrum(500)
    assert spectrum is not None
    scale = kfac_scale((spectrum, spectrum), (n, n), P, 0.01, 0.0)
    y = x[:4, None].to(torch.bfloat16)
    got, _ = scale.factors(y, y).applied()
    assert got.dtype == torch.float32
    assert scale.column_low_rank is not None
    basis, gain = scale.column_low_rank.basis.double(), scale.column_low_rank.gain.double()
    want = (y.double() + (y.double() @ basis * gain) @ basis.T) * scale.columns
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2 * float(want.std()))


@pytest.mark.parametrize("kind", MODELS)
def test_the_moments_of_every_parameter_and_sketches_preconditioned_by_them(kind: str) -> None:
    model = MODELS[kind]()
    targets = all_targets(model)
    batch = TokenBatch.of(texts())
    sketcher = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    moments = FactorMoments(targets, 64, SEED)
    sketcher.add_moments(batch, moments)
    assert moments.examples == len(texts())
    table = kfac_scales(moments, P, 0.1, 0.0)
    sketcher.preconditioner = Preconditioner([table])
    got, _ = sketcher(batch)
    for n, (target, formed) in enumerate(zip(targets, own_matrices(model, targets), strict=True)):
        scale = table[target.name]
        o, i = matrix_shape(target.shape)
        assert scale.shape == (o, i)
        left = scale.formed(torch.eye(o)[None] if o == i else torch.zeros(1, o, i))
        assert left.isfinite().all()
        rows = torch.eye(o) if scale.row_low_rank is None else scale.row_low_rank(torch.eye(o))
        columns = torch.eye(i) if scale.column_low_rank is None else scale.column_low_rank(torch.eye(i))
        rows, columns = rows.double() * scale.rows, columns.double() * scale.columns
        want = ops.matrix_sketch(
            (rows.T @ formed.double() @ columns).float(), WIDTH, seed=block_seed(SEED, target.name)
        )
        assert relative_error(got[:, n], want) < 1e-3, target.name
    # what it is for: with its own moments the whole of a linear layer's gradients is near to white
    linear = [t for t in targets if {u.kind for u in t.uses} <= {"linear", "conv1d"}][:3]
    alone = GradientSketcher(model, linear, width=8, seed=0)
    exact = [alone.exact(TokenBatch.of([text])) for text in texts()]
    for n, target in enumerate(linear):
        factors = [of_text[n].factors for of_text in exact]
        sizes = [f.columns.norm(dim=1) * f.rows.norm(dim=1) for f in factors]
        reached = torch.cat([size > 1e-5 * size.max() for size in sizes])
        a = torch.cat([f.columns for f in factors]).double()
        g = torch.cat([f.rows for f in factors]).double()
        scale = table[target.name]
        want_a = damped_root(a[reached].T @ a[reached] / reached.sum(), 0.1)
        eye = torch.eye(a.shape[1])
        assert scale.column_low_rank is not None
        got_a = scale.column_low_rank(eye).double() * scale.columns
        torch.testing.assert_close(got_a, want_a, rtol=1e-3, atol=1e-3 * float(want_a.abs().max()))
        want_g = damped_root(g[reached].T @ g[reached] / len(texts()), 0.1)
        assert scale.row_low_rank is not None
        got_g = scale.row_low_rank(torch.eye(g.shape[1])).double() * scale.rows
        torch.testing.assert_close(got_g, want_g, rtol=1e-3, atol=1e-3 * float(want_g.abs().max()))


def kfac_preconditioner(model: Any, targets: Sequence[Target], rank: int = 5) -> Preconditioner:
    moments = FactorMoments(targets, rank, SEED)
    GradientSketcher(model, targets, width=8, seed=0).add_moments(TokenBatch.of(texts()), moments)
    return Preconditioner([kfac_scales(moments, P, 0.1, 0.0)])


def test_factors_stay_as_they_came_where_a_side_has_one_scale() -> None:
    scale = kfac_like(40, 30, 4)
    columns, rows = noise(2, 3, 30).bfloat16(), noise(2, 3, 40).half()
    left = scale.factors(columns, rows)
    assert left.columns is columns
    assert left.rows is rows
    assert (left.column_low_rank, left.row_low_rank) == (scale.column_low_rank, scale.row_low_rank)
    assert (left.column_scale, left.row_scale) == (3.0, 2.0)
    seed, want = 7, scale.formed(torch.einsum("bto,bti->boi", rows.double(), columns.double()).float())
    want = ops.matrix_sketch(want, 64, seed=seed)
    assert relative_error(left.sketch(64, seed), want) < 1e-5
    one, two = left.applied()
    assert one.dtype == two.dtype == torch.float32
    assert relative_error(ops.linear_sketch(one, two, 64, seed=seed), want) < 1e-5
    # A scale that differs within a side is multiplied in at once; the other side stays as it is.
    varied = Scale(scale.rows, torch.linspace(1, 2, 30), scale.row_low_rank)
    assert (varied.row_constant, varied.column_constant) == (2.0, None)
    left = varied.factors(columns, rows)
    assert (left.column_low_rank, left.column_scale, left.rows is rows) == (None, 1.0, True)
    torch.testing.assert_close(
        left.columns, columns * varied.columns, rtol=2**-8, atol=0.0, check_dtype=False
    )


def test_that_a_scale_is_one_number_is_known_without_asking_a_device() -> None:
    # A tensor of the "meta" device has no numbers: to ask it for one raises.
    there = kfac_like(40, 30, 4).to(torch.device("meta"))
    assert (there.row_constant, there.column_constant) == (2.0, 3.0)
    x = torch.empty(2, 3, 30, device="meta", dtype=torch.bfloat16)
    left = there.factors(x, torch.empty(2, 3, 40, device="meta"))
    assert left.columns is x
    assert left.column_low_rank is there.column_low_rank
    assert Scale(there.rows, there.columns).row_constant is None  # made there: taken to differ


@pytest.mark.parametrize("projection", ["tensor", "flat"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_factors_and_positions_are_those_of_the_preconditioned_gradient(kind: str, projection: Any) -> None:
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]()
    targets = find_targets(model)
    preconditioner = kfac_preconditioner(model, targets)
    sketcher = GradientSketcher(
        model, targets, width=WIDTH, seed=SEED, projection=projection, preconditioner=preconditioner
    )
    assert any(scale.row_low_rank is not None for scale in preconditioner.points[0].values())
    together, _ = sketcher(TokenBatch.of(texts()))
    vectors = noise(2, len(targets), WIDTH)
    batched, in_batch = sketcher.positions(TokenBatch.of(texts()), vectors)
    for n, text in enumerate(texts()):
        (products,), sketches = sketcher.positions(TokenBatch.of([text]), vectors)
        assert relative_error(sketches, together[n : n + 1]) < 1e-4
        assert relative_error(in_batch[n : n + 1], together[n : n + 1]) < 1e-4
        want = torch.einsum("qbw,bw->qb", vectors, together[n])
        torch.testing.assert_close(products.sum(0), want, rtol=1e-3, atol=1e-3 * float(want.std()))
        padded = batched[n, len(text[0]) :]
        assert padded.count_nonzero() == 0
        torch.testing.assert_close(
            batched[n, : len(text[0])], products, rtol=1e-3, atol=1e-4 * float(products.abs().max())
        )
    # In float64 from the factors as they are: tokens may cancel, and what is left is the larger then.
    plain = GradientSketcher(model, targets, width=WIDTH, seed=SEED)
    exact = [plain.exact(TokenBatch.of([text])) for text in texts()]
    formed = []
    for n, target in enumerate(targets):
        scale = preconditioner.points[0][target.name]
        want = torch.stack(
            [
                damped(f.rows, scale.row_low_rank).mT @ damped(f.columns, scale.column_low_rank)
                for f in (of_text[n].factors for of_text in exact)
            ]
        )
        formed.append(want * float(scale.rows[0]) * float(scale.columns[0]))
    for n, (target, want) in enumerate(zip(targets, formed, strict=True)):
        seed = block_seed(SEED, target.name)
        if projection == "tensor":
            sketch = ops.matrix_sketch(want.float(), WIDTH, seed=seed)
        else:
            sketch = ops.flat_sketch([want.float().flatten(1)], WIDTH, seed=seed, batched=True)
        assert relative_error(together[:, n], sketch) < 1e-3, target.name
    scaled = [exact_gradients(sketcher, text) for text in texts()]
    for n, (target, want) in enumerate(zip(targets, formed, strict=True)):
        assert relative_error(torch.stack([g[n] for g in scaled]).double(), want) < 1e-3, target.name


def damped(x: torch.Tensor, low_rank: LowRank | None) -> torch.Tensor:
    """x [T, n] with a LowRank applied in float64."""
    assert low_rank is not None
    basis, gain = low_rank.basis.double(), low_rank.gain.double()
    return x.double() + ((x.double() @ basis) * gain) @ basis.T


def test_hits_are_those_of_factors_that_are_preconditioned_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for name in ("left to the sketch", "first"):
        if name == "first":
            monkeypatch.setattr(
                Factors,
                "sketch",
                lambda self, dim, seed: ops.linear_sketch(*self.applied(), dim, seed=seed),
            )
        attributor = lora_attributor(preconditioner=KFAC_OF_12)
        cache = attributor.cache(records(), tmp_path / name, dtype="float32")
        (result,) = attributor.query(cache, [QUERY], top_k=10)
        made[name] = [(hit.row, hit.score) for hit in (*result.top, *result.bottom)]
    rows, scores = zip(*made["left to the sketch"], strict=True)
    rows_first, scores_first = zip(*made["first"], strict=True)
    assert rows == rows_first
    assert scores == pytest.approx(scores_first, rel=1e-3)


def test_an_embedding_is_scaled_by_how_often_its_tokens_come() -> None:
    model = tiny_llama()
    targets = find_targets(model, include=["*embed_tokens*"])
    moments = FactorMoments(targets, 64, 0)
    batch = TokenBatch.of(texts())
    GradientSketcher(model, targets, width=8, seed=0).add_moments(batch, moments)
    scale = kfac_scales(moments, P, 0.1, 0.0)[targets[0].name]
    assert scale.row_low_rank is None
    seen = torch.unique(batch.ids[:, :-1][batch.mask[:, 1:]])  # the last one of a text predicts nothing
    rare = torch.ones(len(scale.rows), dtype=torch.bool)
    rare[seen] = False
    assert float(scale.rows[seen].max()) < float(scale.rows[rare].min())


def test_moments_of_factors_leave_out_padding_and_what_is_not_finite() -> None:
    target = Target("w", (3, 2), (Use("w", "linear"),))
    a, g = noise(2, 5, 2), noise(2, 5, 3, seed=1)
    g[0, 3:] = 0.0  # padding: its inputs are there, no gradient reaches it
    a[1, 2, 0], g[1, 4, 1] = float("nan"), float("inf")
    moments = FactorMoments([target], 8, 0)
    moments.add_factors(0, a, g)
    moments.examples = 2
    kept = torch.tensor([[True, True, True, False, False], [True, True, False, True, False]])
    found = moments.spectra(0)
    assert found is not None
    assert isinstance(found[0], Spectrum)
    want = a[kept].double().square().sum() / 6 / 2
    assert found[1].mean == pytest.approx(float(want), rel=1e-6)
    assert found[0].mean == pytest.approx(float(g[kept].double().square().sum() / 2 / 3), rel=1e-6)
    for examples in (0, 1):  # a layer without gradient is left as it is
        nothing = FactorMoments([target], 8, 0)
        nothing.examples = examples
        scale = kfac_scales(nothing, P, 0.1, 0.0)["w"]
        assert scale.rows.tolist() == [1.0] * 3
        assert scale.columns.tolist() == [1.0] * 2


def sides_of(scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices by which a scale multiplies both sides of a gradient, float64."""
    o, i = scale.shape
    rows = torch.eye(o) if scale.row_low_rank is None else scale.row_low_rank(torch.eye(o))
    columns = torch.eye(i) if scale.column_low_rank is None else scale.column_low_rank(torch.eye(i))
    return rows.double() * scale.rows, columns.double() * scale.columns


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [tiny_llama, tiny_gpt2])
def test_kfac_does_not_depend_on_batches(kind: Any, attention: str) -> None:
    """The gradient of a query that sees one key is a rounding error, zero in some batches and not in others;
    masked prompts and padding have none."""
    model = kind(attn_implementation=attention)
    alone = fit_preconditioner(model, batch_tokens=1).points[0]
    for batch_tokens in (64, 200, 4096):
        for name, scale in fit_preconditioner(model, batch_tokens=batch_tokens).points[0].items():
            for side, want in zip(sides_of(scale), sides_of(alone[name]), strict=True):
                assert float((side - want).norm() / want.norm()) < 1e-5, (name, batch_tokens)


def test_tokens_of_rounding_errors_do_not_count() -> None:
    """Whatever size the gradients of an example have, and whichever side of the layer they are on."""
    target = Target("w", (3, 2), (Use("w", "linear"),))
    a, g = noise(2, 5, 2), noise(2, 5, 3, seed=1)
    g[1] *= 1e-30
    found = []
    for error in (0.0, 1e-8):
        for swapped in (False, True):
            spoilt = g.clone()
            spoilt[0, 3:], spoilt[1, 0] = error * g[0, 3:], error * g[1, 0]
            one = Target("w", (2, 3), target.uses) if swapped else target
            moments = FactorMoments([one], 8, 0)
            moments.add_factors(0, *((spoilt, a) if swapped else (a, spoilt)))
            moments.examples = 2
            rows, columns = moments.spectra(0) or (None, None)
            assert isinstance(rows, Spectrum)
            assert columns is not None
            found.append(rows.mean * columns.mean)
    kept = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])
    want = float(a[kept].double().square().sum() / 7 / 2 * g[kept].double().square().sum() / 2 / 3)
    assert found == pytest.approx([want] * 4, rel=1e-6)


def same_scales(got: Preconditioner, want: Preconditioner) -> None:
    """Of both sides, and of texts that are all different: one that counts twice or not at all is seen."""
    assert len(got.points[0]) == len(want.points[0])
    for (name, scale), other in zip(want.points[0].items(), got.points[0].values(), strict=True):
        torch.testing.assert_close(other.rows, scale.rows, rtol=1e-4, atol=0.0, msg=name)
        torch.testing.assert_close(other.columns, scale.columns, rtol=1e-4, atol=0.0, msg=name)


def fit_preconditioner(model: Any, **settings: Any) -> Preconditioner:
    attributor = Attributor(model, tiny_tokenizer(), width=8, preconditioner="kfac", **settings)
    return attributor.source.fit_preconditioner([attributor.source.encoder(record) for record in records(12)])


def test_a_model_that_takes_one_example_at_a_time_counts_each_once() -> None:
    class Mixed(torch.nn.Module):
        """Flattens a batch of texts to one, as some layers do."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(1, -1, x.shape[-1]).transpose(0, 1)).view(*x.shape[:-1], -1)

    model = tiny_llama()
    want = fit_preconditioner(model, batch_tokens=1)
    layer = model.model.layers[0].mlp  # the last that the backward pass comes to
    layer.up_proj = Mixed(layer.up_proj)
    same_scales(fit_preconditioner(model), want)


def test_a_pass_that_fails_half_way_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory in the midst of a batch; and for the longest two texts not even alone."""
    model, add, failed = tiny_llama(), FactorMoments.add_factors, []
    attributor = Attributor(model, tiny_tokenizer(), width=8, preconditioner="kfac", batch_tokens=1)
    encoded = [attributor.source.encoder(record) for record in records(12)]
    lengths = sorted(len(text.ids) for text in encoded)
    most = lengths[-3]
    assert most < lengths[-2]
    want = attributor.source.fit_preconditioner([text for text in encoded if len(text.ids) <= most])

    def short(self: FactorMoments, n: int, columns: torch.Tensor, rows: torch.Tensor) -> None:
        if n == 3 and (len(columns) > 3 or columns.shape[1] > most):
            failed.append(columns.shape[:2])
            torch.empty(1 << 50, dtype=torch.uint8)
        add(self, n, columns, rows)

    monkeypatch.setattr(FactorMoments, "add_factors", short)
    same_scales(fit_preconditioner(model), want)
    assert any(texts > 3 for texts, _ in failed)
    assert any(texts == 1 for texts, _ in failed)


# ------------------------------------------------------------------------- an optimizer's state


def train(model: Any, folder: Path, steps: int = 2, **settings: Any) -> Any:
    """A real Trainer's run; its checkpoint lies in folder/checkpoint-<steps>."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids, _ in (([*range(3, 20)], 0), ([*range(40, 57)], 0))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=steps,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, torch.Tensor]]:
    """A GPT-2 (norms, biases, tied embeddings), its checkpoint, and the optimizer's second moments."""
    folder = tmp_path_factory.mktemp("trainer")
    model = tiny_gpt2()
    state = train(model, folder).optimizer.state
    return model, folder / "checkpoint-2", {n: state[p]["exp_avg_sq"] for n, p in model.named_parameters()}


def assert_moments(found: Any, want: dict[str, torch.Tensor], targets: Sequence[Target]) -> None:
    assert set(found) == {t.name for t in targets}
    for target in targets:
        second = want[target.name].double().view(matrix_shape(target.shape))
        torch.testing.assert_close(found[target.name][0], second.mean(1))
        torch.testing.assert_close(found[target.name][1], second.mean(0))


def test_the_state_of_a_trainer_by_name(trained: Any) -> None:
    model, folder, want = trained
    targets = find_targets(model, include=["*"])
    assert min(float(v.max()) for v in want.values()) > 0
    assert_moments(second_moments(folder, model, targets), want, targets)
    assert_moments(second_moments(folder / "optimizer.pt", model, targets[3:5]), want, targets[3:5])


def test_the_state_of_an_adapter(tmp_path: Path) -> None:
    model = tiny_lora(tiny_llama(), modules_to_save=["lm_head"])
    state = train(model, tmp_path).optimizer.state
    loaded = LoadedModel.of(model, None)
    targets = all_targets(model)
    want = {n: state[p]["exp_avg_sq"] for n, p in model.named_parameters() if p in state}
    got = second_moments(tmp_path / "checkpoint-2", model, targets, loaded.trained)
    assert_moments(got, want, targets)


def test_a_state_of_one_group_and_in_the_old_form(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = noise(*p.shape, seed=p.numel())
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt", _use_new_zipfile_serialization=False)
    want = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    targets = find_targets(model, include=["*"])
    assert_moments(second_moments(tmp_path / "state.pt", model, targets), want, targets)


def test_the_state_of_adafactor_has_rows_and_columns_already(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = train(model, tmp_path, optim="adafactor")
    targets = find_targets(model, include=["*"])
    got = second_moments(tmp_path / "checkpoint-2", model, targets)
    for name, p in model.named_parameters():
        state = trainer.optimizer.state[p]
        if p.ndim == 2:
            want = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        else:
            want = state["exp_avg_sq"], state["exp_avg_sq"].mean()[None]
        torch.testing.assert_close(got[name][0].float(), want[0])
        torch.testing.assert_close(got[name][1].float(), want[1])


def test_a_safetensors_file_by_name(trained: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, _, want = trained
    targets = find_targets(model)
    path = tmp_path / "second.safetensors"
    save_file({t.name + (".exp_avg_sq" if n else ""): want[t.name] for n, t in enumerate(targets)}, path)
    assert_moments(second_moments(path, model, targets), want, targets)
    with pytest.raises(UserError, match=r"does not fit the model: there is no second moment for '.*wte"):
        second_moments(path, model, find_targets(model, include=["*"]))
    save_file({targets[0].name: want[targets[0].name].T.contiguous()}, path)
    with pytest.raises(UserError, match=r"has shape \[96, 32\] where '.*' needs \[32, 96\]"):
        second_moments(path, model, targets[:1])


class Code:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_state_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    model = tiny_llama()
    ran = tmp_path / "ran"
    torch.save({"state": {0: {"exp_avg_sq": Code(ran)}}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match="holds more than tensors and numbers, which is not unpickled"):
        second_moments(tmp_path, model, find_targets(model))
    assert not ran.exists()


def test_states_that_do_not_fit(trained: Any, tmp_path: Path) -> None:
    model, folder, _ = trained
    state = torch.load(folder / "optimizer.pt", weights_only=True)

    def refused(pattern: str, value: Any = None, for_model: Any = model) -> None:
        path = folder
        if value is not None:
            path = tmp_path / "state.pt"
            torch.save(value, path)
        with pytest.raises(UserError, match=pattern) as error:
            second_moments(path, for_model, find_targets(for_model))
        assert "\n" not in str(error.value)

    refused(
        r"'exp_avg_sq' has shape \[320, 32\] where '.*wte.weight' needs \[320, 64\]",
        None,
        tiny_gpt2(n_embd=64),
    )
    refused(r"it has 10 \+ 18 parameters, the model has 6 \+ 10 that are trained", None, tiny_gpt2(n_layer=1))
    refused(r"it has 10 \+ 18 parameters, the model", None, tiny_llama())
    groups = [{"params": [n]} for n in state["state"]]
    refused("it has 28 groups of parameters, and a Trainer makes 2", {**state, "param_groups": groups})
    moved = {**state, "param_groups": state["param_groups"][::-1]}
    refused("is not the state of this model's parameters", moved)
    rest = {n: v for n, v in state["state"].items() if n}
    refused(
        "is not the state", {"state": {**rest, 0: {"exp_avg_sq": torch.zeros(3)}}, "param_groups": groups[:1]}
    )
    refused(
        "has no second moment that rapidin can read", {"state": {}, "param_groups": state["param_groups"]}
    )
    refused("is not an optimizer's state", {"weights": torch.zeros(2)})
    four = {
        n: {"exp_avg_sq": v["exp_avg_sq"] * (float("nan") if n == 4 else 1)}
        for n, v in state["state"].items()
    }
    refused("the second moment of '.*' in '.*' is not finite", {**state, "state": four})
    gone = {n: v for n, v in state["state"].items() if n != 4}
    refused("has no second moment for '.*', which counts", {**state, "state": gone})
    small = {n: {"exp_avg_sq": v["exp_avg_sq"].to(torch.uint8)} for n, v in state["state"].items()}
    refused("is of dtype torch.uint8, not floating point", {**state, "state": small})
    (tmp_path / "state.pt").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="damaged"):
        second_moments(tmp_path / "state.pt", model, find_targets(model))
    with pytest.raises(UserError, match="no optimizer's state at"):
        second_moments(tmp_path / "nowhere", model, find_targets(model))


# --------------------------------------------------------------------------------------- caches


def lora_attributor(**settings: Any) -> Attributor:
    return Attributor(
        tiny_lora(tiny_llama()),
        tiny_tokenizer(),
        **{"width": 64, "at": [0.5, 0.9], "preconditioner": "off", **settings},
    )


SAMPLE_OF_12 = PreconditionerConfig("sample", sample=12)
KFAC_OF_12 = PreconditionerConfig("kfac", sample=12, rank=5)  # of 32 features, so not all
QUERY = {"prompt": "the fox: ", "completion": "seven lazy dogs"}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    attributor = lora_attributor(preconditioner=SAMPLE_OF_12)
    return attributor.cache(records(), tmp_path_factory.mktemp("cache"), dtype="float32", shard_rows=7)


def test_a_cache_holds_sketches_scaled_by_each_points_own_sample(cached: Cache) -> None:
    attributor = lora_attributor()
    rows = [attributor.source.encoder(record) for record in records()]
    from rapidin.cache.build import sample_rows

    drawn = sample_rows(30, 12, 0, 18)
    assert drawn != sample_rows(30, 12, 0)  # not the sample of a code
    kept = cached.sketches().view(30, 2, -1, 64) * cached.lengths().view(30, 2, -1, 1)
    for number, point in enumerate(attributor.source.points):
        with attributor.loaded.path.at(point):
            formed = own_matrices(
                attributor.loaded.model, attributor.source.targets, [(e.ids, e.target) for e in rows]
            )
        for block, (target, grads) in enumerate(zip(attributor.source.targets, formed, strict=True)):
            second = grads[drawn].double().square().mean(0)
            scale = Scale.of(second.mean(1), second.mean(0), P, FLOOR)
            scaled = grads * scale.rows[:, None] * scale.columns
            want = ops.matrix_sketch(scaled, 64, seed=block_seed(0, target.name))
            got = kept[:, number, block]
            assert float((got - want).norm() / want.norm()) < 1e-3


def test_a_cache_of_preconditioned_gradients_and_its_queries(tmp_path: Path) -> None:
    attributor = lora_attributor(preconditioner=KFAC_OF_12, at=[0.5])
    cache = attributor.cache(records(), tmp_path / "cache", dtype="float32", shard_rows=7)
    record = cache.manifest.gradient["preconditioner"]
    assert (record["kind"], record["rank"], record["damping"], record["sample"]) == ("kfac", 5, DAMPING, 12)
    settings = f"rank 5, damping {DAMPING:g}, tolerance {TOLERANCE:g}"
    assert cache.info()["preconditioner"] == f"K-FAC's from a sample of at most 12 examples, {settings}"
    preconditioner = read_fitted(cache.manifest)
    assert preconditioner is not None
    plain = lora_attributor(at=[0.5])
    rows = [plain.source.encoder(record) for record in records()]
    kept = cache.sketches().view(30, -1, 64) * cache.lengths()[:, :, None]
    with plain.loaded.path.at(0.5):
        formed = own_matrices(plain.loaded.model, plain.source.targets, [(e.ids, e.target) for e in rows])
    for n, (target, grads) in enumerate(zip(plain.source.targets, formed, strict=True)):
        want = ops.matrix_sketch(
            preconditioner.points[0][target.name].formed(grads), 64, seed=block_seed(0, target.name)
        )
        assert float((kept[:, n] - want).norm() / want.norm()) < 1e-3
    # A query of another process, which has nothing but the cache.
    asked = Attributor.like(Manifest.read(tmp_path / "cache"), plain.loaded)
    scores = asked.scores(cache, [records()[4]], normalize="none")
    flat = kept.flatten(1)
    torch.testing.assert_close(scores[0], flat @ flat[4], rtol=1e-3, atol=1e-3 * float(scores.std()))
    with pytest.raises(
        UserError,
        match=r"K-FAC's from .* at most 12 examples, .* in the cache, .* rank 64, .* requested",
    ):
        lora_attributor(preconditioner="kfac", at=[0.5]).cache(
            records(), cache.path, dtype="float32", shard_rows=7
        )
    for key, value in (("rank", -1), ("rank", 2.5), ("damping", "x"), ("tolerance", "x"), ("kind", "kfca")):
        manifest = json.loads((cache.path / "manifest.json").read_text())
        manifest["gradient"]["preconditioner"][key] = value
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="damaged"):
            Manifest.read(tmp_path / "bad")


def test_a_cache_keeps_the_damping_that_it_was_begun_with(tmp_path: Path) -> None:
    """Defaults were others in earlier versions: their caches are resumed and asked as they are."""
    old = PreconditionerConfig("kfac", sample=KFAC_SAMPLE, damping=0.1, tolerance=0.0)
    attributor = lora_attributor(preconditioner=old, at=[0.5])
    cache = attributor.cache(records(), tmp_path / "cache", dtype="float32", shard_rows=7)
    want = attributor.scores(cache, [QUERY])
    whole = (cache.path / "shard-000000.safetensors").read_bytes()
    (cache.path / "shard-000000.safetensors").unlink()
    manifest = Manifest.read(cache.path)
    manifest.shards = manifest.shards[1:]
    manifest.write(cache.path)
    written = json.loads((cache.path / "manifest.json").read_text())
    del written["gradient"]["preconditioner"]["tolerance"]  # as those versions wrote it
    (cache.path / "manifest.json").write_text(json.dumps(written))
    again = lora_attributor(preconditioner="kfac", at=[0.5])
    resumed = again.cache(records(), cache.path, dtype="float32", shard_rows=7)
    assert (cache.path / "shard-000000.safetensors").read_bytes() == whole
    assert resumed.manifest.gradient["preconditioner"]["damping"] == 0.1
    assert torch.equal(again.scores(resumed, [QUERY]), want)
    assert (again.source.config.damping, again.source.config.tolerance) == (DAMPING, TOLERANCE)
    # A damping that is named says nothing of the tolerance.
    named = PreconditionerConfig("kfac", sample=KFAC_SAMPLE, damping=0.1)
    same = lora_attributor(preconditioner=named, at=[0.5])
    assert torch.equal(same.scores(cache.path, [QUERY]), want)
    other = PreconditionerConfig("kfac", sample=KFAC_SAMPLE, damping=2.0)
    with pytest.raises(UserError, match=r"damping 0\.1 in the cache, .* damping 2 requested"):
        lora_attributor(preconditioner=other, at=[0.5]).cache(
            records(), cache.path, dtype="float32", shard_rows=7
        )


def test_a_fit_preconditioner_other_parts_is_damaged() -> None:
    scale = kfac_like(6, 4, 2)
    whole = dict(Preconditioner([{"w": scale}]).tensors)
    again = Preconditioner.of_tensors(whole).points[0]["w"]
    assert again.row_low_rank is not None
    assert torch.equal(again.row_low_rank.basis, scale.row_low_rank.basis)  # type: ignore[union-attr]
    for change in (
        {"0/w/rows_basis": torch.zeros(5, 2)},
        {"0/w/rows_gain": torch.zeros(3)},
        {"0/w/rows_basis": torch.zeros(6)},
        {"0/w/other": torch.zeros(6)},
        {"0/w/rows_basis": None},
        {"0/w/rows": None},
    ):
        tensors = {k: v for k, v in (whole | change).items() if v is not None}
        with pytest.raises((ValueError, KeyError)):
            Preconditioner.of_tensors(tensors)


@pytest.mark.parametrize("kind", ["off", "sample", "kfac", "optimizer"])
def test_the_settings_of_a_preconditioner_survive_json(kind: str) -> None:
    fitted = None
    if kind == "optimizer":
        fitted = Preconditioner([{"w": Scale(torch.ones(2), torch.ones(3))}])
    config = PreconditionerConfig(kind, fitted=fitted)  # type: ignore[arg-type]
    recorded = config.to_json()
    again = PreconditionerConfig.from_json(recorded, fitted)
    assert again.to_json() == recorded
    assert (again.kind, again.fitted) == (kind, fitted)
    if kind != "off":
        assert isinstance(recorded, dict)
        assert not {"file", "bytes", "sha256"} & set(recorded)  # a cache adds these
        with pytest.raises(TypeError):
            PreconditionerConfig.from_json({**recorded, "speed": 1})


def kfac_like(o: int, i: int, rank: int) -> Scale:
    sides = [torch.linalg.qr(noise(n, rank, seed=n)).Q.contiguous() for n in (o, i)]
    directions = [LowRank(u, -torch.linspace(0.1, 0.9, rank)) for u in sides]
    return Scale(torch.full((o,), 2.0), torch.full((i,), 3.0), *directions)


def test_queries_follow_with_no_flag(cached: Cache, tmp_path: Path) -> None:
    loaded = lora_attributor().loaded
    attributor = Attributor.like(cached.manifest, loaded)
    scores = attributor.scores(cached, [QUERY, records()[4]], normalize="none")
    kept = (cached.sketches().view(30, -1, 64) * cached.lengths()[:, :, None]).flatten(1)
    torch.testing.assert_close(scores[1], kept @ kept[4], rtol=1e-3, atol=1e-4)
    again = lora_attributor(preconditioner=SAMPLE_OF_12).scores(cached, [QUERY], normalize="none")
    torch.testing.assert_close(again[0], scores[0], rtol=1e-3, atol=1e-4)
    # A cache without one, asked by the same attributor, is asked without one, and the other way round.
    plain = lora_attributor().cache(records(8), tmp_path / "plain", dtype="float32")
    assert plain.manifest.gradient["preconditioner"] == "off"
    with pytest.raises(UserError, match=r"made with other settings \(gradient\)"):
        attributor.scores(plain, [QUERY])
    with pytest.raises(UserError, match=r"made with other settings \(gradient\)"):
        lora_attributor().scores(cached, [QUERY])


def test_the_manifest_says_how_it_was_made(cached: Cache) -> None:
    record = cached.manifest.gradient["preconditioner"]
    file = cached.path / "preconditioner.safetensors"
    assert record["bytes"] == file.stat().st_size
    assert {k: record[k] for k in ("kind", "exponent", "floor", "sample", "file")} == {
        "kind": "sample",
        "exponent": P,
        "floor": FLOOR,
        "sample": 12,
        "file": "preconditioner.safetensors",
    }
    preconditioner = read_fitted(cached.manifest)
    assert preconditioner is not None
    assert preconditioner.sha256 == record["sha256"]
    assert len(preconditioner.points) == 2
    assert Cache.verify(cached.path) == []


class Stop(Exception):
    pass


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("bytes", [None, 128])
@pytest.mark.parametrize("preconditioner", [SAMPLE_OF_12, KFAC_OF_12], ids=["sample", "kfac"])
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, preconditioner: PreconditionerConfig, bytes: int | None
) -> None:
    def make(folder: Path, stop_at: int | None = None) -> bool:
        seen = 0

        def progress(progress: Progress) -> None:
            nonlocal seen
            seen += 1
            if seen == stop_at:
                raise Stop

        attributor = lora_attributor(preconditioner=preconditioner, batch_tokens=128)
        try:
            attributor.cache(
                records(), folder, bytes=bytes, sample=bytes and 16, shard_rows=7, on_progress=progress
            )
        except Stop:
            return False
        return True

    assert make(tmp_path / "whole")
    file = (tmp_path / "whole" / "preconditioner.safetensors").read_bytes()
    runs = 0
    while not make(tmp_path / "stopped", stop_at=2 + 5 * runs):
        runs += 1
        there = tmp_path / "stopped" / "preconditioner.safetensors"
        if there.exists():
            assert there.read_bytes() == file
    assert runs > 2
    assert folder_bytes(tmp_path / "stopped") == folder_bytes(tmp_path / "whole")


def test_a_preconditioner_that_is_there_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = iter([True])

    def set_preconditioner_then_stop(progress: Progress) -> None:
        if progress.done and next(stops, False):
            raise Stop

    attributor = lora_attributor(preconditioner=SAMPLE_OF_12)
    with pytest.raises(Stop):
        attributor.cache(records(), tmp_path, shard_rows=7, on_progress=set_preconditioner_then_stop)
    assert Manifest.read(tmp_path).gradient["preconditioner"]["sha256"]

    def never(*args: Any) -> Any:
        raise AssertionError("the sample is sketched again")

    monkeypatch.setattr(GradientSketcher, "squares", never)
    made = lora_attributor(preconditioner=SAMPLE_OF_12).cache(records(), tmp_path, shard_rows=7)
    assert made.manifest.complete
    lora_attributor(preconditioner=SAMPLE_OF_12).cache(
        records(), tmp_path, shard_rows=7
    )  # nothing left to do


@pytest.mark.parametrize(
    ("preconditioner", "pattern"),
    [
        (
            None,
            "from a sample of at most 12 examples, exponent 0.5, floor 0.01 in the cache, off requested",
        ),
        (
            "sample",
            "at most 12 examples, .* in the cache, from a sample of at most 256 examples, .* requested",
        ),
        (
            PreconditionerConfig("sample", exponent=0.25, sample=12),
            "exponent 0.5, .* in the cache, .* exponent 0.25, .* requested",
        ),
    ],
)
def test_a_cache_made_with_another_preconditioner_is_refused(
    cached: Cache, preconditioner: Any, pattern: str
) -> None:
    with pytest.raises(UserError, match=pattern):
        lora_attributor(preconditioner=preconditioner).cache(
            records(), cached.path, dtype="float32", shard_rows=7
        )


def test_a_preconditioner_that_is_lost_or_altered_is_one_line_and_is_made_anew(
    cached: Cache, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "cache"
    shutil.copytree(cached.path, folder)
    file = folder / "preconditioner.safetensors"
    whole, loaded = file.read_bytes(), lora_attributor().loaded

    def make() -> None:
        lora_attributor(preconditioner=SAMPLE_OF_12).cache(records(), folder, dtype="float32", shard_rows=7)

    file.unlink()
    for ask in (
        lambda: Attributor.like(Manifest.read(folder), loaded),
        lambda: read_fitted(Cache(folder).manifest),
    ):
        with pytest.raises(
            UserError, match=r"the preconditioner '.*' is missing; run the same 'rapidin cache' again"
        ):
            ask()
    assert Cache.verify(folder) == [f"the preconditioner '{file}' is missing"]
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for act in (make, lambda: Attributor.like(Manifest.read(folder), loaded)):
        with pytest.raises(UserError, match=r"the preconditioner '.*' is altered: .*; delete that file"):
            act()
    assert Cache.verify(folder) == [
        f"the preconditioner '{file}' is altered: its checksum is not the manifest's"
    ]
    file.unlink()
    make()
    assert file.read_bytes() == whole


def test_a_preconditioner_that_comes_out_otherwise_is_not_mixed_in(cached: Cache, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "cache"
    shutil.copytree(cached.path, folder)
    (folder / "preconditioner.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["gradient"]["preconditioner"]["sha256"] = (
        "0" * 64
    )  # as if made on a machine that rounds otherwise
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is missing, and fitting it again on this machine gives another one"):
        lora_attributor(preconditioner=SAMPLE_OF_12).cache(records(), folder, dtype="float32", shard_rows=7)


def test_caches_of_before_have_no_preconditioner(tmp_path: Path) -> None:
    attributor = lora_attributor()
    made = attributor.cache(records(8), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["gradient"]["preconditioner"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.read(tmp_path).preconditioner is None
    assert attributor.cache(records(8), tmp_path).manifest.complete
    scores = attributor.scores(made, [QUERY])
    torch.testing.assert_close(
        Attributor.like(Manifest.read(tmp_path), attributor.loaded).scores(tmp_path, [QUERY]), scores
    )


def test_layers_without_any_gradient_stay_as_they_are(tmp_path: Path) -> None:
    # At the base lora_B is zero, and with it the gradient of every lora_A.
    attributor = lora_attributor(preconditioner="sample", at=[0.0, 1.0])
    cache = attributor.cache(records(8), tmp_path)
    lengths = {(b.name, b.at): cache.lengths()[:, n] for n, b in enumerate(cache.layers)}
    assert cache.manifest.counts["ok"] == 8
    for (name, at), values in lengths.items():
        assert bool((values == 0).all()) == (at == 0.0 and "lora_A" in name), (name, at)
    assert bool(attributor.scores(cache, [QUERY], normalize="none").isfinite().all())


def test_a_state_is_one_preconditioner_for_all_points_and_lives_on_in_the_cache(tmp_path: Path) -> None:
    model = tiny_lora(tiny_llama())
    train(model, tmp_path)
    state = tmp_path / "checkpoint-2" / "optimizer.pt"
    loaded = LoadedModel.of(model.eval(), tiny_tokenizer())
    settings: dict[str, Any] = {"width": 64, "at": [0.5, 0.9]}
    attributor = Attributor(loaded, preconditioner=state, **settings)
    cache = attributor.cache(records(), tmp_path / "cache", dtype="float32", shard_rows=7)
    record = cache.manifest.gradient["preconditioner"]
    assert record["kind"] == "optimizer"
    moments = second_moments(state, model, attributor.source.targets, loaded.trained)
    preconditioner = read_fitted(cache.manifest)
    assert preconditioner is not None
    assert len(preconditioner.points) == 1
    for target in attributor.source.targets:
        want = Scale.of(*moments[target.name], P, FLOOR)
        assert torch.equal(preconditioner.at(1)[target.name].rows, want.rows)
        assert torch.equal(preconditioner.at(1)[target.name].columns, want.columns)
    scores = attributor.scores(cache, [QUERY], normalize="none")
    other = torch.load(state, weights_only=True)
    for values in other["state"].values():
        values["exp_avg_sq"] = values["exp_avg_sq"].flip(0)
    state.unlink()
    torch.testing.assert_close(
        Attributor.like(cache.manifest, loaded).scores(cache, [QUERY], normalize="none"), scores
    )
    torch.save(other, state)
    with pytest.raises(
        UserError, match=r"from the optimizer's state \w{8}, .* in the cache, from the optimizer's"
    ):
        Attributor(loaded, preconditioner=state, **settings).cache(
            records(), cache.path, dtype="float32", shard_rows=7
        )
    with pytest.raises(UserError, match="made with other settings"):
        checked(Attributor(loaded, preconditioner=state, **settings).source, cache.manifest)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = save_tiny(tmp_path, lora=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records(6)))
    out = str(tmp_path / "cache")
    arguments = [
        "cache",
        str(saved.model),
        "--adapter",
        str(saved.adapter),
        "--data",
        str(data),
        "--out",
        out,
    ]
    assert main([*arguments, "--width", "32", "--precondition", "sample"]) == 0
    capsys.readouterr()
    assert main(["info", out]) == 0
    assert "from a sample of at most 256 examples, exponent 0.5" in " ".join(capsys.readouterr().out.split())
    assert main(["query", out, "--prompt", "a", "--completion", "b", "--json", "-"]) == 0
    (query,) = json.loads(capsys.readouterr().out)["queries"]
    assert len(query["top"]) + len(query["bottom"]) == 6
    for preconditioner, words in (
        ("off", "name another folder"),
        (str(tmp_path / "no.pt"), "no optimizer's state at"),
    ):
        assert main([*arguments, "--width", "32", "--precondition", preconditioner]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("most", "rows", "size"),
    [
        (128, 6, 6),
        (128, 40, 32),
        (128, 150, 37),
        (128, 512, 128),
        (128, 10**6, 128),
        (12, 10**6, 12),
        (12, 6, 6),
    ],
)
def test_few_training_examples_make_a_small_sample(most: int, rows: int, size: int) -> None:
    assert PreconditionerConfig("kfac", sample=most).sample_of(rows) == size
