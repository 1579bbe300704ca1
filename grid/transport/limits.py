"""Every bound of the transport, each with its reason. Times are in seconds of trio's clock."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1
"""In the clear preamble and in the handshake's prologue; peers of different versions part with a clear error."""

CONNECT_S: Final = 5.0
"""To open one TCP connection: three SYNs (0, 1, 3 s) on a lossy link."""
HANDSHAKE_S: Final = 5.0
"""Preamble to verdict. An honest one takes two round trips; a half-open one is cut off here."""
DRAIN_S: Final = 1.0
DRAIN_READS_MAX: Final = 4
"""What a peer of another version sent is read for so long, so that our own version reaches it before our reset."""
ADMIT_S: Final = 15.0
"""A joiner waits this long for its chain: the member that admits it may first ask the DHT who else used the invite."""
HELLO_BYTES_MAX: Final = 32 << 10
"""A chain of 32 certificates takes about 6 KB, the rest is for revocations; Noise's own limit is 65,535."""
REVOCATIONS_MAX: Final = 64
"""Newest ones that ride on a handshake; gossip carries the others."""

MESSAGE_BYTES_MAX: Final = (1 << 20) + (64 << 10)
"""An inline page is at most 1 MiB; the rest is its envelope. Larger things are blobs."""
RECORD_BYTES_MAX: Final = MESSAGE_BYTES_MAX + 1024
"""Plaintext of one AEAD record. Noise's 65,535 would cost sixteen times the calls for a blob's chunk."""
RECORD_BYTES_TARGET: Final = 64 << 10
"""Small frames are joined up to here into one record, which is one encryption and one send."""
BULK_BYTES_MIN: Final = 16 << 10
"""A payload from here on is a record of its own behind the frame's header, so that it is never copied to be joined."""
QUIET_S: Final = 50e-6
"""A small frame after so long a silence is sent at once; sooner, it may be one of many and waits to be joined to them."""
REKEY_RECORDS: Final = 1 << 16
"""64 GiB at most under one AES-GCM key, far below the bound of 2**38 bytes for a distinguishing chance of 2**-57."""
RECEIVE_BUFFER_BYTES: Final = 64 << 10
"""One read takes many small records at once; a larger record gets a buffer of its own. Times CONNECTIONS_MAX: 128 MiB."""

KEEPALIVE_S: Final = 2.0
"""A link that sent nothing for so long sends a ping."""
DEAD_S: Final = 6.0
"""No byte for so long while we were ready to read: two pings lost. Never counted while our own handler is slow."""
TICK_S: Final = 1.0
"""How often a link looks at the two above."""
CLOSE_S: Final = 2.0
"""For the other end to see our goodbye, and for a queue to drain before it."""
IDLE_S: Final = 300.0
"""A link that carried nothing but pings for so long is closed, unless either end keeps it."""
SPARE_LINKS: Final = 16
"""Links that neither end keeps; more of them only while they carried something within SPARE_S. Twice the neighbours: who takes
work takes it from a few others for a while. Each costs a ping a second, closing one too early a handshake."""
SPARE_S: Final = 5.0
"""A link that carried something within this time is not spare: two keepalives, so that each end knows whether the other keeps it,
and several pauses of a thief that found nothing."""
SPARE_CHECK_S: Final = 2.0
"""How often too many spare links are looked for."""
HOUSEKEEPING_S: Final = 10.0
"""How often idle links and expired certificates are looked for."""

OUTBOX_BYTES_MAX: Final = 4 << 20
OUTBOX_FRAMES_MAX: Final = 4096
"""What waits to be sent to one peer: beyond either, `send` waits and `post` returns False."""
INBOX_BYTES_MAX: Final = 4 << 20
INBOX_EVENTS_MAX: Final = 1024
"""What one peer sent and our handler did not take yet: beyond either, we stop reading from that peer."""
REQUESTS_RUNNING_MAX: Final = 64
"""Requests of one peer that are handled at the same time."""
REQUESTS_WAITING_MAX: Final = 512
"""Requests of one peer known at all; further ones are answered `busy` at once, so that replies behind them still flow."""

CONNECTIONS_MAX: Final = 2048
"""Peers connected at the same time; above it the longest idle one goes. Only a job's leader has more than about 50."""
HALF_OPEN_MAX: Final = 512
"""Handshakes under way that others began; above it the oldest is cut off. An honest one lasts milliseconds, but all who
hear of a job dial its leader within a few."""
JOINS_MAX: Final = 8
"""Admissions under way: each may cost look-ups."""
ADDRESSES_KNOWN_MAX: Final = 32
"""Peers not connected whose last good address is remembered, least recently used out first: those likely to be dialled again.
Any other's is a lookup away."""

REDIAL_S_MIN: Final = 0.1
REDIAL_S_MAX: Final = 15.0
"""Pause before a lost peer is dialled again: doubled from the one to the other, with jitter."""
UNREACHABLE_S: Final = 10.0
"""Messages for a peer that can't be reached for so long are given up."""

BLOB_CHUNK_BYTES: Final = 1 << 20
"""One read request and its answer: one record, one BLAKE3 chunk group of the blob store."""
BLOB_WINDOW: Final = 4
"""Reads ahead in one stream: 4 MiB in flight fill a 1 Gbit/s link up to 32 ms of round trip."""
BLOB_READS_MAX: Final = 16
"""Reads outstanding on one blob link, all streams together: bounds the reader's memory to 16 MiB a link."""
BLOB_SERVED_AT_ONCE: Final = 3
"""Reads one blob link's server works on: the disk reads one while others are encrypted and sent."""
BLOB_LINKS_MAX: Final = 64
"""Blob links served at the same time; a peer above it is told to come back."""
BLOB_IDLE_S: Final = 60.0
"""A blob link nobody read from for so long is closed."""
BLOB_READ_S: Final = 30.0
"""One chunk that takes longer comes from a disk (or a peer) that is better given up."""
