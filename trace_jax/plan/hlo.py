"""What a compiled program moves, read off its text: memory traffic and collectives, loops multiplied out.

XLA's own cost analysis counts the body of a loop once, and layers stand in loops; so the text is walked here, every
computation as often as it runs.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from trace_jax.models.moe import ONE_OF, RARE

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "tuple": 0}
# No memory is read or written by these, or it is counted where it happens.
_FREE = """
parameter constant tuple get-tuple-element bitcast while conditional call after-all add-dependency domain opt-barrier
optimization-barrier partition-id replica-id get-dimension-size rng-get-and-update-state async-start
"""
_SLICES = ("dynamic-slice", "slice", "gather")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)")


Arrays = list[tuple[int, bool]]  # of each its bytes, and whether it is in main memory (not in the compiler's cache)


class Instruction(NamedTuple):
    """One line of a computation: what it gives (`arrays`), and names of what it is given (`operands`)."""

    name: str
    opcode: str
    arrays: Arrays
    operands: list[str]
    arguments: str
    attributes: str
    is_root: bool

    def called(self, key: str) -> list[str]:
        """Names of the computations that the attribute `key` holds."""
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes)
        return re.findall(r"[\w.\-]+", match[1] or match[2]) if match else []


Computation = dict[str, Instruction]


class Traffic(NamedTuple):
    """What one run of a program moves on one device, or one round of its loop of unknown length (decoding may end
    early): bytes read and written in its main memory, the same by operation ({(instruction, part of the pass, name):
    [how often, bytes]}), and collectives.
    """

    memory_bytes: float
    operations: dict[tuple[str, str, str], list[float]]
    collectives: list["Collective"]


class Collective(NamedTuple):
    """One kind of exchange among `groups` (partition numbers [groups, devices of a group]), summed over the program:
    how often it runs, and what one device sends (and receives) in all, with ring algorithms.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    count: int
    bytes: float


