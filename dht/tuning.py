"""How lively a node is: the intervals and rates of its background work, each with its reason.

The defaults suit grids of a few to some hundred peers. A simulation of thousands in one process lowers the rates.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Seconds, and numbers a second."""

    alive_for_s: float = 3.0
    """A contact heard more recently isn't pinged. With the three misses a dead peer is gone in 5 to 9 s."""
    pings_per_s: float = 7.0
    """Pings in grids of up to 20 peers: each of them every 3 s. 7 a second cost 0.5 % of a core."""
    pings_per_s_large: float = 2.0
    """Pings in larger grids, whatever their size: the longest unheard come first."""
    second_miss_after_s: float = 0.8
    """A silent contact is asked once more so much later: longer than a garbage collection or a Wi-Fi hiccup."""
    discover_s_max: float = 30.0
    """Longest interval between two lookups of the own id, which find new neighbours; it starts at 1 s and doubles."""
    refresh_s: float = 300.0
    """Interval at which buckets nobody was heard in are refreshed."""
    bootstrap_s_max: float = 15.0
    """Longest pause between two rounds over all known addresses while this peer is alone; it starts at 0.5 s."""
    rebootstrap_s: float = 30.0
    """Interval at which addresses from which nobody is in the table are tried again: how a split grid meets again."""
    replicate_s: float = 5.0
    """Interval at which a bounded number of held records is looked through for new neighbours that should hold them."""
    reoffer_s: float = 900.0
    """A holder near to a key offers its records to all who should hold them so often: what churn wore off grows back."""
    republish_s_max: float = 600.0
    """Longest interval at which an issuer stores its own records again; it starts at 30 s and doubles."""
    save_s: float = 2.0
    """Interval at which changed contacts are written to disk: 4 KB at most, and only when they changed."""
