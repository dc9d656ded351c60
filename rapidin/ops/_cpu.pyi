"""The C++ kernels: addresses as integers, strides in elements, nothing checked. Call rapidin.ops instead."""

def supported_sets() -> list[str]: ...
def current_set() -> str: ...
def processor() -> tuple[str, int]:
    """Vendor and family of an x86 processor, as it names itself; ("", 0) of others."""

def use_set(name: str) -> None: ...
def hash_words(seed: int, stream: int, first: int, n: int, out: int) -> None: ...
def permutation(seed: int, stream: int, first: int, n: int, out: int) -> None: ...
def row_table(seed: int, bins: int, signs: int, n: int, k: int, out: int) -> None: ...
def column_table(seed: int, bins: int, signs: int, n: int, k: int, out: int) -> None: ...
def count_sketch(
    x: int,
    dtype: int,
    batch: int,
    tokens: int,
    n: int,
    strides: tuple[int, ...],
    table: int,
    k: int,
    out: int,
    threads: int,
) -> None: ...
def has_tensor_sketch(k: int) -> bool: ...
def tensor_sketch(
    a: int,
    dtype_a: int,
    n_a: int,
    strides_a: tuple[int, ...],
    table_a: int,
    low_rank_a: tuple[int, int, int, int],
    g: int,
    dtype_g: int,
    n_g: int,
    strides_g: tuple[int, ...],
    table_g: int,
    low_rank_g: tuple[int, int, int, int],
    batch: int,
    tokens: int,
    k: int,
    out: int,
    threads: int,
) -> None: ...
def count_sketch_pairs(
    a: int,
    dtype_a: int,
    n_a: int,
    strides_a: tuple[int, ...],
    table_a: int,
    g: int,
    dtype_g: int,
    n_g: int,
    strides_g: tuple[int, ...],
    table_g: int,
    tokens: int,
    first: int,
    count: int,
    k: int,
    z: int,
    threads: int,
) -> None: ...
def square_sums(z: int, first: int, count: int, tokens: int, k: int, sum: int, threads: int) -> None: ...
def fold(
    matrix: int,
    dtype: int,
    batch: int,
    rows: int,
    cols: int,
    strides: tuple[int, ...],
    row_table: int,
    row_table_stride: int,
    column_table: int,
    k: int,
    out: int,
    threads: int,
) -> None: ...
def flat_sketch(
    tensors: list[tuple[int, int, int, int, int]], batch: int, seed: int, dim: int, out: int, threads: int
) -> None: ...
def topk_scan(
    parts: list[tuple[int, int, int, int, int, int, int]],
    n: int,
    d: int,
    queries: int,
    q: int,
    offsets: list[int],
    scales: int,
    stride_scales: int,
    valid: int,
    base: int,
    stride_base: int,
    k: int,
    top_scores: int,
    top_indices: int,
    bottom_scores: int,
    bottom_indices: int,
    scores: int,
    scored: int,
    stride_scores: int,
    threads: int,
) -> None: ...
def pack(
    rows: int,
    dtype: int,
    n: int,
    width: int,
    stride_row: int,
    to: int,
    codes: int,
    scale: int,
    threads: int,
) -> None: ...
def unpack(part: tuple[int, int, int, int, int, int, int], n: int, out: int, threads: int) -> None: ...
