"""Random filters and hostile events for differential tests. Every choice comes from the generator that is passed in."""

from __future__ import annotations

from random import Random

NUMBERS: tuple[object, ...] = (
    0, 1, -1, 2, 100, 99.5, 100.0, -0.0, 0.5, 3, 2**53 - 1, 2**53, 2**53 + 1, float(2**53), -(2**53) - 1,
    -(2**63), 2**63 - 1, 2**63, 2**64 - 1, float(2**63), float(-(2**63)), 1e300, 5e-324, 1234567.0,
)  # fmt: skip
STRINGS: tuple[object, ...] = (
    "", "a", "A1", "draft", "é", "\U0001f600x", "12", " 7 ", "true", "1h", "-1.5s", "2026-01-02T03:04:05Z",
    "line\nbreak", "zzz", "a.b", "0x1F", "1e3", "t", "\ufffd",
)  # fmt: skip
FIELDS = ("a", "b", "c", "type", "items", "n")
LOOPS = ("i", "j", "a")


def value(random: Random, depth: int = 0) -> object:
    """Any JSON value as orjson would give it."""
    kind = random.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return random.choice((None, True, False))
    if kind in (1, 2):
        return random.choice(NUMBERS)
    if kind in (3, 4):
        return random.choice(STRINGS)
    if kind in (5, 6):
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    return document(random, depth + 1)


def document(random: Random, depth: int = 0) -> dict[str, object]:
    """A JSON object in which any field may be missing."""
    return {name: value(random, depth) for name in FIELDS if random.random() < 0.75}


class FilterWriter:
    """Writes random filter texts; many are refused by the checker, which is fine."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._loops: list[str] = []

    def boolean(self, depth: int) -> str:
        r = self._random
        if depth <= 0:
            return r.choice(
                (
                    "true",
                    "false",
                    self.path(),
                    f"{self.path()} == {self.literal()}",
                    f"has({self.path(select=True)})",
                )
            )
        d = depth - 1
        kind = r.randrange(18)
        if kind < 2:
            return f"({self.boolean(d)} && {self.boolean(d)})"
        if kind < 4:
            return f"({self.boolean(d)} || {self.boolean(d)})"
        if kind == 4:
            return f"!({self.boolean(d)})"
        if kind == 5:
            return f"({self.boolean(d)} ? {self.boolean(d)} : {self.boolean(d)})"
        if kind < 8:
            return f"({self.any(d)} {r.choice(('==', '!='))} {self.any(d)})"
        if kind < 11:
            return f"({self.any(d)} {r.choice(('<', '<=', '>', '>='))} {self.any(d)})"
        if kind == 11:
            return f"({self.any(d)} in {r.choice((self.list(d), self.path()))})"
        if kind == 12:
            test = r.choice(("startsWith", "endsWith", "contains"))
            return f"{self.receiver(d)}.{test}({self.any(d)})"
        if kind == 13:
            pattern = r.choice(("^A", "a$", "^a$", "[0-9]+", ".*", "^.$", "a.b", "(?i)Z", ""))
            return f"{self.receiver(d)}.matches('{pattern}')"
        if kind == 14:
            return f"has({self.path(select=True)})"
        if kind == 15:
            return f"(type({self.any(d)}) == {r.choice(('int', 'double', 'string', 'uint', 'map', 'list'))})"
        return self.macro(d, r.choice(("exists", "all", "exists_one")))

    def macro(self, depth: int, kind: str) -> str:
        place = self._random.choice((self.path(), self.list(depth)))
        name = self._random.choice(LOOPS)
        self._loops.append(name)
        if kind == "map":
            body = self.any(depth)
            if self._random.random() < 0.3:
                body = f"{self.boolean(depth)}, {body}"
        else:
            body = self.boolean(depth)
        self._loops.pop()
        return f"{place}.{kind}({name}, {body})"

    def any(self, depth: int) -> str:
        r = self._random
        if depth <= 0:
            return r.choice((self.path(), self.path(), self.literal()))
        d = depth - 1
        kind = r.randrange(14)
        if kind < 4:
            return self.path()
        if kind < 6:
            return self.literal()
        if kind < 8:
            return f"({self.any(d)} {r.choice(('+', '-', '*', '/', '%'))} {self.any(d)})"
        if kind == 8:
            call = r.choice(
                (
                    "size",
                    "int",
                    "double",
                    "string",
                    "bool",
                    "uint",
                    "dyn",
                    "-",
                    "timestamp",
                    "duration",
                )
            )
            return f"{call}({self.any(d)})"
        if kind == 9:
            return f"{self.path()}[{self.any(d)}]"
        if kind == 10:
            return f"({self.boolean(d)} ? {self.any(d)} : {self.any(d)})"
        if kind == 11:
            return self.list(d)
        if kind == 12:
            return self.macro(d, r.choice(("map", "filter")))
        return f"({self.boolean(d)})"

    def list(self, depth: int) -> str:
        return f"[{', '.join(self.any(depth - 1) for _ in range(self._random.randrange(4)))}]"

    def receiver(self, depth: int) -> str:
        return self._random.choice(
            (self.path(), f"string({self.any(depth)})", "event.type", "dyn(1)")
        )

    def path(self, *, select: bool = False) -> str:
        r = self._random
        root = (
            r.choice(self._loops)
            if self._loops and r.random() < 0.5
            else r.choice((*FIELDS, "data"))
        )
        steps = r.randrange(1, 3) if select else r.randrange(3)
        return root + "".join(f".{r.choice(FIELDS)}" for _ in range(steps))

    def literal(self) -> str:
        return self._random.choice((
            "1", "0", "-1", "100", "99.5", "2u", "9007199254740993", "9007199254740992.0", "9223372036854775807",
            "-9223372036854775808", "1e300", "'draft'", "'a'", "''", "'\\u00e9'", "true", "false", "null", "b'a'",
            "18446744073709551615u", "event.type", "event.time", "event.attributes", "event.attributes.k",
            "duration('1h')", "timestamp('2026-01-02T03:04:05Z')", "{'a': 1}",
        ))  # fmt: skip
