"""Lays out graphs with the Graphviz inside of pygraphviz; run as a program of its own.

It reads graphs from its standard input and writes pictures to its standard output, each preceded by
its length in bytes. A last entry says what went wrong, and is empty if nothing did.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable

_LENGTH = struct.Struct(">Q")


def packed(entries: Iterable[bytes]) -> bytes:
    """Return entries one after the other, each after its length."""
    return b"".join(_LENGTH.pack(len(entry)) + entry for entry in entries)


def split(data: bytes) -> list[bytes]:
    """Undo :func:`packed`."""
    entries, at = [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        entries.append(data[at : at + length])
        at += length
    return entries


def unpacked(output: bytes) -> tuple[list[bytes], str]:
    """Return the pictures that the worker has drawn, and what went wrong."""
    *pictures, said = split(output)
    return pictures, said.decode()


def main() -> None:
    """Draw what is asked for."""
    import warnings

    # Extension modules made with SWIG warn about themselves on newer Pythons.
    warnings.simplefilter("ignore")
    pictures: list[bytes] = []
    said = ""
    try:
        import pygraphviz

        for dot in split(sys.stdin.buffer.read()):
            graph = pygraphviz.AGraph(string=dot.decode())
            # draw() asks for this number only to write to stderr that 1,000 nodes may take long.
            graph.number_of_nodes = lambda: 0
            pictures.append(graph.draw(format=sys.argv[1], prog="dot"))
            graph.close()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    sys.stdout.buffer.write(packed([*pictures, said.encode()]))


if __name__ == "__main__":
    main()
