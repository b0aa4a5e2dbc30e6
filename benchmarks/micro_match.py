"""How long matching takes: one filter, a tenant's index, the registration of a filter, the worst that is accepted.

    python benchmarks/micro_match.py [--repeat 7]

CPU time of this thread, best of several runs, one core. Seeded; prints a table, checks nothing.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable

import orjson

from outrider_server.domain.event import NewEvent
from outrider_server.domain.subscription import Subscription
from outrider_server.matching import engine
from outrider_server.matching.filter import check_filter
from outrider_server.matching.index import Index
from outrider_server.matching.predicate import load_predicate
from outrider_server.matching.runtime import OverBudget

FILTERS = (
    'order.total > 100 && order.status != "draft"',
    'type == "sales_order.created" && customer.country in ["MY","SG"]',
    'items.exists(i, i.sku.startsWith("A") && i.qty > 10)',
    'name.matches("^A.*z$")',
)
HOSTILE = (
    "a.all(i, a.all(j, i == j || true))",
    "a.all(i, data == data)",
    "a.all(i, t.matches('(x+x+)+y') || true)",
    "a.all(i, t.contains('y') || true)",
    "a.map(i, [t, t, t]).exists(l, l == a)",
    " || ".join(["data == 1 || b == b"] * 20),
    " || ".join(["t.matches('(x|y)*z{9}')"] * 60),
    "a.exists(i, a.exists(j, " + " || ".join(["string(i) == string(j + 0.5)"] * 20) + "))",
)


def microseconds(run: Callable[[], object], repeat: int) -> float:
    """Best CPU time of one call."""
    count = 1
    while True:
        start = time.thread_time()
        for _ in range(count):
            run()
        taken = time.thread_time() - start
        if taken > 0.02 or count > 1_000_000:
            break
        count *= 4
    best = taken / count
    for _ in range(repeat - 1):
        start = time.thread_time()
        for _ in range(count):
            run()
        best = min(best, (time.thread_time() - start) / count)
    return best * 1e6


def event(event_type: str) -> NewEvent:
    """An envelope; the payload is given apart."""
    return NewEvent(tenant=1, type=event_type, data=b"", time_us=1_767_323_045_678_901)


def document(source: random.Random) -> dict[str, object]:
    """An order of about 600 bytes."""
    made: dict[str, object] = {
        "type": "sales_order.created",
        "name": "Abcdez",
        "order": {
            "total": source.randrange(300),
            "status": source.choice(("open", "draft")),
            "lines": 3,
        },
        "customer": {
            "country": source.choice(("MY", "SG", "DE")),
            "id": f"C{source.randrange(5000)}",
        },
        "items": [
            {"sku": f"{source.choice('ABC')}{n}", "qty": n * 4, "price": 9.5} for n in range(4)
        ],
    }
    made |= {f"field_{n}": f"value {n}" for n in range(12)}
    return made


def tenant(subscriptions: int, types: int) -> Index:
    """Subscriptions spread over exact types, each with a filter of its own threshold."""
    made = []
    for number in range(subscriptions):
        text = f'order.total > {100 + number} && order.status != "draft"'
        made.append(
            Subscription(
                id=number,
                tenant=1,
                name=f"s{number}",
                endpoint=1,
                types=(f"sales.type_{number % types}",),
                filter_text=text,
                filter_ast=check_filter(text).ast,
            )
        )
    return Index.build(made)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    source = random.Random(1)
    one = document(source)
    one["order"] = {"total": 150, "status": "open"}
    envelope = event("sales_order.created")

    print("one filter, microseconds an evaluation: generated, C++ engine through its binding")
    for text in FILTERS:
        ast = check_filter(text).ast
        test = load_predicate(ast).test
        expression = engine.load(ast, set(one))
        variables = engine.variables_of(set(one), one, one, envelope)
        generated = microseconds(lambda: test(one, one, envelope), repeat)  # noqa: B023
        native = microseconds(lambda: engine.evaluate(expression, variables), repeat)  # noqa: B023
        print(f"  {generated:7.3f} {native:7.2f}   {text}")

    print("a tenant's index, microseconds an event from a parsed document")
    for subscriptions, types in ((25, 25), (100, 25), (1000, 25), (1000, 250)):
        index = tenant(subscriptions, types)
        gc.freeze()
        events = [(event(f"sales.type_{n % types}"), document(source)) for n in range(64)]

        def all_events() -> None:
            for which, payload in events:  # noqa: B023
                index.match(which, payload)  # noqa: B023

        print(
            f"  {microseconds(all_events, repeat) / 64:7.2f}   {subscriptions} subscriptions, {types} types"
        )
    index = tenant(100, 25)
    unknown = event("sales.unknown.kind")
    print(f"  {microseconds(lambda: index.match(unknown, one), repeat):7.2f}   a type nobody wants")
    text_of_one = orjson.dumps(one)
    print(
        f"  {microseconds(lambda: orjson.loads(text_of_one), repeat):7.2f}   (orjson.loads of {len(text_of_one)} bytes)"
    )

    print("registering and loading a filter, microseconds")
    for text in FILTERS:
        ast = check_filter(text).ast
        check = microseconds(lambda: check_filter(text), repeat)  # noqa: B023
        load = microseconds(lambda: load_predicate(ast), repeat)  # noqa: B023
        print(f"  check {check:6.0f}  load {load:6.0f}   {len(ast)} bytes of AST   {text}")

    print("hostile filters on a 256 KiB event, milliseconds an evaluation")
    hostile: dict[str, object] = {
        "a": [n + 0.25 for n in range(1000)],
        "t": "x" * 120_000,
        "b": [[n] * 20 for n in range(1000)],
    }
    small: dict[str, object] = {
        "a": [n + 0.25 for n in range(99)],
        "t": "x" * 120_000,
        "b": [[n] * 20 for n in range(1000)],
    }
    for text in HOSTILE:
        test = load_predicate(check_filter(text).ast).test
        worst, over = 0.0, False
        for payload in (hostile, small):
            start = time.thread_time()
            try:
                test(payload, payload, envelope)
            except OverBudget:
                over = True
            worst = max(worst, time.thread_time() - start)
        print(f"  {worst * 1e3:7.2f} {'over budget' if over else '':12} {text[:70]}")


if __name__ == "__main__":
    main()
