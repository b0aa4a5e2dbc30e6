"""The tables of `outrider-server nodes`: who holds what, with windows, owed deliveries and lag."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from outrider_server.policy.assignment import NodeView
from outrider_server.storage.holdings import Holding

NOBODY = "(nobody)"


def by_node(nodes: Sequence[NodeView], holdings: Sequence[Holding]) -> Iterator[str]:
    """A line a node, also for shards that are nobody's."""
    yield (
        f"{'node':<24}{'address':<22}{'lease':>10}{'shards':>8}{'window':>10}{'owed':>12}{'held back':>11}{'lag':>9}"
    )
    names = [node.name for node in nodes]
    known = {node.name: node for node in nodes}
    names += sorted({h.node or NOBODY for h in holdings} - set(names))
    for name in names:
        own = [h for h in holdings if (h.node or NOBODY) == name]
        node = known.get(name)
        yield (
            f"{name:<24}{node.address if node else '-':<22}{_lease(node):>10}{len(own):>8}"
            f"{sum(h.window for h in own):>10}{sum(h.owed for h in own):>12}"
            f"{sum(h.held_back for h in own):>11}{_lag(own):>9}"
        )


def by_shard(holdings: Iterable[Holding]) -> Iterator[str]:
    """A line a shard."""
    yield (
        f"{'shard':>5}  {'node':<24}{'epoch':>8}{'window':>10}{'owed':>12}{'held back':>11}{'lag':>9}"
    )
    for each in holdings:
        yield (
            f"{each.shard:>5}  {each.node or NOBODY:<24}{each.epoch:>8}{each.window:>10}{each.owed:>12}"
            f"{each.held_back:>11}{_lag([each]):>9}"
        )


def _lease(node: NodeView | None) -> str:
    if node is None or not node.live:
        return "over"
    return "draining" if node.draining else f"{node.seconds:.1f} s"


def _lag(holdings: Iterable[Holding]) -> str:
    lags = [h.lag_seconds for h in holdings if h.lag_seconds is not None]
    return f"{max(lags):.1f} s" if lags else "-"
