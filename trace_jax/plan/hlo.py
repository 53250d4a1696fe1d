"""What a compiled program moves, read off its text: memory traffic and collectives, loops multiplied out.

XLA's own cost analysis counts the body of a loop once, and layers stand in loops; so the text is walked here, every
computation as often as it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "tuple": 0}
# No memory is read or written by these, or it is counted where it happens.
_FREE = """
parameter constant tuple get-tuple-element bitcast while conditional call after-all add-dependency domain opt-barrier
optimization-barrier partition-id replica-id get-dimension-size rng-get-and-update-state
"""
_FREE = frozenset(_FREE.split())
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: bytes, and whether it lies in the chip's main memory (not in a cache the compiler uses)."""

    bytes: int
    in_memory: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def arrays(self) -> list[Array]:
        return arrays(self.type)

    def called(self, key: str) -> tuple[str, ...]:
        """Names of the computations that the attribute `key` holds."""
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes)
        return tuple(re.findall(r"[\w.\-]+", match[1] or match[2])) if match else ()


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange among groups of one shape, summed over the program.

    Attributes:
      groups: [groups, devices of a group], partition numbers; what the links between them are is for the caller.
      count: how often it runs.  bytes: what one device sends (and receives) in all, with ring algorithms.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device: bytes read and written in its main memory, collectives, and loops whose length isn't known.

    Such a loop (decoding, which may end early) is counted as one round.
    """

    memory_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int


def traffic(text: str, num_devices: int) -> Traffic:
    """Reads a compiled module's text (`compiled.as_text()`), which is the program of one device."""
    computations, entry = parse(text)
    times, unknown = _times(computations, entry)
    total, found = 0.0, {}
    for name, (count, fused) in times.items():
        instructions = computations[name]
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                groups = _groups(instruction, num_devices)
                key = kind, groups
                before = found.get(key, (0, 0.0))
                sent = _sent(kind, instruction, instructions, len(groups[0]))
                found[key] = before[0] + count, before[1] + count * sent
            if not fused:
                total += count * _memory_bytes(instruction, instructions, computations)
    collectives = (Collective(kind, groups, *counted) for (kind, groups), counted in found.items())
    ordered = sorted(collectives, key=lambda c: (COLLECTIVES.index(c.kind), -c.bytes))
    return Traffic(total, tuple(c for c in ordered if len(c.groups[0]) > 1), unknown)


# --- reading


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, name of the entry computation)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*-> .*\{$", line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith(" ") and " = " in line:
            instruction = _instruction(line.strip())
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text of the compiled program has no ENTRY computation; it can't be read.")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    name, _, rest = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    opcode, _, arguments = rest[end:].strip().partition("(")
    if end <= 0 or not re.fullmatch(r"[a-z][\w\-]*", opcode):
        return None
    close = _closing("(" + arguments) - 1
    is_root, name = name.startswith("ROOT "), name.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, opcode, rest[:end], arguments[: close - 1], arguments[close:], is_root)


