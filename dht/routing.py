"""The routing table: the kademlia package's, mended.

Rules this file keeps:

- the n nearest means the n nearest of all contacts, whatever bucket they are in;
- a bucket is in the order in which its contacts were last heard; a full bucket's head is only replaced after it
  missed two replies, never because somebody new came;
- the clock is the caller's.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from kademlia.node import Node as KademliaNode
from kademlia.routing import KBucket, RoutingTable

from dht.contact import Contact

Clock = Callable[[], float]

ID_BITS = 160
LONELY_S = 3_600.0
"""A bucket nobody was heard in for so long is refreshed (kademlia paper, section 2.3)."""
DEPTH_STEP = 5
"""Buckets split beyond the own id's side to this depth (b in the paper's section 4.2): shorter lookups."""


class Bucket(KBucket):  # type: ignore[misc]
    """A k-bucket with an injected clock."""

    def __init__(self, lower: int, upper: int, ksize: int, now: Clock) -> None:
        self._now = now
        super().__init__(lower, upper, ksize)

    def touch_last_updated(self) -> None:
        self.last_updated = self._now()

    def split(self) -> tuple[Bucket, Bucket]:
        middle = (self.range[0] + self.range[1]) // 2
        lower = Bucket(self.range[0], middle, self.ksize, self._now)
        upper = Bucket(middle + 1, self.range[1], self.ksize, self._now)
        for half in (lower, upper):
            half.last_updated = self.last_updated
        for node in [*self.nodes.values(), *self.replacement_nodes.values()]:
            (lower if lower.has_in_range(node) else upper).add_node(node)
        return lower, upper


class Table(RoutingTable):  # type: ignore[misc]
    """Contacts by their distance from `node`, this peer itself."""

    buckets: list[Bucket]

    def __init__(self, ksize: int, node: KademliaNode, now: Clock) -> None:
        self._now = now
        super().__init__(None, ksize, node)

    def flush(self) -> None:
        self.buckets = [Bucket(0, 2**ID_BITS - 1, self.ksize, self._now)]

    def __len__(self) -> int:
        return sum(len(bucket.nodes) for bucket in self.buckets)

    def __iter__(self) -> Iterator[Contact]:
        for bucket in self.buckets:
            yield from bucket.nodes.values()

    def get_bucket_for(self, node: KademliaNode) -> int:
        """The index of the bucket whose range holds `node`."""
        low, high = 0, len(self.buckets) - 1
        while low < high:
            middle = (low + high) // 2
            if node.long_id > self.buckets[middle].range[1]:
                low = middle + 1
            else:
                high = middle
        return low

    def get(self, node: KademliaNode) -> Contact | None:
        """The contact with `node`'s id, if it is in a bucket."""
        contact: Contact | None = self.buckets[self.get_bucket_for(node)].nodes.get(node.id)
        return contact

    def add_contact(self, node: Contact) -> Contact | None:
        """Put a contact that was just heard at its bucket's tail, with the address it has now.

        Returns None when it is in the table, else the head of its full bucket, to be asked whether it still lives;
        the contact waits among the replacements.
        """
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if bucket.add_node(node):
                bucket.touch_last_updated()
                return None
            if not bucket.has_in_range(self.node) and bucket.depth() % DEPTH_STEP == 0:
                head: Contact = bucket.head()
                return head
            self.split_bucket(index)

    def find_neighbors(self, node: KademliaNode, k: int | None = None, exclude: KademliaNode | None = None) -> list[Contact]:
        """The `k` contacts nearest to `node`, the one with its very id too; `exclude` is the asker."""
        candidates = (c for c in self if exclude is None or c.id != exclude.id)
        return heapq.nsmallest(k or self.ksize, candidates, key=node.distance_to)

    def lonely_buckets(self) -> list[Bucket]:
        """The buckets nobody was heard in for an hour."""
        before_s = self._now() - LONELY_S
        return [bucket for bucket in self.buckets if bucket.last_updated < before_s]
