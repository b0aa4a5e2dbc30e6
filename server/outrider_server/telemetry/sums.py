"""The metrics of several nodes as those of one: their expositions read, added up, and written again.

Counters, histograms and most levels are added. Where a sum would say nothing, `SMALLEST` and `LARGEST` name what is
taken instead. It reads what `telemetry.metrics` writes; a text that is not of that form is a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from typing_extensions import override

SMALLEST = frozenset(
    {
        "outrider_lease_remaining_seconds",
        "outrider_free_disk_bytes",
        "process_start_time_seconds",
        "process_max_fds",
    }
)
"""Levels of which the lowest is what matters."""

LARGEST = frozenset({"outrider_window_seconds"})
"""Levels of which the highest is what matters."""

_Key = tuple[str, tuple[tuple[str, str], ...]]


def read(text: str) -> list[Metric]:
    """The families of an exposition. Raises ValueError."""
    try:
        return list(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"no exposition: {error}") from None


def add_up(expositions: Iterable[Sequence[Metric]]) -> list[Metric]:
    """One family of each name over all expositions, in the order in which they are first met.

    A family that has another type somewhere, as during a change of versions, counts as it was first met.
    """
    families: dict[str, Metric] = {}
    values: dict[str, dict[_Key, float]] = {}
    for exposition in expositions:
        for family in exposition:
            if family.name not in families:
                families[family.name] = Metric(family.name, family.documentation, family.type)
                values[family.name] = {}
            if families[family.name].type == family.type:
                _add(values[family.name], family)
    for name, family in families.items():
        family.samples = [
            Sample(sample, dict(labels), value) for (sample, labels), value in values[name].items()
        ]
    return list(families.values())


def write(families: Sequence[Metric], accept: str = "") -> tuple[bytes, str]:
    """The exposition and its content type, in the form that an Accept header asks for."""
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(_Given(families))
    return encode(registry), content_type


def _add(values: dict[_Key, float], family: Metric) -> None:
    for sample in family.samples:
        key = (sample.name, tuple(sample.labels.items()))
        before = values.get(key)
        if before is None:
            values[key] = sample.value
        elif family.name in SMALLEST:
            values[key] = min(before, sample.value)
        elif family.name in LARGEST:
            values[key] = max(before, sample.value)
        else:
            values[key] = before + sample.value


class _Given(Collector):
    """Families that are there already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._families
