"""The CUDA kernels. Addresses are ints; `place` is (device index, stream)."""

emulated: bool
architectures: str  # as nvcc names them: "sm_80 sm_90 compute_90"

def capability(device: int) -> int: ...
def multiprocessors(device: int) -> int: ...
def topk_scan(fields: dict[str, int], place: tuple[int, int]) -> None: ...
def topk_merge(
    fields: dict[str, int],
    scores: int,
    indices: int,
    low_scores: int,
    low_indices: int,
    stride: int,
    last: int,
    place: tuple[int, int],
) -> None: ...
def scan_queries(fields: dict[str, int], place: tuple[int, int]) -> None: ...
def topk_scan_shared_bytes(
    format: int, blocks: bool, tiles: int, units: int, columns_held: int, capacity: int, ends: int
) -> int: ...
def hash_words(seed: int, stream: int, first: int, n: int, words: int, place: tuple[int, int]) -> None: ...
def linear_sketch(
    inputs: int,
    inputs_dtype: int,
    n_in: int,
    inputs_strides: tuple[int, ...],
    inputs_table: int,
    inputs_term: tuple[int, int, int, int],
    grads: int,
    grads_dtype: int,
    n_out: int,
    grads_strides: tuple[int, ...],
    grads_table: int,
    grads_term: tuple[int, int, int, int],
    batch: int,
    tokens: int,
    k: int,
    splits: int,
    block_tokens: int,
    partial: int,
    out: int,
    place: tuple[int, int],
) -> None: ...
def linear_sketch_low_rank(dim: int) -> int: ...
def shared_bytes(device: int) -> int: ...
def linear_sketch_tile(k: int, dtype: int, other_dtype: int) -> tuple[int, int]: ...
def linear_sketch_table(columns: int, n: int, k: int, bytes: int, table: int) -> None: ...
def flat_sketch(
    table: int,
    tensors: int,
    batch: int,
    rows: int,
    parts: int,
    chunks_of_part: int,
    seed: int,
    dim: int,
    places: int,
    scales: int,
    partial: int,
    sketch: int,
    squares: tuple[int, int, int, int],
    place: tuple[int, int],
) -> None: ...
