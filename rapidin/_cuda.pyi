"""The CUDA kernels. Addresses are ints; `place` is (device index, stream)."""

emulated: bool

def hash_words(seed: int, stream: int, first: int, n: int, words: int, place: tuple[int, int]) -> None: ...
