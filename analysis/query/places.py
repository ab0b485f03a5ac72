"""Places in an image: a patch or a region of the patch grid, as `--at` names it."""

from actcache import SettingsError

At = tuple[int | slice, int | slice]
"""A patch (3, 4), or a region (slice(0, 3), slice(2, 5)): rows and columns of the grid."""


def parse_at(text: str) -> At:
    """`3,4` or `0:3,2:5` as `query_image` takes it; a range ends before its second number. Raises SettingsError."""
    try:
        row, column = (_parse_axis(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"--at must be ROW,COLUMN or ROW:ROW,COLUMN:COLUMN, got {text!r}.") from error
    return row, column


def _parse_axis(text: str) -> int | slice:
    start, colon, stop = text.partition(":")
    if not colon:
        return int(text)
    return slice(int(start) if start.strip() else None, int(stop) if stop.strip() else None)


def choose_patches(grid: tuple[int, int], at: At) -> tuple[range, range]:
    """The rows and columns of a patch or a region. Raises SettingsError outside the grid, or for an empty region."""
    axes: list[range] = []
    for name, part, size in zip(("row", "column"), at, grid, strict=True):
        chosen = part if isinstance(part, slice) else slice(part, part + 1)
        start, stop = chosen.start or 0, size if chosen.stop is None else chosen.stop
        if not 0 <= start < stop <= size:
            raise SettingsError(f"--at: a {name} must lie in 0..{size - 1}, and a range must not be empty, got {part}.")
        axes.append(range(start, stop))
    return axes[0], axes[1]
