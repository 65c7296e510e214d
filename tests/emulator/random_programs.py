"""Random PTX programs, and a slow interpreter that runs them lane by lane on Python's integers.

A program is a list of `Op`, which print themselves as PTX; `Interpreter` executes the same list and shares no
code with the emulator. Every thread has 16 bytes of shared and of local memory to itself; it reads another's
only between barriers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SLOT = 16
REGISTERS = {"r": (32, 6), "h": (16, 4), "d": (64, 4)}
NAMES = [f"{kind}{i}" for kind, (_, count) in REGISTERS.items() for i in range(count)]
PREDICATES = [f"p{i}" for i in range(4)]
# Stored for each thread at the end; in front of them all threads add to two sums.
WORDS = len(NAMES) + len(PREDICATES)
SUMS = 2
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True)
class Op:
    """One step of a program.

    Args:
        name: "label", "bra", "brx", "ret", "bar", "shfl", "load", "store", "red", or an opcode of `_VALUES`.
        type: PTX type, space, comparison or mode, as the name needs it.
        to: register written, or label.
        sources: registers, integers or labels.
        guard: predicate, with "!" in front if negated.
    """

    name: str
    type: str = ""
    to: str = ""
    sources: tuple[str | int, ...] = ()
    guard: str = ""

    def text(self, number: int) -> str:
        """PTX lines; `number` makes names unique."""
        sign, name = ("!", self.guard[1:]) if self.guard.startswith("!") else ("", self.guard)
        guard = f"@{sign}%{name} " if name else ""
        sources = [s if isinstance(s, int) else f"%{s}" for s in self.sources]
        match self.name:
            case "label":
                return f"{self.to}:"
            case "bra":
                return f" {guard}bra {self.to};"
            case "brx":
                index, *labels = self.sources
                table = f" T{number}: .branchtargets {', '.join(labels)};\n"
                return f"{table} and.b32 %t0, %{index}, {len(labels) - 1};\n {guard}brx.idx %t0, T{number};"
            case "ret":
                return f" {guard}ret;"
            case "bar":
                return " bar.sync 0;"
            case "shfl":
                clamp = 0 if self.type == "up" else 31
                return f" shfl.sync.{self.type}.b32 %{self.to}, {sources[0]}, {sources[1]}, {clamp}, -1;"
            case "red":
                return f" {guard}red.global.add.u64 [%sums+{8 * sources[0]}], {sources[1]};"
            case "load" | "store":
                return self._access(guard, sources)
            case "setp":
                return f" {guard}setp.{self.type} %{self.to}, {sources[0]}, {sources[1]};"
        return f" {guard}{self.name}.{self.type} %{self.to}, {', '.join(map(str, sources))};"

    def _access(self, guard: str, sources: list) -> str:
        """An element of a slot: this thread's, or that of the one so many behind it. A lane whose guard is
        false has an address that is nobody's."""
        space, bits = self.type.split(".b")
        size = int(bits) // 8
        lines = [f"and.b32 %t0, {sources[0]}, {SLOT // size - 1}", f"mul.lo.u32 %t0, %t0, {size}"]
        if space == "local":
            lines += ["cvt.u64.u32 %a0, %t0", "mov.u64 %a1, depot", "add.s64 %a0, %a0, %a1"]
        else:
            last = 1 if self.name == "load" else 2
            whose = [f"add.u32 %t1, %tid0, {by}; rem.u32 %t1, %t1, %count" for by in sources[last:]]
            lines += whose or ["mov.u32 %t1, %tid0"]
            lines += [f"mad.lo.u32 %t0, %t1, {SLOT}, %t0", "mov.u32 %t1, smem", "add.u32 %t0, %t0, %t1"]
        address = "%a0" if space == "local" else "%t0"
        if guard:
            sign, name = ("!", self.guard[1:]) if self.guard[0] == "!" else ("", self.guard)
            width, wild = ("64", "0x1234567890123") if space == "local" else ("32", "0x7ffffff3")
            ways = f"{wild}, {address}" if sign else f"{address}, {wild}"
            lines.append(f"selp.b{width} {address}, {ways}, %{name}")
        value = f"%{self.to}" if self.name == "load" else sources[1]
        if self.name == "load":
            last = f"{guard}ld.{space}.b{bits} {value}, [{address}]"
        else:
            last = f"{guard}st.{space}.b{bits} [{address}], {value}"
        return "\n".join(f" {line};" for line in [*lines, last])


