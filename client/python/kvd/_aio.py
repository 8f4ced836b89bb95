"""How asyncio waits for a `Pending`: one future of the running loop, set from whichever thread finishes the
work."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvd._kvd import Pending


async def settle(pending: Pending[Any]) -> Any:
    """The result of `pending`; cancelling the task that awaits it cancels the work."""
    loop = asyncio.get_running_loop()
    settled = loop.create_future()

    def wake() -> None:
        if not settled.done():
            settled.set_result(None)

    def done(_: Pending[Any]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    pending.add_done_callback(done)
    try:
        await settled
    except asyncio.CancelledError:
        pending.cancel()
        raise
    return pending.result(0)