def _closing(text: str) -> int:
    """Position after the parenthesis that closes the first one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


def arrays(type_text: str) -> list[Array]:
    """The arrays of a type, tuples flattened."""
    found = []
    for dtype, shape, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", type_text):
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 32)
        elements = math.prod(int(n) for n in shape.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(-(-elements * bits // 8), space is None or space[1] == "0"))
    return found


def _times(computations: Mapping, entry: str) -> tuple[dict[str, tuple[int, bool]], int]:
    """{computation: (how often it runs, whether inside a fusion)}, and the number of loops of unknown length."""
    times: dict[str, tuple[int, bool]] = {}
    unknown = 0

    def visit(name: str, count: int, fused: bool) -> None:
        nonlocal unknown
        before = times.get(name, (0, fused))
        times[name] = before[0] + count, before[1] and fused
        for instruction in computations.get(name, {}).values():
            if instruction.opcode == "while":
                rounds = _rounds(instruction, computations[name], computations)
                unknown += rounds is None
                visit(instruction.called("body")[0], count * (1 if rounds is None else rounds), fused)
                continue
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            for key in ("calls", "branch_computations", "true_computation", "false_computation"):
                for called in instruction.called(key):
                    visit(called, count, fused or instruction.opcode == "fusion")
            if instruction.opcode == "call":
                visit(instruction.called("to_apply")[0], count, fused)

    visit(entry, 1, False)
    return times, unknown


def _rounds(loop: Instruction, around: Mapping, computations: Mapping) -> int | None:
    """How often a loop runs: what the compiler wrote down, or its counter's bounds; None if it depends on data."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[loop.called("condition")[0]]
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, bound = (condition[name] for name in root.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    stop = _constant(bound, condition, loop, around)
    if counter.opcode != "get-tuple-element" or index is None or stop is None:
        return None
    place = int(index[1])
    start = _constant(around[_tuple_element(loop, around, place)], around)
    body = computations[loop.called("body")[0]]
    result = next(i for i in body.values() if i.is_root)
    step = _step(body, result, place)
    return None if start is None or step is None else max(0, -(-(stop - start) // step))


def _tuple_element(loop: Instruction, around: Mapping, place: int) -> str:
    return around[loop.operands[0]].operands[place]


def _constant(instruction: Instruction, inside: Mapping, loop: Instruction | None = None, around=None) -> int | None:
    """The value of an integer that is constant in the text, also where a loop carries it unchanged."""
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = inside[instruction.operands[0]]
    if instruction.opcode == "constant":
        return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
    index = re.search(r"index=(\d+)", instruction.attributes)
    if instruction.opcode == "get-tuple-element" and loop is not None and around is not None and index:
        return _constant(around[_tuple_element(loop, around, int(index[1]))], around)
    return None


def _step(body: Mapping, result: Instruction, place: int) -> int | None:
    """What a round adds to the counter at `place` of the loop's state."""
    if result.opcode != "tuple":
        return None
    added = body[result.operands[place]]
    while added.opcode in ("copy", "bitcast"):
        added = body[added.operands[0]]
    if added.opcode != "add":
        return None
    steps = [_constant(body[name], body) for name in added.operands]
    return next((step for step in steps if step), None)


# --- collectives


def _groups(instruction: Instruction, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Which devices exchange with each other, as partition numbers."""
    attributes = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}?(?:,|$)", attributes)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{(.*?)\}", attributes
    )
    if named:  # the axes of a mesh along which devices exchange
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        numbers = np.arange(num_devices).reshape(_numbers(named[2]) if named[2] else num_devices)
        numbers = numbers.transpose(_numbers(named[3])) if named[3] else numbers
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
        grid = np.moveaxis(numbers.reshape(tuple(sizes.values())), along, range(-len(along), 0))
        groups = grid.reshape(-1, math.prod(grid.shape[-len(along) :]))
        return tuple(tuple(int(n) for n in group) for group in groups)
    if pairs:
        return tuple(_numbers(pair) for pair in re.findall(r"\{?(\d+,\d+)\}?", pairs[1]))
    if listed:
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if iota:
        shape, dims = _numbers(iota[1]), _numbers(iota[2])
        numbers = np.arange(num_devices).reshape(dims)
        numbers = numbers.transpose(_numbers(iota[3])) if iota[3] else numbers
        return tuple(tuple(int(n) for n in group) for group in numbers.reshape(shape))
    return (tuple(range(num_devices)),)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _sent(kind: str, instruction: Instruction, around: Mapping, size: int) -> float:
    """Bytes that one device sends, ring algorithms assumed: what it can't avoid when all links are used evenly."""
    operands = instruction.operands[: 1 if kind == "ragged-all-to-all" else None]
    given = sum(array.bytes for name in operands for array in around[name].arrays)
    share = (size - 1) / size
    factors = {"all-gather": size - 1, "all-reduce": 2 * share, "collective-permute": 1}
    return given * factors.get(kind, share)


# --- memory


def _memory_bytes(instruction: Instruction, around: Mapping, computations: Mapping) -> float:
    """Bytes that one run of an instruction reads and writes in main memory."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode == "async-start":
        return 0.0
    given = [[array for array in around[name].arrays if array.in_memory] for name in instruction.operands]
    read = [sum(array.bytes for array in operand) for operand in given]
    written = sum(array.bytes for array in instruction.arrays if array.in_memory)
    if opcode.endswith("-start"):  # the type lists the operands too, and a slice reads no more than it writes
        moved = [array for array in instruction.arrays if array.bytes > 4][len(read) :]
        size = sum(array.bytes for array in moved)
        return sum(min(size, n) for n in read) + sum(array.bytes for array in moved if array.in_memory)
    if opcode in _SLICES:
        size = sum(array.bytes for array in instruction.arrays)
        return min(read[0], size) + sum(read[1:]) + written
    if opcode in ("dynamic-update-slice", "scatter"):
        place = 1 if opcode == "dynamic-update-slice" else 2
        update = sum(array.bytes for array in around[instruction.operands[place]].arrays)
        return sum(read[1:]) + min(update, written)
    if opcode == "fusion":
        fused = computations[instruction.called("calls")[0]]
        return _fusion_bytes(fused, given, instruction.arrays)
    return sum(read) + written


def _fusion_bytes(fused: Mapping, given: list[list[Array]], results: list[Array]) -> float:
    """As `_memory_bytes`: of an operand only what is sliced out, of a result only what is updated in place."""
    total = 0.0
    parameters = [i for i in fused.values() if i.opcode == "parameter"]
    for parameter in parameters:
        size = sum(array.bytes for array in given[int(parameter.arguments)])
        parts = [_part(user, name) for name, user in _users(parameter.name, fused)]
        total += size if None in parts else min(size, sum(part or 0 for part in parts))
    roots = [i for i in fused.values() if i.is_root]
    roots = [fused[n] for n in roots[0].operands] if roots[0].opcode == "tuple" else roots
    sizes = [result.bytes if result.in_memory else 0 for result in results]
    for root, size in zip(roots, sizes, strict=False):
        while root.opcode in ("bitcast", "copy", "convert"):
            root = fused[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            size = min(size, sum(array.bytes for array in fused[root.operands[1]].arrays))
        total += size
    return total


def _users(name: str, fused: Mapping) -> Iterator[tuple[str, Instruction]]:
    """(operand name, instruction) for what reads a value inside a fusion, bitcasts looked through."""
    for instruction in fused.values():
        if name in instruction.operands:
            if instruction.opcode == "bitcast" and not instruction.is_root:
                yield from _users(instruction.name, fused)
            else:
                yield name, instruction


def _part(user: Instruction, name: str) -> int | None:
    """Bytes that `user` reads of the operand `name`; None = all of it."""
    if user.operands[0] == name:
        if user.opcode in _SLICES:
            return sum(array.bytes for array in user.arrays)
        if user.opcode == "dynamic-update-slice":
            return 0
    return None
