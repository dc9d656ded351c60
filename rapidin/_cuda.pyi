"""The CUDA kernels. Addresses are ints; `place` is (device index, stream)."""

emulated: bool

def hash_words(seed: int, stream: int, first: int, n: int, words: int, place: tuple[int, int]) -> None: ...
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
