"""Opening connections: addresses of a peer, tried in turn, each try bounded, every failure told in one line."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio
from trio.abc import HalfCloseableStream

from dht.core.identity import PeerId
from dht.network import Address, Network
from grid.transport.channel import SecureChannel, initiate
from grid.transport.errors import HandshakeError, PeerUnreachable, Refused
from grid.transport.hello import Credentials, Hello
from grid.transport.limits import ADDRESSES_KNOWN_MAX, CONNECT_S

log = logging.getLogger(__name__)

ADDRESSES_PER_PEER_MAX = 4
"""A dead one costs up to CONNECT_S, so only the best are remembered."""
LOCATE_S = 5.0
"""For the DHT to find a peer's address."""
HOST_CHARS_MAX = 253
"""RFC 1035."""
UNSPECIFIED = ("", "0.0.0.0", "::", "*")

Locate = Callable[[PeerId], Awaitable[Sequence[Address]]]


def parse_address(text: str) -> Address | None:
    """ "host:port" or "[v6]:port" as an address; None when it is neither."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or not 0 < int(port) < 65536:
        return None
    if len(host) > HOST_CHARS_MAX or not host.isascii() or not host.isprintable() or " " in host:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def format_address(address: Address) -> str:
    """The text that `parse_address` reads."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def open_stream(network: Network, address: Address) -> HalfCloseableStream:
    """A raw connection within CONNECT_S, whatever nonsense the address is. Raises OSError (TimeoutError)."""
    try:
        with trio.fail_after(CONNECT_S):
            return await network.open_stream(address)
    except trio.TooSlowError:
        raise TimeoutError(f"no answer within {CONNECT_S:g} s") from None
    except (ValueError, OverflowError, TypeError) as error:  # a host name that can't be one
        raise OSError(f"not an address: {error}") from error


class AddressBook:
    """Where peers were last reached or say they are. Of those not `held`, as many as fit, least recently used out first."""

    def __init__(self, held: Callable[[PeerId], bool] = lambda peer: False) -> None:
        self._known: OrderedDict[PeerId, list[Address]] = OrderedDict()
        self._held = held

    def __len__(self) -> int:
        return len(self._known)

    def get(self, peer: PeerId) -> list[Address]:
        return list(self._known.get(peer, ()))

    def learn(self, peer: PeerId, addresses: Iterable[Address]) -> None:
        """Best first; they go before what was known."""
        merged = list(dict.fromkeys([*addresses, *self._known.get(peer, ())]))
        self._known[peer] = merged[:ADDRESSES_PER_PEER_MAX]
        self._known.move_to_end(peer)
        self.tidy()

    def tidy(self) -> None:
        """Forget what is too much."""
        if len(self._known) > ADDRESSES_KNOWN_MAX:
            spare = [peer for peer in self._known if not self._held(peer)]
            for peer in spare[: max(0, len(spare) - ADDRESSES_KNOWN_MAX)]:
                del self._known[peer]

    def learn_from(self, hello: Hello, remote: Address, *, dialled: bool) -> None:
        """What a handshake showed: the address we dialled, the one the peer names, and that port on the host we see."""
        found = [remote] if dialled else []
        named = parse_address(hello.address)
        if named is not None:
            if named[0] not in UNSPECIFIED:
                found.append(named)
            found.append((remote[0], named[1]))
        self.learn(hello.id, found)


class Dialler:
    """Opens secure channels to peers."""

    def __init__(self, network: Network, credentials: Credentials, locate: Locate, book: AddressBook) -> None:
        self._network = network
        self._credentials = credentials
        self._locate = locate
        self._book = book

    async def open(
        self,
        address: Address,
        purpose: str,
        expected: PeerId | None = None,
        authenticated: Callable[[Hello], None] = lambda hello: None,
    ) -> SecureChannel:
        """One try at one address. Raises OSError, TimeoutError, HandshakeError."""
        stream = await open_stream(self._network, address)
        channel, _ = await initiate(stream, self._credentials, purpose, expected=expected, authenticated=authenticated)
        self._book.learn_from(channel.hello, address, dialled=True)
        return channel

    async def reach(
        self,
        peer: PeerId,
        purpose: str,
        addresses: Iterable[Address] = (),
        authenticated: Callable[[Hello], None] = lambda hello: None,
    ) -> SecureChannel:
        """Try the given addresses, the known ones, then what `locate` finds. Raises PeerUnreachable, Refused."""
        tried: dict[Address, str] = {}
        for located in (False, True):
            for address in await self._located(peer) if located else [*addresses, *self._book.get(peer)]:
                if address in tried:
                    continue
                try:
                    return await self.open(address, purpose, peer, authenticated)
                except Refused:
                    raise
                except (OSError, HandshakeError) as error:
                    tried[address] = f"{format_address(address)}: {brief(error)}"
        raise PeerUnreachable(peer, "; ".join(tried.values()) or "no address of it is known")

    async def _located(self, peer: PeerId) -> list[Address]:
        try:
            with trio.move_on_after(LOCATE_S):
                return list(await self._locate(peer))
        except Exception:
            log.exception("looking for the address of peer %s failed", peer.hex()[:10])
        return []


def brief(error: BaseException) -> str:
    """An error in a few words: of trio's "all attempts failed", what one of the attempts said."""
    cause = error.__cause__
    if isinstance(error, OSError) and error.strerror is None and cause is not None:
        return brief(cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
