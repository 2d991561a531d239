"""Random histories that are to meet certain things."""

from collections.abc import Iterator


def steps_until(least: int, seen: set[str], wanted: set[str]) -> Iterator[int]:
    """The numbers of a history's steps: so many, and more while it has not ``seen`` all that is ``wanted``.

    At most 50 times as many: what has not happened by then does not.
    """
    for step in range(50 * least):
        if step >= least and seen >= wanted:
            return
        yield step
