"""The responses that a server keeps: in its memory, up to a number and a size, and the oldest go first.

A server with API keys is one domain of trust: each valid key can read, continue, cancel and delete each response.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from dispec.serving.api.response_input import Item
from dispec.serving.api.response_protocol import Response
from dispec.serving.http.errors import ApiError

_encode = msgspec.json.encode


class StoredResponse(NamedTuple):
    """An ended response.

    body: its JSON. input_items: the JSON of the items that it answers, those of earlier responses included.
    events: of its stream, by number; None if they were not kept.
    """

    id: str
    status: str
    is_background: bool
    body: bytes
    input_items: bytes
    item_ids: tuple[str, ...]
    events: tuple[bytes, ...] | None = None

    @classmethod
    def of(cls, response: Response, items: Sequence[Item], events: Sequence[bytes] | None = None) -> "StoredResponse":
        return cls(
            response.id,
            response.status,
            response.background,
            _encode(response),
            _encode(items),
            (*(item["id"] for item in items), *(item.id for item in response.output)),
            None if events is None else tuple(events),
        )

    @property
    def num_bytes(self) -> int:
        ids = sum(map(len, self.item_ids))
        return len(self.body) + len(self.input_items) + ids + sum(map(len, self.events or ()))

    def conversation(self) -> list[Item]:
        """Return the items that a next response continues."""
        return [*msgspec.json.decode(self.input_items), *msgspec.json.decode(self.body)["output"]]


class ResponseStore:
    """Keeps responses that have ended.

    running: each `BackgroundResponse` by its id. They have no place in the bounds before they end.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.running: dict[str, Any] = {}  # that type imports this module
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._holders: dict[str, str] = {}  # the last response that has an item, by the item's id

    def add(self, stored: StoredResponse) -> None:
        """Keep a response, and drop the oldest ones beyond the bounds."""
        self._stored[stored.id] = stored
        self._num_bytes += stored.num_bytes
        self._holders |= dict.fromkeys(stored.item_ids, stored.id)
        while len(self._stored) > self.max_responses or self._num_bytes > self._max_bytes:
            self.delete(next(iter(self._stored)))

    def get(self, id: str) -> StoredResponse | None:
        return self._stored.get(id)

    def delete(self, id: str) -> None:
        """Drop a response that is kept."""
        stored = self._stored.pop(id)
        self._num_bytes -= stored.num_bytes
        for item_id in stored.item_ids:
            if self._holders.get(item_id) == id:
                del self._holders[item_id]

    def find_item(self, id: str) -> Item | None:
        """Return the item of an id, if a response that is kept has it."""
        holder = self._stored.get(self._holders.get(id, ""))
        if holder is None:
            return None
        return next(item for item in holder.conversation() if item["id"] == id)

    def conversation(self, id: str) -> list[Item]:
        """Return the items that a response with `previous_response_id` continues. Raises ApiError."""
        field = "previous_response_id"
        stored = self.get(id)
        if stored is None and id not in self.running:
            said = f"{field} is {id!r:.100}, which this server does not keep (it keeps {self.max_responses})"
            raise ApiError(404, said, param=field, code="previous_response_not_found")
        status = "in_progress" if stored is None else stored.status
        if stored is None or status not in ("completed", "incomplete"):
            said = f"{field} is {id!r:.100}, whose status is {status}, must be completed or incomplete"
            raise ApiError(400, said, param=field)
        return stored.conversation()


def page_of(items: Sequence[Item], after: str | None, limit: int, order: str) -> tuple[list[Item], bool]:
    """Return the items of a page, and whether there are more. Raises ApiError if `after` is the id of none."""
    ordered: list[Any] = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        found = next((index for index, item in enumerate(ordered) if item["id"] == after), None)
        if found is None:
            raise ApiError(400, f"after is {after!r:.100}, must be the id of an input item", param="after")
        ordered = ordered[found + 1 :]
    return ordered[:limit], len(ordered) > limit
