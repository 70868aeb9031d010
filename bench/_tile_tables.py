"""Tables of tiles in source files, between their two marks, as they are read and as written."""

from collections.abc import Mapping


def rewritten(source: str, op: str, table: Mapping) -> str:
    """The source with this table of an op in it, under the name and the type that it has there."""
    begin, end = f"# <table of {op}>\n", f"# </table of {op}>\n"
    before, _, rest = source.partition(begin)
    old, _, after = rest.partition(end)
    declared, _, _ = old.partition(" = ")
    entries = "".join(f"    {key!r}: {tile!r},\n" for key, tile in sorted(table.items()))
    body = f"{declared} = {{\n{entries}}}\n".replace("{\n}", "{}")
    return before + begin + body + end + after
