"""Tables of tiles in source files, between their two marks, as they are read and as written."""

from collections.abc import Mapping

BEFORE, AFTER = "# <table>\n", "# </table>\n"


def rewritten(source: str, table: Mapping) -> str:
    """The source with this table in it, under the name and the type that it has there."""
    before, _, rest = source.partition(BEFORE)
    old, _, after = rest.partition(AFTER)
    declared, _, _ = old.partition(" = ")
    entries = "".join(f"    {key!r}: {tile!r},\n" for key, tile in sorted(table.items()))
    body = f"{declared} = {{\n{entries}}}\n".replace("{\n}", "{}")
    return before + BEFORE + body + AFTER + after
