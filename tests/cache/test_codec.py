"""Codes: what is packed tells nearly what the sketch told, in the bytes that it may take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_sketches import BLOCKS, WIDTH, examples, lengths, packed, unit
from properties import tries
from torch import Tensor

from rapidin import ops
from rapidin.attribution.methods.vectors import shard_scales
from rapidin.attribution.normalization import row_scales
from rapidin.cache.codec import (
    ROW_OVERHEAD,
    Basis,
    CodecConfig,
    FloatCodec,
    PackedCodec,
    RowShape,
    fit_shape,
    learn_basis,
    min_row_bytes,
    shared_size,
)
from rapidin.cache.codec.plan import LENGTHS, typical_length
from rapidin.errors import UserError
from rapidin.gradients.source import default_width
from rapidin.ops import rotate


def scores(
    code: PackedCodec | FloatCodec, fields: dict[str, Tensor], y: Tensor, scales: Tensor | None = None
) -> Tensor:
    """[Q, n], by the scan."""
    plan = code.prepare(y).plan(fields, scales)
    n = len(next(iter(fields.values())))
    found, rows = ops.topk_scan(
        plan.parts, plan.queries, n, scales=plan.scales, offsets=plan.offsets, base=plan.base
    )
    out = torch.full((len(y), n), float("nan"))
    return out.scatter(1, rows, found) + plan.constant[:, None]


@pytest.mark.parametrize("width", [1, 2, 64, 1024])
def test_the_rotation_is_orthogonal_and_can_be_inverted(width: int) -> None:
    x = torch.randn(5, 3, width)
    rotated = rotate(x, seed=7)
    torch.testing.assert_close(rotated.norm(dim=2), x.norm(dim=2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotate(rotated, seed=7, inverse=True), x, rtol=1e-4, atol=1e-5)
    assert width == 1 or not torch.equal(rotate(x, seed=8), rotated)
    with pytest.raises(ValueError, match="power of two"):
        rotate(torch.randn(1, 1, 48), seed=0)


def test_the_rotation_spreads_one_number_over_all() -> None:
    x = torch.zeros(1, 2, 256)
    x[0, :, 3] = 1.0
    torch.testing.assert_close(rotate(x, seed=0).abs(), torch.full((1, 2, 256), 1 / 16))


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.004), ("int4", 0.05), ("sign", 0.2)])
def test_plain_codes_keep_products_within_their_error(dtype: str, error: float) -> None:
    x, y = examples(200, 1), examples(20, 2)
    code = packed(CodecConfig(dtype))
    fields = code.encode(x, lengths(200))
    exact = (y.flatten(1) @ x.flatten(1).T) / BLOCKS
    got = scores(code, fields, y / BLOCKS)
    spread = 1 / (WIDTH * BLOCKS) ** 0.5  # of the product of two unrelated examples
    assert float((got - exact).square().mean().sqrt()) < 4 * error * spread
    assert abs(float((got - exact).mean())) < error * spread  # no bias
    own = scores(code, fields, x / BLOCKS).diagonal()
    torch.testing.assert_close(own, torch.ones(200), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("wanted", [CodecConfig("float16"), CodecConfig("float32")])
def test_float_codes_keep_the_blocks(wanted: CodecConfig) -> None:
    x, length = examples(10, 1), lengths(10)
    code = FloatCodec(wanted.dtype, BLOCKS, WIDTH)
    fields = code.encode(x, length)
    torch.testing.assert_close(code.decode(fields), x, rtol=1e-3, atol=1e-4)
    assert torch.equal(code.lengths(fields), length)


@pytest.mark.parametrize(
    "wanted",
    [CodecConfig("sign"), CodecConfig("int8"), CodecConfig("sign", 160, 64), CodecConfig("int4", 300, 64)],
)
@pytest.mark.parametrize("zero_gradient", [False, True])
@pytest.mark.parametrize("scaled", ["no", "blocks", "rows"])
def test_the_scan_scores_what_the_code_decodes(wanted: CodecConfig, scaled: str, zero_gradient: bool) -> None:
    x, y, length = examples(60, 1), torch.randn(4, BLOCKS, WIDTH), lengths(60)
    if zero_gradient:
        x[7, 1], length[7, 1] = 0.0, 0.0
    code = packed(wanted, examples(wanted.sample, 5) if wanted.sample else None)
    fields = code.encode(x, length)
    scales = {"no": None, "blocks": code.lengths(fields), "rows": torch.rand(60, 1) + 0.5}[scaled]
    weights = (torch.ones(60, 1) if scales is None else scales).expand(-1, BLOCKS)
    want = torch.einsum("qbw,nbw,nb->qn", y, code.decode(fields), weights)
    got = scores(code, fields, y, scales)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.abs().max()))


@pytest.mark.parametrize("wanted", [CodecConfig("sign"), CodecConfig("sign", 160, 64)])
def test_scales_of_rows_leave_rows_in_integers(wanted: CodecConfig) -> None:
    """Scales of blocks make a scan decode each row, and those of rows do not."""
    code = packed(wanted, examples(wanted.sample, 5) if wanted.sample else None)
    fields = code.encode(examples(60, 1), lengths(60))
    query = code.prepare(torch.randn(4, BLOCKS, WIDTH))
    by_row = query.plan(fields, torch.rand(60, 1))
    assert (by_row.scales, by_row.offsets) == (None, None)
    assert query.plan(fields, torch.rand(60, BLOCKS)).scales is not None


@pytest.mark.parametrize(
    "wanted", [CodecConfig("float32"), CodecConfig("sign"), CodecConfig("sign", 160, 64)]
)
def test_typical_lengths_are_geometric_means(wanted: CodecConfig) -> None:
    length = lengths(50)
    length[3] = 0.0
    sample = examples(wanted.sample, 5) if wanted.sample else None
    code = FloatCodec("float32", BLOCKS, WIDTH) if wanted.dtype == "float32" else packed(wanted, sample)
    found = code.typical_lengths(code.encode(examples(50, 1), length))
    want = length.double().log().mean(1).exp()
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=0)
    assert found[3] == 0
    length[7, 1] = 0.0
    x = examples(50, 1)
    x[7, 1] = 0.0
    fields = code.encode(x, length)
    want[7] = length[7][length[7] > 0].double().log().mean().exp()
    torch.testing.assert_close(code.typical_lengths(fields).double(), want, rtol=1e-4, atol=0)
    kept = {name: value for name, value in fields.items() if name in LENGTHS}
    assert torch.equal(code.typical_lengths(kept), code.typical_lengths(fields))
    assert float(typical_length(torch.tensor([2.0, 0.0, 8.0]))) == pytest.approx(4.0)


def test_lengths_in_bytes_and_in_half_bytes() -> None:
    length = lengths(50)
    length[3] = 0.0
    length[7, 2] = 0.0
    for wanted, within in ((CodecConfig("sign"), 0.04), (CodecConfig("sign", 100, 64), 0.15)):
        sample = examples(64, 5) if wanted.sample else None
        code = packed(wanted, sample)
        bits = 4 if wanted.sample else 8
        code.shape = dataclasses.replace(code.shape, length_bits=bits)
        got = code.lengths(code.encode(examples(50, 1), length))
        assert torch.equal(got == 0, length == 0)
        inside = ((got / length).log().abs() < within)[length > 0]
        assert float(inside.float().mean()) > (0.99 if bits == 8 else 0.9)


def test_bits_of_lengths_depend_on_the_budget() -> None:
    """Without a basis 8 bits or none: four are coarse beside what the rows lose then."""
    for blocks, bits in ((10, 8), (25, 8), (26, 0), (50, 0)):
        assert fit_shape(CodecConfig("sign", 200), blocks, 64, None).length_bits == bits


@pytest.mark.parametrize("normalize", ["none", "layer", "cosine", "weighted"])
@pytest.mark.parametrize("dtype", ["float16", "sign"])
def test_scales_of_many_rows_are_those_of_each(dtype: str, normalize: str) -> None:
    """They are computed a few thousand rows at a time."""
    rows = 9001
    length = torch.rand(rows, BLOCKS, generator=torch.Generator().manual_seed(1)) + 0.1
    length[::7, 1], length[5000] = 0.0, 0.0
    code = FloatCodec(dtype, BLOCKS, WIDTH) if dtype == "float16" else packed(CodecConfig(dtype))
    fields = code.encode(torch.ones(rows, BLOCKS, WIDTH) / WIDTH**0.5, length)
    found = shard_scales(code, fields, normalize)
    assert torch.equal(found, row_scales(code.lengths(fields), normalize))
    some = {name: value[4000:4200] for name, value in fields.items()}
    assert torch.equal(found[4000:4200], shard_scales(code, some, normalize))
    assert shard_scales(code, {name: value[:0] for name, value in fields.items()}, normalize).shape == (
        0,
        BLOCKS,
    )


def test_a_block_without_gradient_adds_nothing() -> None:
    x, y, length = examples(20, 1), examples(3, 2), lengths(20)
    x[5, 2], length[5, 2] = 0.0, 0.0
    code = packed(CodecConfig("sign"))
    fields = code.encode(x, length)
    assert float(code.decode(fields)[5, 2].abs().max()) == 0.0
    without = y.clone()
    without[:, 2] = 0.0
    got, other = scores(code, fields, y)[:, 5], scores(code, fields, without)[:, 5]
    torch.testing.assert_close(got, other, rtol=0.03, atol=3e-3)
    x[6], length[6] = 0.0, 0.0
    assert float(code.decode(code.encode(x, length))[6].abs().max()) == 0.0


def test_what_is_learnt_helps_and_a_stranger_is_outside() -> None:
    sample, x, y = examples(256, 5, noise=0.6), examples(300, 1, noise=0.6), examples(30, 2, noise=0.6)
    exact = y.flatten(1) @ x.flatten(1).T
    errors = {}
    for name, drawn in (("learnt", sample), ("plain", None)):
        code = packed(CodecConfig("sign", 110, 256 if drawn is not None else 0), drawn)
        assert code.row_bytes + ROW_OVERHEAD <= 110
        got = scores(code, code.encode(x, lengths(300)), y)
        errors[name] = float((got - exact).square().mean())
    assert errors["learnt"] < 0.5 * errors["plain"]
    basis = packed(CodecConfig("sign", 110, 256), sample).basis
    strangers = unit(torch.randn(50, BLOCKS, WIDTH))
    assert float(basis.unexplained(strangers).min()) > float(basis.unexplained(x).mean())


def test_a_small_sample_and_one_without_variety_do_no_harm() -> None:
    x = examples(40, 1)
    for sample in (examples(4, 5), examples(1, 5).expand(16, -1, -1).clone()):
        code = packed(CodecConfig("sign", 200, 16), sample)
        got = scores(code, code.encode(x, lengths(40)), x)
        assert bool(got.isfinite().all())


@tries(60)
@given(
    dtype=st.sampled_from(["int8", "int4", "sign"]),
    budget=st.integers(min_row_bytes(), 4000),
    blocks=st.integers(1, 20),
    width=st.sampled_from([16, 64, 256]),
)
def test_a_row_never_takes_more_than_its_budget(dtype: str, budget: int, blocks: int, width: int) -> None:
    wanted = CodecConfig(dtype, budget)
    try:
        shape = fit_shape(wanted, blocks, width, None)
    except UserError:
        assert budget < 200 + 12 * blocks
        return
    code = PackedCodec(shape, width, 0)
    assert code.row_bytes + ROW_OVERHEAD == shape.row_bytes <= budget
    fields = code.encode(unit(torch.randn(3, blocks, width)), torch.ones(3, blocks))
    for name, (kind, size) in code.tensor_specs().items():
        assert (fields[name].dtype, tuple(fields[name].shape)) == (kind, (3, *size))


def test_typical_lengths_of_numbers_at_the_edge() -> None:
    lengths = torch.tensor([[2.0, 0.0, 8.0], [0.0, 0.0, 0.0], [torch.nan, 3.0, 3.0], [torch.inf, 1.0, 1.0]])
    for flushed in (False, True):  # numbers too small for float32's usual precision may count as zeros
        torch.set_flush_denormal(flushed)
        try:
            found = typical_length(lengths)
        finally:
            torch.set_flush_denormal(False)
        torch.testing.assert_close(found, torch.tensor([4.0, 0.0, 3.0, torch.inf]))
    half = typical_length(lengths[:2].half())
    assert half.tolist() == [4.0, 0.0]


@pytest.mark.parametrize("budget", [110, 150, 256, 700, 3000])
def test_a_learnt_row_keeps_to_its_budget_and_comes_back_from_disk(budget: int) -> None:
    sample = examples(64, 5)
    learnt = learn_basis(sample, 16)
    shape = fit_shape(CodecConfig("sign", budget, 64), BLOCKS, WIDTH, learnt)
    assert shape.row_bytes <= budget
    assert all(t + r <= WIDTH for t, r in zip(shape.per_layer, shape.residual, strict=True))
    basis = Basis.of(learnt, shape, lengths(64), 3).rounded()
    again = Basis.of_tensors(basis.tensors(), shape, WIDTH)
    x = examples(9, 1)
    one, two = PackedCodec(shape, WIDTH, 3, basis), PackedCodec(shape, WIDTH, 3, again)
    for name, value in one.encode(x, lengths(9)).items():
        assert torch.equal(value, two.encode(x, lengths(9))[name])
    spoilt = basis.tensors() | {"mean": torch.zeros(1)}
    with pytest.raises(ValueError, match="mean"):
        Basis.of_tensors(spoilt, shape, WIDTH)
    assert RowShape.from_json(dataclasses.asdict(shape)) == shape


def test_a_config_comes_back_from_json_and_another_is_refused() -> None:
    for config in (CodecConfig("float16"), CodecConfig("sign", 160, 64), CodecConfig("int8", None, 0)):
        assert CodecConfig.from_json(config.to_json()) == config
    good = CodecConfig("sign", 160, 64).to_json()
    for key, bad in (
        *(("dtype", value) for value in ("int2", "", None, 4)),
        *(("bytes", value) for value in ("160", 160.0, [])),
        *(("sample", value) for value in (-1, "64", 64.0, None)),
    ):
        with pytest.raises(ValueError, match=r"unknown dtype|is not a count"):
            CodecConfig.from_json(good | {key: bad})


def test_directions_are_judged_on_examples_that_they_were_not_learnt_from() -> None:
    noise = unit(torch.randn(256, 2, 128, generator=torch.Generator().manual_seed(0)))
    learnt = learn_basis(noise, 16)
    # Nothing is common to these: no direction may claim more than its share of unseen energy.
    assert float(learnt.explained.mean()) < 0.2
    assert float(max(e.max() for e in learnt.per_layer_energy)) < 3 / 128


def test_a_head_with_room_for_all_that_it_learnt_from_keeps_them_nearly_whole() -> None:
    """An eighth of the bytes: 247 of 2,048, and 120 of 1,024, which is less than 200 examples take."""
    rows = unit(torch.randn(200, BLOCKS, 256, generator=torch.Generator().manual_seed(1)))
    error = {}
    for budget in (1024, 2048):
        wanted = CodecConfig("sign", budget, 200)
        code = packed(wanted, rows, shared_size(wanted, BLOCKS), 256)
        kept = code.decode(code.encode(rows, lengths(200)))
        error[budget] = float((kept - rows).norm() / rows.norm())
    assert error[2048] < 0.02 < 0.3 < error[1024]


def test_a_head_takes_an_eighth_of_the_bytes_and_256_at_most() -> None:
    wanted = {
        budget: shared_size(CodecConfig("sign", budget), 210) for budget in (256, 512, 1024, 2048, 8192)
    }
    assert wanted == {256: 32, 512: 60, 1024: 111, 2048: 226, 8192: 256}
    assert shared_size(CodecConfig("int8"), 210) == 0


def test_few_layers_get_wider_sketches() -> None:
    assert [default_width(n) for n in (1, 12, 120, 210, 1000)] == [8192, 8192, 1024, 512, 512]
    assert [default_width(n, 16384) for n in (12, 120, 210)] == [8192, 2048, 1024]


def test_no_room_is_said() -> None:
    with pytest.raises(UserError, match="at least"):
        fit_shape(CodecConfig("sign", 60), 4, 64, None)
    with pytest.raises(UserError, match="at least"):
        shared_size(CodecConfig("sign", 60), 4)
    with pytest.raises(ValueError, match="90 directions of the shared basis do not fit"):
        fit_shape(CodecConfig("sign", 110), BLOCKS, WIDTH, learn_basis(examples(200, 5), 90))
    with pytest.raises(UserError, match="layers"):
        fit_shape(CodecConfig("int8", 100), 400, 64, None)
