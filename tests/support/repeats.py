"""Tests of so many parameters that `make test` runs every n-th case of them; `make test-full` runs all.

n has no factor in common with the numbers of values of the parameters where that is possible, so that each
value is among the cases that are run. Of a name that ends in "[triton" these are the cases that Triton
interprets, ten times as slowly as the emulator runs those of CUDA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

EVERY = {
    "ops/test_flat_sketch.py::test_agrees_with_the_reference_on_gpus[triton": 4,
    "ops/test_flat_sketch.py::test_every_lane_and_sign[triton": 3,
    "ops/test_flat_sketch.py::test_integers_are_exact": 7,
    "ops/test_flat_sketch.py::test_integers_are_exact_over_many_parts": 5,
    "ops/test_flat_sketch.py::test_long_tensors_of_one_dtype[triton": 3,
    "ops/test_flat_sketch.py::test_not_finite_elements_stay_in_their_bins": 5,
    "ops/test_flat_sketch.py::test_scales_and_squares_on_gpus[triton": 2,
    "ops/test_flat_sketch.py::test_unaligned_views[triton": 3,
    "ops/test_lifetimes.py::test_all_that_a_kernel_gets_outlives_other_calls": 5,
    "ops/test_linear_sketch.py::test_every_width_of_the_fused_kernel": 7,
    "ops/test_linear_sketch.py::test_layouts": 5,
    "ops/test_linear_sketch.py::test_low_rank_beside_a_massive_activation": 5,
    "ops/test_linear_sketch.py::test_not_finite_examples_stay_apart_on_gpus": 7,
    "ops/test_linear_sketch.py::test_rows_longer_than_a_stage_and_many_tiles[triton": 3,
    "ops/test_linear_sketch.py::test_shapes_widths_and_dtypes": 7,
    "ops/test_linear_sketch.py::test_squares_of_a_side_leave_no_rounding_in_the_cross_term[triton": 4,
    "ops/test_linear_sketch.py::test_two_dtypes[triton": 3,
    "ops/test_matrix_sketch.py::test_embeddings_agree_with_the_reference": 4,
    "ops/test_matrix_sketch.py::test_integers_are_exact_over_many_parts": 3,
    "ops/test_matrix_sketch.py::test_matrices_agree_with_the_reference": 3,
    "ops/test_pack.py::test_pack_is_the_reference_on_gpus": 4,
    "ops/test_pack.py::test_pack_reads_halves_and_any_layout": 4,
    "ops/test_rotate.py::test_rotate_is_the_reference": 5,
    "ops/test_topk_scan.py::test_blocks_with_scales[triton": 3,
    "ops/test_topk_scan.py::test_both_ends_are_two_scans[triton": 2,
    "ops/test_topk_scan.py::test_chunks_of_rows[triton": 2,
    "ops/test_topk_scan.py::test_exact_scores_and_ties_on_gpus": 7,
    "ops/test_topk_scan.py::test_packed_rows_have_the_bits_of_the_cpu[triton": 4,
    "ops/test_topk_scan.py::test_packed_rows_with_blocks[triton": 4,
    "ops/test_topk_scan.py::test_queries_halfway_between_integers_have_the_bits_of_the_cpu[triton": 2,
    "ops/test_topk_scan.py::test_rows_of_any_stride": 5,
    "ops/test_topk_scan.py::test_scores_are_near": 5,
    "ops/test_topk_scan.py::test_the_same_bits_again[triton": 2,
    "attribution/test_methods.py::test_with_any_sketch_a_method_is_its_formula_on_the_sketches": 5,
    "attribution/test_score_errors.py::test_errors_are_those_against_exact_gradients": 3,
    "cache/test_learn.py::test_a_compact_cache_scores_nearly_as_the_whole_one": 5,
    "data/test_spans.py::test_scores_of_tokens_are_parts_of_the_scores": 7,
    "end_to_end/test_gpu_flow.py::test_a_query_finds_the_same": 3,
    "gradients/test_exact.py::test_gradients_lengths_and_products_are_those_of_autograd": 3,
    "gradients/test_preconditioner.py::test_a_run_that_is_stopped_anywhere_ends_with_the_same_bytes": 3,
    "integrations/test_sketch_callback.py::test_sketches_are_those_of_a_cache_at_the_same_weights": 3,
}


def mark_repeats(items: Iterable[Any]) -> None:
    """Marks the other cases `full`. Raises ValueError for an entry without a test, if its file is among the
    items."""
    seen: Counter[str] = Counter()
    files = set()
    for item in items:
        name, _, case = item.nodeid.removeprefix("tests/").partition("[")
        files.add(name.partition("::")[0])
        for each in (name, f"{name}[triton") if case.startswith("triton") else (name,):
            if each in EVERY:
                if seen[each] % EVERY[each]:
                    item.add_marker(pytest.mark.full)
                seen[each] += 1
    gone = [name for name in EVERY if name.partition("::")[0] in files and not seen[name]]
    if gone and len(files) > 20:  # some tests alone may have been asked for
        raise ValueError(f"tests/support/repeats.py names a test that does not exist: {gone[0]}")