def width(register: str) -> int:
    return REGISTERS[register[0]][0]


# The interpreter -------------------------------------------------------------------------------------------


def _typed(value: int, type_: str) -> int:
    """The low bits of a value as a number of a type such as u16, s32, b64."""
    bits = int(type_[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if type_[0] == "s" and value >> bits - 1 else value


def _shift(value: int, by: int, type_: str, left: bool) -> int:
    by = min(by, int(type_[1:]))
    return value << by if left else value >> by


_VALUES = {
    "add": lambda t, a, b: a + b,
    "sub": lambda t, a, b: a - b,
    "mul.lo": lambda t, a, b: a * b,
    "mul.hi": lambda t, a, b: a * b >> int(t[1:]),
    "mad.lo": lambda t, a, b, c: a * b + c,
    "min": lambda t, a, b: min(a, b),
    "max": lambda t, a, b: max(a, b),
    "and": lambda t, a, b: a & b,
    "or": lambda t, a, b: a | b,
    "xor": lambda t, a, b: a ^ b,
    "not": lambda t, a: ~a,
    "neg": lambda t, a: -a,
    "mov": lambda t, a: a,
    "shl": lambda t, a, b: _shift(a, b, t, True),
    "shr": lambda t, a, b: _shift(a, b, t, False),
    "selp": lambda t, a, b, p: a if p else b,
}
_COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


class Interpreter:
    """Runs a program for one CTA, one thread after the other up to where they wait for each other.

    Args:
        program: its steps.
        threads: of the CTA.
        sums: what all threads add to.
    """

    def __init__(self, program: list[Op], threads: int, sums: list[int]) -> None:
        self.program, self.threads, self.sums = program, threads, sums
        self.labels = {op.to: i for i, op in enumerate(program) if op.name == "label"}
        self.shared = bytearray(SLOT * threads)
        self.steps = 0

    def run(self, start: list[dict[str, int]]) -> list[dict[str, int] | None]:
        """Registers of each thread at the end, None for one that returned before."""
        results: list[dict[str, int] | None] = [None] * self.threads
        threads = {t: self._thread(t, dict(start[t]), results) for t in range(self.threads)}
        asked: dict[int, tuple] = {}
        given: dict[int, int | None] = dict.fromkeys(threads)
        while threads:
            for t in list(given):
                try:
                    asked[t] = threads[t].send(given.pop(t))
                except StopIteration:
                    del threads[t]
            if all(asked[t][0] == "bar" for t in threads):
                given = dict.fromkeys(threads)
                continue
            # A warp at a shuffle is there with all its lanes, since shuffles are where lanes are together.
            values = {t: asked[t] for t in threads if asked[t][0] == "shfl"}
            given = {t: self._shuffled(t, values) for t in values}
        return results

    def _shuffled(self, thread: int, asked: dict[int, tuple]) -> int:
        _, mode, value, by = asked[thread]
        lane = thread % 32
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": by}[mode]
        other = thread - lane + source
        return asked[other][2] if 0 <= source < 32 and other in asked else value

    def _thread(self, thread: int, have: dict[str, int], results: list) -> Iterator[tuple]:
        local = bytearray(SLOT)
        at = 0
        while at < len(self.program):
            op = self.program[at]
            at += 1
            self.steps += 1
            if op.guard and bool(have[op.guard.strip("!")]) == op.guard.startswith("!"):
                continue
            match op.name:
                case "label":
                    pass
                case "bra":
                    at = self.labels[op.to]
                case "brx":
                    at = self.labels[op.sources[1:][have[op.sources[0]] & len(op.sources) - 2]]
                case "ret":
                    return
                case "bar":
                    yield ("bar",)
                case "shfl":
                    have[op.to] = yield ("shfl", op.type, have[op.sources[0]], op.sources[1])
                case "red":
                    self.sums[op.sources[0]] += have[op.sources[1]]
                case "load" | "store":
                    self._access(op, thread, have, local)
                case _:
                    self._compute(op, have)
        results[thread] = have

    def _access(self, op: Op, thread: int, have: dict[str, int], local: bytearray) -> None:
        space, bits = op.type.split(".b")
        size = int(bits) // 8
        offset = have[op.sources[0]] % (SLOT // size) * size
        memory = local
        if space == "shared":
            (by,) = op.sources[1 if op.name == "load" else 2 :] or (0,)
            memory, offset = self.shared, offset + (thread + by) % self.threads * SLOT
        if op.name == "load":
            have[op.to] = int.from_bytes(memory[offset : offset + size], "little")
        else:
            memory[offset : offset + size] = have[op.sources[1]].to_bytes(size, "little")

    def _compute(self, op: Op, have: dict[str, int]) -> None:
        raw = [have[s] if isinstance(s, str) else s for s in op.sources]
        if op.name == "setp":
            comparison, type_ = op.type.split(".")
            have[op.to] = int(_COMPARE[comparison](*(_typed(v, type_) for v in raw)))
            return
        if op.name == "cvt":
            to, source = op.type.split(".")
            have[op.to] = _typed(_typed(raw[0], source), "u" + to[1:])
            return
        type_ = op.type
        values = [_typed(v, type_) for v in raw]
        if op.name in ("shl", "shr"):
            values[1] = raw[1] & 0xFFFFFFFF
        if op.name == "selp":
            values[2] = raw[2]
        have[op.to] = _typed(_VALUES[op.name](type_, *values), "u" + type_[1:])


# The generator ---------------------------------------------------------------------------------------------


class Generator:
    """Makes one program.

    Args:
        seed: of its choices.
        exits: threads may return before the end; then there are no shuffles, which would read from them.
        whole: all warps have 32 threads.
    """

    def __init__(self, seed: int, exits: bool, whole: bool) -> None:
        self.dice = random.Random(seed)
        self.exits, self.whole = exits, whole
        self.program: list[Op] = []
        self.labels = 0

    def structured(self, size: int) -> list[Op]:
        """Branches and loops within each other, with barriers and shuffles where all threads are together."""
        self._statements(size, True, 0)
        return self.program

    def unstructured(self, blocks: int, fuel: int) -> list[Op]:
        """Blocks that jump anywhere, also into the middle of loops, until a thread has no fuel."""
        names = [f"B{i}" for i in range(blocks)]
        self._add("mov", "u32", "fuel", (fuel,))
        for name in names:
            self._add("label", to=name)
            self._add("sub", "s32", "fuel", ("fuel", 1))
            self._add("setp", "le.s32", "q0", ("fuel", 0))
            self._add("bra", to="END", guard="q0")
            for _ in range(self.dice.randrange(4)):
                self._simple()
            self._jump(names)
        self._add("label", to="END")
        return self.program

    def _jump(self, names: list[str]) -> None:
        kind = self.dice.randrange(6)
        if kind < 3:
            self._add("bra", to=self.dice.choice(names), guard=self._predicate())
        elif kind == 3:
            targets = [self.dice.choice(names) for _ in range(self.dice.choice((2, 4)))]
            self._add("brx", sources=(self._register("r"), *targets), guard=self._perhaps())
        elif kind == 4 and self.exits:
            self._add("ret", guard=self._predicate())

    def _add(self, name: str, type_: str = "", to: str = "", sources: tuple = (), guard: str = "") -> None:
        self.program.append(Op(name, type_, to, sources, guard))

    def _label(self) -> str:
        self.labels += 1
        return f"L{self.labels}"

    def _register(self, kinds: str = "rrrhd") -> str:
        kind = self.dice.choice(kinds)
        return f"{kind}{self.dice.randrange(REGISTERS[kind][1])}"

    def _predicate(self) -> str:
        return self.dice.choice(("", "!")) + self.dice.choice(PREDICATES)

    def _perhaps(self) -> str:
        """A guard for some."""
        return self._predicate() if self.dice.random() < 0.3 else ""

    def _statements(self, count: int, together: bool, depth: int) -> None:
        for _ in range(count):
            kind = self.dice.randrange(20)
            if kind < 3 and depth < 4:
                self._if(count // 2 + 1, together, depth)
            elif kind < 5 and depth < 3:
                self._loop(count // 2 + 1, together, depth)
            elif kind < 6 and depth < 4:
                self._switch(count // 2 + 1, depth)
            elif kind < 8 and together:
                self._together()
            elif kind == 8 and self.exits and not self.dice.randrange(3):
                self._add("ret", guard=self._predicate())
            else:
                self._simple()

    def _condition(self, together: bool) -> str:
        """A predicate; for statements that threads enter together one that is the same for all."""
        if not together:
            return self._predicate()
        self._add("setp", f"{self.dice.choice(_COMPARISONS)}.u32", "same", ("ctaid", self.dice.randrange(3)))
        return self.dice.choice(("same", "!same"))

    def _if(self, count: int, together: bool, depth: int) -> None:
        together = together and self.dice.random() < 0.3
        other, end = self._label(), self._label()
        self._add("bra", to=other, guard=self._condition(together))
        self._statements(self.dice.randint(1, count), together, depth + 1)
        self._add("bra", to=end)
        self._add("label", to=other)
        self._statements(self.dice.randrange(count), together, depth + 1)
        self._add("label", to=end)

    def _loop(self, count: int, together: bool, depth: int) -> None:
        """At most seven turns, with a break and a continue in the middle of some."""
        together = together and self.dice.random() < 0.3
        start, on, end = self._label(), self._label(), self._label()
        counter, done = f"n{depth}", f"q{depth}"
        self._add("and", "b32", counter, ("ctaid" if together else self._register("r"), 7))
        self._add("label", to=start)
        self._add("setp", "eq.u32", done, (counter, 0))
        self._add("bra", to=end, guard=done)
        self._statements(self.dice.randint(1, count), together, depth + 1)
        for target in (on, end):
            if not together and self.dice.random() < 0.5:
                self._add("bra", to=target, guard=self._predicate())
                self._statements(1, False, depth + 1)
        self._add("label", to=on)
        self._add("sub", "u32", counter, (counter, 1))
        self._add("bra", to=start)
        self._add("label", to=end)

    def _switch(self, count: int, depth: int) -> None:
        ways, end = [self._label() for _ in range(self.dice.choice((2, 4)))], self._label()
        self._add("brx", sources=(self._register("r"), *ways), guard=self._perhaps())
        for way in ways:
            self._add("label", to=way)
            self._statements(self.dice.randrange(count), False, depth + 1)
            if self.dice.random() < 0.7:
                self._add("bra", to=end)
        self._add("label", to=end)

    def _together(self) -> None:
        """Threads tell each other something."""
        if not self.exits and self.dice.random() < 0.5:
            mode = self.dice.choice(("up", "down", "bfly", "idx"))
            # A thread must not read from one that does not exist.
            by = self.dice.randrange(32) if self.whole or mode == "up" else 0
            self._add("shfl", mode, self._register("r"), (self._register("r"), by))
            return
        self._add("bar")
        where = (self._register("r"), self.dice.randrange(70))
        self._add("load", "shared.b32", self._register("r"), where)
        self._add("bar")

    def _simple(self) -> None:
        guard = self._perhaps()
        kind = self.dice.randrange(12)
        if kind < 6:
            self._arithmetic(guard)
        elif kind < 8:
            register = self._register()
            type_ = f"{self.dice.choice('us')}{width(register)}"
            other = self._register(register[0])
            to = self.dice.choice(PREDICATES)
            self._add("setp", f"{self.dice.choice(_COMPARISONS)}.{type_}", to, (register, other), guard)
        elif kind == 8:
            to, source = self._register(), self._register()
            signs = [self.dice.choice("us") for _ in range(2)]
            self._add("cvt", f"{signs[0]}{width(to)}.{signs[1]}{width(source)}", to, (source,), guard)
        elif kind == 9:
            self._add("red", "", "", (self.dice.randrange(SUMS), self._register("d")), guard)
        else:
            register, space = self._register(), self.dice.choice(("shared", "local"))
            type_, index = f"{space}.b{width(register)}", self._register("r")
            if self.dice.random() < 0.5:
                self._add("load", type_, register, (index,), guard)
            else:
                self._add("store", type_, "", (index, register), guard)

    def _arithmetic(self, guard: str) -> None:
        name = self.dice.choice(list(_VALUES))
        to = self._register()
        kind, bits = to[0], width(to)
        logic = name in ("and", "or", "xor", "not", "mov", "shl", "selp")
        type_ = f"b{bits}" if logic else f"{self.dice.choice('us')}{bits}"
        if name == "neg":
            type_ = f"s{bits}"
        count = {"not": 1, "neg": 1, "mov": 1, "mad.lo": 3}.get(name, 2)
        sources: list[str | int] = [self._register(kind) for _ in range(count)]
        if name in ("shl", "shr"):
            sources[1] = self._register("r") if self.dice.random() < 0.2 else self.dice.randrange(70)
        elif count == 2 and self.dice.random() < 0.3:
            sources[1] = self.dice.randrange(-5, 6)
        if name == "selp":
            sources.append(self.dice.choice(PREDICATES))
        self._add(name, type_, to, tuple(sources), guard)


# Around it -------------------------------------------------------------------------------------------------

_DECLARED = "".join(f" .reg .b{bits} %{kind}<{count}>;" for kind, (bits, count) in REGISTERS.items())
_PROLOGUE = f"""
.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 x, .param .u64 y)
{{
{_DECLARED}
 .reg .pred %p<4>; .reg .pred %q<4>; .reg .pred %same; .reg .b32 %n<4>; .reg .b32 %t<3>; .reg .b64 %a<2>;
 .reg .b32 %tid0, %count, %ctaid, %fuel; .reg .b64 %sums, %mine;
 .local .align 16 .b8 depot[{SLOT}];
 mov.u32 %t0, %ntid.x; mov.u32 %t1, %ntid.y; mul.lo.u32 %count, %t0, %t1;
 mov.u32 %t1, %ntid.z; mul.lo.u32 %count, %count, %t1;
 mov.u32 %tid0, %tid.z; mov.u32 %t1, %ntid.y; mov.u32 %t2, %tid.y; mad.lo.u32 %tid0, %tid0, %t1, %t2;
 mov.u32 %t2, %tid.x; mad.lo.u32 %tid0, %tid0, %t0, %t2;
 mov.u32 %ctaid, %ctaid.x; mov.u32 %fuel, 0;
 mad.lo.u32 %t0, %ctaid, %count, %tid0;
 ld.param.u64 %a0, [x]; mad.wide.u32 %a0, %t0, {8 * len(NAMES)}, %a0;
 ld.param.u64 %sums, [y]; mad.wide.u32 %mine, %t0, {8 * WORDS}, %sums; add.s64 %mine, %mine, {8 * SUMS};
 mov.u64 %a1, 0; st.local.v2.b64 [depot], {{%a1, %a1}};
 mov.u32 %t1, smem; mad.lo.u32 %t0, %tid0, {SLOT}, %t1; st.shared.v2.b64 [%t0], {{%a1, %a1}};
"""


def start_of(values: list[int]) -> dict[str, int]:
    """Registers of a thread at the start, from a value for each of NAMES."""
    have = {name: value & (1 << width(name)) - 1 for name, value in zip(NAMES, values, strict=True)}
    return have | {name: have["r0"] >> i & 1 for i, name in enumerate(PREDICATES)}


def words_of(have: dict[str, int]) -> list[int]:
    """What a thread stores at the end, as int64."""
    return [_typed(have[name], "s64") for name in (*NAMES, *PREDICATES)]


def kernel(program: list[Op]) -> str:
    """A module with kernel `k`: x is int64 (threads, NAMES), y is int64, SUMS, then WORDS of each thread."""
    lines = [_PROLOGUE]
    for i, name in enumerate(NAMES):
        bits = width(name)
        lines.append(f" ld.global.b64 %a1, [%a0+{8 * i}]; " + _convert(f"%{name}", bits, "%a1", 64))
    for i, name in enumerate(PREDICATES):
        lines.append(f" and.b32 %t0, %r0, {1 << i}; setp.ne.u32 %{name}, %t0, 0;")
    lines.append(" bar.sync 0;")
    lines += [op.text(number) for number, op in enumerate(program)]
    for i, name in enumerate(NAMES):
        lines.append(f" {_convert('%a0', 64, f'%{name}', width(name))} st.global.b64 [%mine+{8 * i}], %a0;")
    for i, name in enumerate(PREDICATES, len(NAMES)):
        lines.append(f" selp.b64 %a0, 1, 0, %{name}; st.global.b64 [%mine+{8 * i}], %a0;")
    return "\n".join([*lines, " ret;", "}"])


def _convert(to: str, bits: int, source: str, source_bits: int) -> str:
    return (
        f"mov.b64 {to}, {source};" if bits == source_bits else f"cvt.u{bits}.u{source_bits} {to}, {source};"
    )
