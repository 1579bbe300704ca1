"""What bounds any engine on this machine: wake-ups, copies, sockets, signatures, encryption, hashing, pickling.

    python -m benchmarks limits [--only WORD…] [--seconds S] [--json FILE]

Each line is the median of several repeats, with the least and the largest. Rates are of one thread of Python calling the
libraries that the grid uses, unless it says otherwise. Linux; nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rivals.engines.bare import Bare
from benchmarks.rivals.report import aligned, machine, spread
from benchmarks.rivals.work import spin

MIB = 1 << 20
REPEATS = 5
COPY_BYTES = 256 * MIB
SPIN_S = 0.001
Samples = list[float]


@dataclass
class Limit:
    """One line."""

    name: str
    unit: str
    samples: Samples
    digits: int = 0

    @property
    def shown(self) -> str:
        """For people."""
        return spread(self.samples, self.digits)


def calls_s(function: Callable[[], object], seconds: float) -> Samples:
    """Seconds a call, in each of the repeats."""
    count, elapsed_s = 1, 0.0
    while elapsed_s < seconds / 20 and count < 1 << 24:  # find out how many fit
        began = time.perf_counter()
        for _ in range(count):
            function()
        elapsed_s = time.perf_counter() - began
        count *= 2
    count = max(1, int(count / 2 / elapsed_s * seconds / REPEATS))
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(count):
            function()
        found.append((time.perf_counter() - began) / count)
    return found


def rate(name: str, unit: str, each: float, function: Callable[[], object], seconds: float, digits: int = 0) -> Limit:
    """`each` units a call."""
    return Limit(name, unit, [each / s for s in calls_s(function, seconds)], digits)


@contextlib.contextmanager
def other_process(serve: Callable[[], None]) -> Iterator[None]:
    """Fork one that serves until we end it."""
    pid = os.fork()
    if pid == 0:
        try:
            serve()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends on loopback, without delay."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    for end in (one, two):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, two


def sockets(seconds: float) -> Iterator[Limit]:
    """Between two processes: wake-ups and bytes."""
    for name, pair in (("Unix socket", socket.socketpair), ("loopback TCP", tcp_pair)):
        ours, theirs = pair()

        def echo(end: socket.socket = theirs) -> None:
            while data := end.recv(4096):
                end.sendall(data)

        def trip(end: socket.socket = ours) -> None:
            end.sendall(b"x" * 64)
            end.recv(4096)

        with other_process(echo):
            yield Limit(f"round trip, {name}", "µs", [1e6 * s for s in calls_s(trip, seconds)], 1)
        ours.close()
        theirs.close()
    for name, pair in (("Unix socket", socket.socketpair), ("loopback TCP", tcp_pair)):
        ours, theirs = pair()
        block = bytes(MIB)
        into = bytearray(MIB)

        def flood(end: socket.socket = theirs, block: bytes = block) -> None:
            while True:
                end.sendall(block)

        def drain(end: socket.socket = ours, into: bytearray = into) -> None:
            left = 16 * MIB
            while left:
                left -= end.recv_into(into, min(left, MIB))

        with other_process(flood):
            yield rate(f"throughput, {name}, 1 MiB blocks", "MB/s", 16 * MIB / 1e6, drain, seconds)
        ours.close()
        theirs.close()


def memory(seconds: float) -> Iterator[Limit]:
    """Copies."""
    source, target = bytearray(b"x") * COPY_BYTES, bytearray(COPY_BYTES)
    warm = memoryview(target)

    def copy() -> None:
        warm[:] = source

    def fresh() -> None:
        bytearray(source)

    yield rate("memory copy, 256 MiB, warm", "MB/s", COPY_BYTES / 1e6, copy, seconds)
    yield rate("memory copy, 256 MiB, fresh pages", "MB/s", COPY_BYTES / 1e6, fresh, seconds)


def hashing(seconds: float) -> Iterator[Limit]:
    """Of 1 MiB."""
    from blake3 import blake3

    data = os.urandom(16 * MIB)
    small = data[:MIB]
    yield rate("BLAKE3, 1 MiB", "MB/s", MIB / 1e6, lambda: blake3(small).digest(), seconds)
    cores = blake3.AUTO
    yield rate("BLAKE3, 16 MiB, all cores", "MB/s", 16 * MIB / 1e6, lambda: blake3(data, max_threads=cores).digest(), seconds)
    yield rate("BLAKE3, 256 B", "hashes/s", 1, lambda: blake3(small[:256]).digest(), seconds)
    yield rate("SHA-256, 1 MiB", "MB/s", MIB / 1e6, lambda: hashlib.sha256(small).digest(), seconds)
    yield rate("BLAKE2b, 1 MiB", "MB/s", MIB / 1e6, lambda: hashlib.blake2b(small).digest(), seconds)


def signatures(seconds: float) -> Iterator[Limit]:
    """Ed25519, by both libraries."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from nacl.signing import SigningKey

    message = os.urandom(200)
    key = SigningKey.generate()
    signed = key.sign(message).signature
    verify = key.verify_key.verify
    yield rate("Ed25519 signatures, PyNaCl", "/s", 1, lambda: key.sign(message), seconds)
    yield rate("Ed25519 verifications, PyNaCl", "/s", 1, lambda: verify(message, signed), seconds)
    other = Ed25519PrivateKey.generate()
    public, mark = other.public_key(), other.sign(message)
    yield rate("Ed25519 signatures, cryptography", "/s", 1, lambda: other.sign(message), seconds)
    yield rate("Ed25519 verifications, cryptography", "/s", 1, lambda: public.verify(mark, message), seconds)


