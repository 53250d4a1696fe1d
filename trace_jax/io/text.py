"""Tables and sizes as plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table: the first `left` columns to the left, the others to the right; a rule under the header."""
    width = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, width, strict=True)))
        for row in rows
    ]
    rule = "-" * max(len(line) for line in lines)
    return [lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])]


def byte_size(count: float | None) -> str:
    """Bytes in a unit that suits them; a dash where there is no number."""
    if count is None:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
