"""What launchers share."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def grid(op: str, programs: int) -> tuple[int]:
    """The grid of so many programs, all on axis 0: the others have at most 65,535.

    Raises ValueError where even that axis has not as many.
    """
    if programs >= 1 << 31:
        raise ValueError(f"{op}: {programs} programs are more than a launch may have; call it for fewer rows")
    return (programs,)