def encryption(seconds: float) -> Iterator[Limit]:
    """Seals of small and large frames."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

    ciphers: dict[str, Any] = {"AES-256-GCM": AESGCM(os.urandom(32)), "ChaCha20-Poly1305": ChaCha20Poly1305(os.urandom(32))}
    nonce = bytes(12)
    for name, cipher in ciphers.items():
        for size, label in ((256, "256 B"), (64 << 10, "64 KiB"), (MIB, "1 MiB")):
            data = os.urandom(size)

            def seal(cipher: Any = cipher, data: bytes = data) -> None:
                cipher.encrypt(nonce, data, None)

            if size == 256:
                yield Limit(f"{name}, seal of {label}", "µs", [1e6 * s for s in calls_s(seal, seconds)], 2)
            else:
                yield rate(f"{name}, seal of {label}", "MB/s", size / 1e6, seal, seconds)


def increment(x: int) -> int:
    """Something to pickle."""
    return x + 1


def pickling(seconds: float) -> Iterator[Limit]:
    """What carries arguments and results."""
    import cloudpickle
    import msgspec

    numbers = list(range(100_000))
    dumped = pickle.dumps(numbers, 5)
    yield rate("pickle of ints, out", "M ints/s", 0.1, lambda: pickle.dumps(numbers, 5), seconds, 1)
    yield rate("pickle of ints, in", "M ints/s", 0.1, lambda: pickle.loads(dumped), seconds, 1)
    call = (increment, 1)
    yield rate("a call (function by name, one int) out and in", "/s", 1, lambda: pickle.loads(pickle.dumps(call, 5)), seconds)
    yield rate("cloudpickle of a lambda, out", "/s", 1, lambda: cloudpickle.dumps(lambda x: x + 1), seconds)
    message = (7, b"x" * 32, [1, 2, 3], "text")
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
    yield rate("msgpack of a small message, out and in", "/s", 1, lambda: decode(encode(message)), seconds)


def processes(seconds: float) -> Iterator[Limit]:
    """Starting them, waking them, keeping two busy."""

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def run(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *words], check=True)

    yield Limit("fork and exit", "ms", [1e3 * s for s in calls_s(fork, seconds)], 2)
    yield Limit("start of Python, no site", "ms", [1e3 * s for s in calls_s(run("-I", "-S", "-c", ""), seconds)], 1)
    yield Limit("start of Python, import trio", "ms", [1e3 * s for s in calls_s(run("-c", "import trio"), seconds)], 1)
    ours, theirs = threading.Event(), threading.Event()
    stop = False

    def answer() -> None:
        while True:
            ours.wait()
            ours.clear()
            if stop:
                return
            theirs.set()

    def wake() -> None:
        ours.set()
        theirs.wait()
        theirs.clear()

    thread = threading.Thread(target=answer)
    thread.start()
    yield Limit("round trip between two threads", "µs", [1e6 * s for s in calls_s(wake, seconds)], 1)
    stop = True
    ours.set()
    thread.join()
    bare = Bare(2)
    bare.ensure()
    efficient = []
    for _ in range(REPEATS):
        count = max(2, int(seconds / REPEATS * 2 / SPIN_S))
        began = time.perf_counter()
        busy_s = sum(bare.map(spin, [SPIN_S] * count))
        efficient.append(busy_s / (2 * (time.perf_counter() - began)))
    bare.close()
    yield Limit("efficiency of two bare processes, 1 ms", "", efficient, 3)


def disk(seconds: float) -> Iterator[Limit]:
    """Where the journal would be written (the usual temporary place)."""
    with tempfile.TemporaryDirectory() as folder:
        fd = os.open(Path(folder) / "file", os.O_RDWR | os.O_CREAT, 0o600)

        def append() -> None:
            os.write(fd, b"x" * 200)
            os.fsync(fd)

        yield Limit("append of 200 B and fsync", "ms", [1e3 * s for s in calls_s(append, seconds)], 3)
        os.close(fd)


GROUPS: dict[str, Callable[[float], Iterator[Limit]]] = {
    each.__name__: each for each in (sockets, memory, hashing, signatures, encryption, pickling, processes, disk)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks limits", description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    multiprocessing.set_start_method("fork", force=True)
    found: list[Limit] = []
    for group in options.only:
        for limit in GROUPS[group](options.seconds):
            found.append(limit)
            print(f"{limit.name}: {limit.shown} {limit.unit}", file=sys.stderr, flush=True)
    where = machine()
    print(f"{where['date']}, {where['cores']} cores, {where['cpu']}, Python {where['python']}")
    print(aligned([("limit", "median [spread]", "unit"), *((each.name, each.shown, each.unit) for each in found)]))
    if options.json is not None:
        told = {"schema": 1, "machine": where, "limits": [asdict(each) for each in found]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
