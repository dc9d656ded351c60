"""What launchers share."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def grid(op: str, programs: int) -> tuple[int]:
    """The grid of `programs` programs, all on axis 0: the other axes have at most 65,535.

    Raises ValueError if there are too many for axis 0.
    """
    if programs >= 1 << 31:
        raise ValueError(f"{op}: {programs} programs exceed the limit of a launch; pass fewer rows at a time")
    return (programs,)
