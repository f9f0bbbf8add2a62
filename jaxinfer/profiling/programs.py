"""The compiled programs that a trace carries, parsed when they are first asked for."""

import re
from collections.abc import Set
from typing import Any

from jaxinfer.profiling import hlo, wire

_NAMED = re.compile(r"^(.*)\((-?\d+)\)$")
ENOUGH = 0.5
"""Share of the operations that ran which a program must have to be taken for theirs."""


class Programs:
    """Programs of the plane `metadata` of a serialised XSpace.

    Parsing one takes seconds where it is large, and most that are there did not run.
    """

    def __init__(self, space: memoryview, metadata: str):
        self._protos: dict[int, tuple[str, memoryview]] = {}
        self._parsed: dict[int, hlo.Program] = {}
        for plane in wire.parts(space, 1):
            if any(wire.text(name) == metadata for name in wire.parts(plane, 2)):
                for entry in wire.parts(plane, 4):
                    for event in wire.parts(entry, 2):
                        self._keep(event)

    def _keep(self, event: memoryview) -> None:
        """An event's metadata: "name(id)" with the program as a stat of bytes."""
        named = proto = None
        for number, value in wire.fields(event):
            if number == 2:
                named = _NAMED.match(wire.text(value))
            elif number == 5 and isinstance(value, memoryview):
                for stat in wire.parts(value, 6):
                    proto = stat
        if named is not None and proto is not None:
            self._protos[int(named[2])] = (named[1], proto)

    def find(self, program_id: Any, name: str, operations: Set[str]) -> hlo.Program | None:
        """The program `name` whose instructions have the names `operations`.

        That of the given id if it has them; a program that came from the compile cache may run
        under another id than it is kept under, so others of the name are tried, small ones first.
        """
        same = [key for key, (kept, _) in self._protos.items() if kept == name]
        same.sort(key=lambda key: (key != program_id, len(self._protos[key][1])))
        best, share = None, ENOUGH
        for key in same:
            if key not in self._parsed:
                self._parsed[key] = hlo.read_program(self._protos[key][1])
            found = self._parsed[key]
            has = len(operations & found.instructions.keys()) / max(1, len(operations))
            if has == 1.0:
                return found
            if has > share:
                best, share = found, has
        return best
