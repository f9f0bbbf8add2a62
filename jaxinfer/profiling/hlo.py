"""From an operation's name in a compiled program to the scope it was written in.

A trace keeps the compiled programs (HloProto) that ran. Each instruction there carries `op_name`,
the path of named scopes and the primitive it came from. XLA merges and adds instructions; where one
has no scope of its own, that of what it contains, of whoever else reads the same weight, of what
reads it, of what it reads, or else of the loop or branch it is in stands for it. Field numbers:
xla/service/hlo.proto and xla/xla_data.proto.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from jaxinfer.profiling.wire import Field, fields, numbers, parts, text

Scope = tuple[str, ...]
Reading = tuple[Scope, bool]
"""A weight by its path in the program's arguments, and whether it is multiplied by."""

CONTROL = frozenset({"while", "conditional", "call", "async-start", "async-done", "async-update"})
"""Opcodes whose time is that of the instructions they run."""
_TRANSFORMED = re.compile(r"^(?:vmap|jvp|transpose|remat|checkpoint)\((.*)\)$")
_FUNCTION = re.compile(r"^p?jit\(")
_STRUCTURE = frozenset(
    {"while", "body", "cond", "closed_call", "eval_jaxpr", "scan", "checkpoint", "custom_vjp_call"}
)
_MOVES = frozenset({"bitcast", "copy", "reshape", "transpose", "tuple"})
_KEY = re.compile(r"\['([^']*)'\]")
_NUMBERED = re.compile(r"^(.+)_\d+$")
_REACH = 64
"""Instructions looked at for a scope before an operation counts as having none."""


@dataclass(slots=True)
class Instruction:
    """One instruction: its opcode, path of scopes (may be ""), operands and called computations."""

    name: str
    opcode: str
    op_name: str
    operands: list[int]
    called: list[int]


Look = Callable[[Instruction], list[Instruction]]


@dataclass(slots=True)
class Program:
    """Instructions of one compiled program by name, and how they hang together."""

    name: str = ""
    instructions: dict[str, Instruction] = field(default_factory=dict)
    _by_id: dict[int, Instruction] = field(default_factory=dict)
    _members: dict[int, list[Instruction]] = field(default_factory=dict)
    _users: dict[int, list[Instruction]] = field(default_factory=dict)
    _ids: dict[str, int] = field(default_factory=dict)
    _homes: dict[str, int] = field(default_factory=dict)
    _callers: dict[int, Instruction] = field(default_factory=dict)

    def is_control(self, name: str) -> bool:
        """Whether the instruction only runs others: a loop, a branch, a call."""
        found = self.instructions.get(name)
        return found is not None and found.opcode in CONTROL

    def scope(self, name: str, of_weights: Mapping[Reading, Scope]) -> Scope:
        """The named scopes of instruction `name`, or of what stands for it; () if there is none.

        `of_weights` is what `scopes_of_weights` found, in this program or in others.
        """
        found = self.instructions.get(name)
        if found is None:
            return ()
        scope = _first_scope(found, self._inside)
        if scope:
            return scope
        reading = self._reading(found)
        if reading is not None:
            return of_weights.get(reading, reading[0])
        # Where XLA replaces an instruction by two, the last of them keeps the name: so who reads it
        # says more than what it reads.
        for look in (self._readers, self._operands, self._caller):
            scope = _first_scope(found, look)
            if scope:
                return scope
        return ()

    def scopes_of_weights(self) -> dict[Reading, Scope]:
        """For each weight the scope that reads it so."""
        found = {}
        for instruction in self.instructions.values():
            reading = self._reading(instruction)
            scope = _first_scope(instruction, self._inside) if reading else ()
            if reading and scope:
                found[reading] = scope
        return found

    def _reading(self, instruction: Instruction) -> Reading | None:
        """What weight the instruction reads as it is, and whether it multiplies by it."""
        if instruction.opcode in _MOVES or instruction.opcode in CONTROL:
            return None
        is_product = any(i.opcode == "dot" for i in _walk(instruction, self._inside))
        for operand in self._operands(instruction):
            for source in _walk(operand, self._operands):
                if source.opcode == "parameter":
                    keys = _KEY.findall(source.op_name)
                    if keys:
                        return tuple(_unnumbered(key) for key in ("weights", *keys)), is_product
                if source.opcode not in _MOVES:
                    break
        return None

    def _inside(self, instruction: Instruction) -> list[Instruction]:
        """What it calls, the result first."""
        return [m for called in instruction.called for m in reversed(self._members.get(called, []))]

    def _operands(self, instruction: Instruction) -> list[Instruction]:
        return [self._by_id[i] for i in instruction.operands if i in self._by_id]

    def _readers(self, instruction: Instruction) -> list[Instruction]:
        return self._users.get(self._ids[instruction.name], [])

    def _caller(self, instruction: Instruction) -> list[Instruction]:
        """The loop or branch that it is part of."""
        caller = self._callers.get(self._homes[instruction.name])
        return [] if caller is None else [caller]


