"""The sample company: its event types, where they are wanted and under which condition, and events to publish.

    modules: sales, finance, inventory, hr, manufacturing, purchasing
    endpoints: crm (one event a request), analytics (batches), warehouse (one event a request, fails now and then)

Rule: pure, and the events follow from the random numbers given, so a test sees the same ones again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from outrider.v1.event_pb2 import Event

TENANT = "demo"
TENANT_DISPLAY_NAME = "Demo Manufacturing Ltd"

SHARE_FAILED = 0.1
"""Of the requests to the endpoint that fails now and then."""


@dataclass(frozen=True, slots=True)
class SampleEndpoint:
    """One endpoint. `batch_linger_ms` None: one event a request. `share_failed`: answered with 503."""

    name: str
    display_name: str
    batch_linger_ms: int | None = None
    share_failed: float = 0.0


@dataclass(frozen=True, slots=True)
class SampleSubscription:
    """One subscription of an endpoint."""

    name: str
    endpoint: str
    types: tuple[str, ...]
    filter: str = ""


ENDPOINTS = (
    SampleEndpoint("crm", "Customer relations"),
    SampleEndpoint("analytics", "Analytics warehouse", batch_linger_ms=200),
    SampleEndpoint("warehouse", "Warehouse floor", share_failed=SHARE_FAILED),
)

SUBSCRIPTIONS = (
    SampleSubscription("large-orders", "crm", ("sales_order.created",), "order.total > 5000"),
    SampleSubscription(
        "export-orders",
        "crm",
        ("sales_order.*",),
        'order.currency != "EUR" && event.organization == "emea"',
    ),
    SampleSubscription(
        "short-terms", "crm", ("invoice.created",), "invoice.due_days <= 14 && invoice.amount > 500"
    ),
    SampleSubscription(
        "key-customers", "crm", ("customer.updated",), 'customer.tier in ["gold", "platinum"]'
    ),
    SampleSubscription("sales", "analytics", ("sales_order.*", "invoice.created")),
    SampleSubscription(
        "payments",
        "analytics",
        ("payment.received",),
        'payment.method == "card" || payment.amount > 10000',
    ),
    SampleSubscription(
        "moves",
        "analytics",
        ("employee.updated",),
        'changed.exists(name, name == "department" || name == "manager")',
    ),
    SampleSubscription(
        "spending",
        "analytics",
        ("purchase_order.approved",),
        'purchase.total > 2500 && purchase.category.startsWith("raw-")',
    ),
    SampleSubscription(
        "reorder",
        "warehouse",
        ("inventory.updated",),
        "inventory.quantity < inventory.reorder_level",
    ),
    SampleSubscription(
        "bulky-orders",
        "warehouse",
        ("sales_order.created",),
        'order.lines.exists(line, line.sku.startsWith("BULK-"))',
    ),
    SampleSubscription(
        "urgent-work", "warehouse", ("work_order.created",), 'work_order.priority == "urgent"'
    ),
    SampleSubscription(
        "arrivals",
        "warehouse",
        ("purchase_order.approved",),
        'has(purchase.deliver_to) && purchase.deliver_to == "dock-7"',
    ),
)

_ORGANIZATIONS = ("emea", "apac", "americas")
_SKUS = ("BOLT-M8", "GEAR-40", "MOTOR-2", "BULK-SAND", "BULK-STEEL", "PUMP-7")
_FIRST_NUMBER = 10_000

_Random = random.Random
_Data = dict[str, Any]


def _amount(chance: _Random, middle: float) -> float:
    return round(chance.lognormvariate(0.0, 1.0) * middle, 2)


def _sales_order(chance: _Random, number: int) -> _Data:
    lines: list[_Data] = [
        {
            "sku": chance.choice(_SKUS),
            "quantity": chance.randint(1, 40),
            "price": _amount(chance, 60),
        }
        for _ in range(chance.randint(1, 4))
    ]
    total = round(sum(line["quantity"] * line["price"] for line in lines), 2)
    currency = chance.choice(("EUR", "EUR", "USD", "GBP"))
    return {
        "order": {
            "number": f"SO-{number}",
            "customer": f"C-{chance.randint(1, 400):04}",
            "currency": currency,
            "total": total,
            "lines": lines,
        }
    }


def _invoice(chance: _Random, number: int) -> _Data:
    return {
        "invoice": {
            "number": f"INV-{number}",
            "customer": f"C-{chance.randint(1, 400):04}",
            "amount": _amount(chance, 1200),
            "due_days": chance.choice((7, 14, 30, 60)),
        }
    }


def _payment(chance: _Random, number: int) -> _Data:
    return {
        "payment": {
            "number": f"PAY-{number}",
            "invoice": f"INV-{max(_FIRST_NUMBER, number - chance.randint(1, 500))}",
            "amount": _amount(chance, 900),
            "method": chance.choice(("card", "transfer", "transfer", "direct_debit")),
        }
    }


def _inventory(chance: _Random, _number: int) -> _Data:
    return {
        "inventory": {
            "sku": chance.choice(_SKUS),
            "site": chance.choice(("plant-1", "plant-2", "dock-7")),
            "quantity": chance.randint(0, 500),
            "reorder_level": 100,
        }
    }


def _employee(chance: _Random, _number: int) -> _Data:
    fields = ("department", "manager", "office", "telephone")
    return {
        "employee": {"id": f"E-{chance.randint(1, 900):04}", "site": "plant-1"},
        "changed": sorted(chance.sample(fields, chance.randint(1, 2))),
    }


def _work_order(chance: _Random, number: int) -> _Data:
    return {
        "work_order": {
            "number": f"WO-{number}",
            "product": chance.choice(_SKUS),
            "quantity": chance.randint(1, 200),
            "priority": chance.choice(("normal", "normal", "normal", "urgent")),
        }
    }


def _purchase_order(chance: _Random, number: int) -> _Data:
    purchase: _Data = {
        "number": f"PO-{number}",
        "supplier": f"S-{chance.randint(1, 60):03}",
        "category": chance.choice(("raw-steel", "raw-sand", "services", "tools")),
        "total": _amount(chance, 2500),
    }
    if chance.random() < 0.5:
        purchase["deliver_to"] = chance.choice(("dock-1", "dock-7"))
    return {"purchase": purchase}


def _customer(chance: _Random, _number: int) -> _Data:
    return {
        "customer": {
            "id": f"C-{chance.randint(1, 400):04}",
            "tier": chance.choice(("basic", "silver", "gold", "platinum")),
        }
    }


@dataclass(frozen=True, slots=True)
class SampleType:
    """One event type; `weight` says how often it comes, `subject` where the data holds what the event is about."""

    name: str
    module: str
    description: str
    weight: int
    make: Callable[[_Random, int], _Data]
    subject: tuple[str, str]


EVENT_TYPES = (
    SampleType(
        "sales_order.created",
        "sales",
        "A sales order was entered.",
        24,
        _sales_order,
        ("order", "number"),
    ),
    SampleType(
        "sales_order.shipped",
        "sales",
        "A sales order left the house.",
        10,
        _sales_order,
        ("order", "number"),
    ),
    SampleType(
        "invoice.created",
        "finance",
        "An invoice was issued.",
        14,
        _invoice,
        ("invoice", "number"),
    ),
    SampleType(
        "payment.received",
        "finance",
        "A payment came in.",
        14,
        _payment,
        ("payment", "number"),
    ),
    SampleType(
        "inventory.updated",
        "inventory",
        "The stock of an article changed.",
        24,
        _inventory,
        ("inventory", "sku"),
    ),
    SampleType(
        "employee.updated",
        "hr",
        "An employee's data changed.",
        3,
        _employee,
        ("employee", "id"),
    ),
    SampleType(
        "work_order.created",
        "manufacturing",
        "A work order was released to the shop floor.",
        6,
        _work_order,
        ("work_order", "number"),
    ),
    SampleType(
        "purchase_order.approved",
        "purchasing",
        "A purchase order was approved.",
        3,
        _purchase_order,
        ("purchase", "number"),
    ),
    SampleType(
        "customer.updated",
        "sales",
        "A customer's master data changed.",
        2,
        _customer,
        ("customer", "id"),
    ),
)
_WEIGHTS = [each.weight for each in EVENT_TYPES]


class SampleEvents:
    """Makes events, one after the other, from `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._number = _FIRST_NUMBER

    def next(self) -> Event:
        """The next event of some type, as often as its weight says."""
        chance = self._chance
        self._number += 1
        kind = chance.choices(EVENT_TYPES, _WEIGHTS)[0]
        return event_of(kind, kind.make(chance, self._number), chance.choice(_ORGANIZATIONS))


def event_of(kind: SampleType, data: Mapping[str, Any], organization: str) -> Event:
    """The event that a module would publish."""
    outer, inner = kind.subject
    subject = str(data[outer][inner])
    return Event(
        type=kind.name,
        source=f"erp/{kind.module}",
        subject=subject,
        key=subject,
        organization=organization,
        data=json.dumps(data, separators=(",", ":")).encode(),
    )


def sample_of(kind: SampleType) -> str:
    """An example of the type's data, the same at every start."""
    return json.dumps(kind.make(random.Random(0), _FIRST_NUMBER), indent=2)  # noqa: S311 - a sample


EXAMPLE_TO_PUBLISH = {
    "type": "sales_order.created",
    "source": "erp/sales",
    "organization": "emea",
    "dataJson": json.dumps(
        {"order": {"number": "SO-1", "currency": "USD", "total": 12500, "lines": []}},
        separators=(",", ":"),
    ),
}
"""For a person to paste: two subscriptions of the crm endpoint want it, and one of analytics."""