def traffic(text: str, num_devices: int, *, rounds: int = 1) -> Traffic:
    """Of a compiled module's text (`compiled.as_text()`), the program of one device. Where the length of a loop is
    unknown, of one of `rounds` rounds: its share of what is done before and after the loop is counted to it.
    """
    computations, entry = _parse(text)
    times, continued = _times(computations, entry, rounds), _continued(computations)
    operations, sums = {}, {}
    for name, (count, fused) in times.items():
        around = computations[name]
        for instruction in around.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and name not in continued:
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                groups = _groups(instruction.attributes, num_devices)
                runs, sent = sums.get((kind, groups), (0, 0.0))
                sums[kind, groups] = runs + count, sent + count * _sent(kind, instruction, around, len(groups[0]))
            if not fused and (moved := _memory_bytes(instruction, around, computations, continued)):
                counted = operations.setdefault(_operation(instruction), [0, 0.0])
                counted[0], counted[1] = counted[0] + count, counted[1] + count * moved
    for counted in operations.values():
        counted[:] = -(-counted[0] // rounds), counted[1] / rounds
    collectives = [
        Collective(kind, groups, -(-count // rounds), sent / rounds)
        for (kind, groups), (count, sent) in sums.items()
        if len(groups[0]) > 1
    ]
    collectives.sort(key=lambda c: (COLLECTIVES.index(c.kind), -c.bytes))
    return Traffic(sum(moved for _, moved in operations.values()), operations, collectives)


def _operation(instruction: Instruction) -> tuple[str, str, str]:
    """(instruction, part of the pass, name in the traced program or "")."""
    named = re.search(r'op_name="([^"]*)"', instruction.attributes)
    path = named[1] if named else ""
    part = "computed again" if "rematted" in path else "backward" if "transpose(" in path else "forward" if path else ""
    return instruction.opcode.removesuffix("-start"), part, path.rpartition("/")[2]


def _continued(computations: dict[str, Computation]) -> set[str]:
    """Fused computations in which a collective goes on that another began: the TPU compiler runs one in pieces beside
    matmuls, and writes it down in each.
    """
    every = (i for computation in computations.values() for i in computation.values())
    ends = [name for i in every if i.name.startswith("async-collective-done") for name in i.called("calls")]
    return {*ends, *(name for name in computations if name.startswith("async_collective_fusion"))}


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """({computation: {name: instruction}}, name of the entry computation)."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*-> .*\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            root, name, type_text, opcode, rest = match.groups()
            arguments, _, attributes = rest.partition("), ")
            arguments, operands = arguments.removesuffix(")"), re.findall(r"%([\w.\-]+)", arguments)
            arrays = _arrays(type_text)
            current[name] = Instruction(name, opcode, arrays, operands, arguments, attributes, root is not None)
    if not entry:
        raise ValueError("the text of the compiled program has no ENTRY computation; it can't be read.")
    return computations, entry


def _arrays(type_text: str) -> Arrays:
    """The arrays of a type, tuples flattened."""
    arrays = []
    for dtype, digits, shape, layout in re.findall(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\](\{[^}]*\})?", type_text):
        bits = _BITS.get(dtype, int(digits or 32))
        elements = math.prod(int(n) for n in shape.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append((-(-elements * bits // 8), space is None or space[1] == "0"))
    return arrays


def _bytes(arrays: Iterable[tuple[int, bool]], *, in_memory: bool = False) -> int:
    return sum(size for size, is_there in arrays if is_there or not in_memory)


def _source(instruction: Instruction, inside: Computation) -> Instruction:
    """What a value is a copy of."""
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = inside[instruction.operands[0]]
    return instruction


# --- loops


def _times(computations: dict[str, Computation], entry: str, unknown_rounds: int) -> dict[str, tuple[int, bool]]:
    """{computation: (how often it runs, whether inside a fusion)}. What only an unbalanced load needs does not run."""
    times: dict[str, tuple[int, bool]] = {}
    rare = {n for n, found in computations.items() if any(f"/{RARE}/" in i.attributes for i in found.values())}

    def visit(name: str, count: int, fused: bool) -> None:
        before = times.get(name, (0, fused))
        times[name] = before[0] + count, before[1] and fused
        for instruction in computations.get(name, {}).values():
            if instruction.opcode == "while":
                rounds = _rounds(instruction, computations[name], computations)
                visit(instruction.called("body")[0], count * (unknown_rounds if rounds is None else rounds), fused)
            elif not instruction.opcode.endswith(("-done", "-update")):
                keys = ["calls", "branch_computations", "true_computation", "false_computation"]
                for key in (*keys, *["to_apply"] * (instruction.opcode == "call")):
                    for called in (name for name in instruction.called(key) if name not in rare):
                        visit(called, count, fused or instruction.opcode == "fusion")

    visit(entry, 1, False)
    return times


def _rounds(loop: Instruction, around: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: what the compiler wrote down, or its counter's bounds; None if it depends on data."""
    if written := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(written[1])
    condition, body = (computations[loop.called(key)[0]] for key in ("condition", "body"))
    test, result = (next(i for i in computation.values() if i.is_root) for computation in (condition, body))
    if test.opcode != "compare" or "direction=LT" not in test.attributes or result.opcode != "tuple":
        return None
    initial = around[loop.operands[0]].operands

    def constant(instruction: Instruction, inside: Computation) -> int | None:
        """An integer that stands in the text, also where the loop carries it to its condition."""
        instruction = _source(instruction, inside)
        index = re.search(r"index=(\d+)", instruction.attributes)
        if inside is condition and instruction.opcode == "get-tuple-element" and index:
            return constant(around[initial[int(index[1])]], around)
        number = re.fullmatch(r"-?\d+", instruction.arguments) if instruction.opcode == "constant" else None
        return int(number[0]) if number else None

    counter, bound = (condition[name] for name in test.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or index is None:
        return None
    added = _source(body[result.operands[int(index[1])]], body)
    steps = [constant(body[name], body) for name in added.operands] if added.opcode == "add" else []
    step = next((step for step in steps if step), None)
    start, stop = constant(counter, condition), constant(bound, condition)
    return None if start is None or stop is None or step is None else max(0, -(-(stop - start) // step))


# --- collectives


def _groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Which devices exchange with each other, as partition numbers."""
    grid = np.arange(num_devices)[None]
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? ?\{(.*?)\}", attributes)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if mesh:  # the axes of a mesh along which devices exchange
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        grid = _numbered(mesh[2] or f"[{num_devices}]", num_devices).reshape(tuple(sizes.values()))
        grid = np.moveaxis(grid, along, range(-len(along), 0))
        grid = grid.reshape(-1, math.prod(grid.shape[-len(along) :]))
    elif listed := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", attributes):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    elif iota:
        grid = _numbered(iota[2], num_devices).reshape(_numbers(iota[1]))
    return tuple(map(tuple, grid.tolist()))


def _numbered(text: str, num_devices: int) -> np.ndarray:
    """Device numbers written as "[4,2]T(1,0)": in that shape, with its axes in that order."""
    shape, _, order = text.partition("T")
    numbers = np.arange(num_devices).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _sent(kind: str, instruction: Instruction, around: Computation, size: int) -> float:
    """Bytes that one device sends, ring algorithms assumed: what it can't avoid when all links are used evenly."""
    operands = instruction.operands[: 1 if kind == "ragged-all-to-all" else None]
    share = (size - 1) / size
    factors = {"all-gather": size - 1, "all-reduce": 2 * share, "collective-permute": 1}
    return _bytes(array for name in operands for array in around[name].arrays) * factors.get(kind, share)


# --- memory


def _memory_bytes(
    instruction: Instruction, around: Computation, computations: dict[str, Computation], continued: set[str]
) -> float:
    """Bytes that one run of an instruction reads and writes in main memory."""
    opcode, results = instruction.opcode, instruction.arrays
    if opcode in _FREE.split() or opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [around[name].arrays for name in instruction.operands]
    read, written = [_bytes(operand, in_memory=True) for operand in operands], _bytes(results, in_memory=True)
    if opcode.endswith("-start"):  # the type lists the operands too, and a slice reads no more than it writes
        moved = [array for array in results if array[0] > 4][len(read) :]
        return sum(min(_bytes(moved), size) for size in read) + _bytes(moved, in_memory=True)
    if opcode in _SLICES:
        return min(read[0], _bytes(results)) + sum(read[1:]) + written
    if opcode in ("dynamic-update-slice", "scatter"):
        return sum(read[1:]) + min(_bytes(operands[1 if opcode == "dynamic-update-slice" else 2]), written)
    if opcode == "custom-call" and (layers := re.search(rf"/{ONE_OF}(\d+)/", instruction.attributes)):
        return sum(read) + written - max(read) * (1 - 1 / int(layers[1]))
    if opcode != "fusion":
        return sum(read) + written
    # Of an operand only what is sliced out is read, of a result only what is updated in place is written.
    called = instruction.called("calls")[0]
    fused, total = computations[called], 0.0
    if instruction.name.startswith("async-collective-start"):
        exchange = next(i for i in fused.values() if i.opcode in COLLECTIVES)
        return sum(read) + _bytes(exchange.arrays, in_memory=True)
    elsewhere = COLLECTIVES if called in continued else ()  # counted where it began
    for parameter in (i for i in fused.values() if i.opcode == "parameter"):
        total += min(read[int(parameter.arguments)], _bytes_read(parameter.name, fused, computations, elsewhere))
    root = next(i for i in fused.values() if i.is_root)
    roots = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for root, result in zip(roots, results, strict=False):
        if root.opcode in ("parameter", *elsewhere):  # handed on as it is
            continue
        root, size = _source(root, fused), _bytes([result], in_memory=True)
        is_update = root.opcode == "dynamic-update-slice"
        total += min(size, _bytes(fused[root.operands[1]].arrays)) if is_update else size
    return total


def _bytes_read(
    name: str, fused: Computation, computations: dict[str, Computation], elsewhere: tuple[str, ...] = ()
) -> float:
    """Bytes of a value that are read inside a fusion, bitcasts and fusions within looked through; infinite where all
    of them are.
    """
    total = 0.0
    for user in fused.values():
        if name not in user.operands or user.opcode in ("tuple", *elsewhere):
            continue
        if user.opcode == "bitcast" and not user.is_root:
            total += _bytes_read(user.name, fused, computations, elsewhere)
        elif user.opcode == "fusion":
            inner, place = computations[user.called("calls")[0]], str(user.operands.index(name))
            own = next(i for i in inner.values() if i.opcode == "parameter" and i.arguments == place)
            total += _bytes_read(own.name, inner, computations)
        elif user.operands[0] == name and user.opcode in _SLICES:
            total += _bytes(user.arrays)
        elif user.operands[0] != name or user.opcode != "dynamic-update-slice":
            return math.inf
    return total