def _walk(start: Instruction, look: Look) -> Iterator[Instruction]:
    """`start` and what `look` leads to from it, nearest first, each once, `_REACH` at most."""
    found = [start]
    seen = {start.name}
    at = 0
    while at < len(found) < _REACH:
        yield found[at]
        for instruction in look(found[at]):
            if instruction.name not in seen:
                seen.add(instruction.name)
                found.append(instruction)
        at += 1
    yield from found[at:]


def read_program(proto: memoryview) -> Program:
    """The program of a serialised HloProto. Raises WireError where it is malformed."""
    program = Program()
    for module in parts(proto, 1):
        for number, value in fields(module):
            if number == 1:
                program.name = text(value)
            elif number == 3 and isinstance(value, memoryview):
                _read_computation(program, value)
    return program


def _read_computation(program: Program, message: memoryview) -> None:
    members: list[Instruction] = []
    own_id = -1
    for number, value in fields(message):
        if number == 2 and isinstance(value, memoryview):
            key, instruction = _read_instruction(value)
            members.append(instruction)
            program.instructions[instruction.name] = instruction
            program._by_id[key] = instruction
            program._ids[instruction.name] = key
            for operand in instruction.operands:
                program._users.setdefault(operand, []).append(instruction)
            for called in instruction.called:
                program._callers[called] = instruction
        elif number == 5 and isinstance(value, int):
            own_id = value
    program._members[own_id] = members
    for member in members:
        program._homes[member.name] = own_id


def _read_instruction(message: memoryview) -> tuple[int, Instruction]:
    name = opcode = op_name = ""
    key = -1
    operands: list[int] = []
    called: list[int] = []
    for number, value in fields(message):
        if number == 1:
            name = text(value)
        elif number == 2:
            opcode = text(value)
        elif number == 7:
            op_name = _op_name(value)
        elif number == 35 and isinstance(value, int):
            key = value
        elif number == 36:
            operands += numbers(value)
        elif number == 38:
            called += numbers(value)
    return key, Instruction(name, opcode, op_name, operands, called)


def _op_name(metadata: Field) -> str:
    if isinstance(metadata, memoryview):
        for number, value in fields(metadata):
            if number == 2:
                return text(value)
    return ""


def scope_of(op_name: str) -> Scope:
    """The named scopes of an op_name, outermost first, layers merged: () where it has none.

    "jit(step)/Decoder/layers_3/attn/qkv/td,nhd->tnh/dot_general" gives ("Decoder", "layers",
    "attn", "qkv"): transformations, loops, branches and an einsum's letters say how it runs, not
    what it is, and the last part is the primitive.
    """
    scopes: list[str] = []
    for part in op_name.split("/")[:-1]:
        while matched := _TRANSFORMED.match(part):
            part = matched[1]
        if not part or _FUNCTION.match(part) or part in _STRUCTURE or part.startswith("branch_"):
            continue
        if "->" in part or part.startswith("_") or "<locals>" in part:  # an einsum, a function
            continue
        name = _unnumbered(part)
        if scopes and name == scopes[0]:  # the whole path once more, behind itself
            scopes.clear()
        if not scopes or name != scopes[-1]:
            scopes.append(name)
    return tuple(scopes)


def _first_scope(start: Instruction, look: Look) -> Scope:
    for instruction in _walk(start, look):
        scope = scope_of(instruction.op_name)
        if scope:
            return scope
    return ()


def _unnumbered(name: str) -> str:
    """ "layers_12" as "layers"."""
    numbered = _NUMBERED.match(name)
    return numbered[1] if numbered else name
