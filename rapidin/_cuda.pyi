"""The CUDA kernels. Addresses are ints; `place` is (device index, stream)."""

emulated: bool

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
def unpack_codes(
    rows: int, format: int, n: int, width: int, stride_row: int, out: int, place: tuple[int, int]
) -> None: ...
def hash_words(seed: int, stream: int, first: int, n: int, words: int, place: tuple[int, int]) -> None: ...
