"""Mailbox: several callers drive one engine, and each gets the outputs of its own requests.

Whoever steps the engine makes output for everybody; what is another caller's waits here for it.
"""

from collections.abc import Collection

from jaxinfer.engine import Engine
from jaxinfer.interrupts import deferred_interrupt
from jaxinfer.request import RequestOutput


class Mailbox:
    """Outputs by request id, each handed out once. Holds no more requests than the engine does."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._mail: dict[str, list[RequestOutput]] = {}

    def step(self, mine: Collection[str], *, always: bool = False) -> list[RequestOutput]:
        """What is new of the requests in `mine`: what waited for them, else after a step.

        `always` steps the engine even if something waited.
        """
        # The mail is short; `mine` may be every prompt of a long list, so it is not walked.
        if always or not any(i in mine for i in self._mail):
            with deferred_interrupt():
                self._deliver(self._engine.step())
        ids = [i for i in self._mail if i in mine]
        return [output for i in ids for output in self._mail.pop(i)]

    def drop(self, mine: Collection[str]) -> None:
        """Abort the requests in `mine` and throw their outputs away; the other requests go on."""
        if not mine or not self._engine.is_alive:
            return
        with deferred_interrupt():
            for request_id in mine:
                self._engine.abort(request_id)
            self._deliver(self._engine.settle())
            for request_id in mine:
                self._mail.pop(request_id, None)

    def clear(self) -> None:
        self._mail.clear()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._mail.setdefault(output.request_id, []).append(output)
