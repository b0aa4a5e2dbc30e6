"""Jobs of the owner: owed rows of deleted subscriptions are cancelled page by page, each page in a record.

Memory learns of a deletion at once; the rows, of which there may be millions, follow here without haste.
"""

from __future__ import annotations

import asyncio

from outrider_server.pipeline.record import Recorder
from outrider_server.policy.obligations import Obligations
from outrider_server.storage import owed
from outrider_server.storage.database import Connection

PAGE_ROWS = 200
IDLE_SECONDS = 1.0


async def cancel_deleted(
    obligations: Obligations, recorder: Recorder, connection: Connection
) -> None:
    """Cancel for ever what deleted subscriptions are owed."""
    while True:
        went_on = False
        for shard, subscription in obligations.deleted():
            went_on |= await cancel_page(obligations, recorder, connection, shard, subscription)
        # What cannot be cancelled yet is in flight; its requests end by themselves.
        await asyncio.sleep(0 if went_on else IDLE_SECONDS)


async def cancel_page(
    obligations: Obligations,
    recorder: Recorder,
    connection: Connection,
    shard: int,
    subscription: int,
) -> bool:
    """Cancel a page of a subscription's owed rows in a shard and record it; note when there are none.

    Returns whether any was cancelled.
    """
    # Rows that only memory knows of are written first, so that the page finds them.
    await recorder.record()
    look = obligations.look()
    rows = await owed.find_of(connection, shard, subscription, PAGE_ROWS)
    if rows:
        ended = obligations.end_rows(look, rows, expired_below=None)
        await recorder.record()
        return ended > 0
    obligations.cancelled_all(shard, subscription, look)
    return False
