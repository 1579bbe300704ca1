"""Peers find each other: identity, membership, signed records, a hardened Kademlia on trio. Knows nothing of jobs."""
