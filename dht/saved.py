"""The contacts on disk, so that a peer finds its grid again after a restart, whoever left meanwhile.

Rules this file keeps:

- written to a temporary name and renamed: a reader sees the old file or the new one;
- what is read is input like any other: a damaged file is an empty one;
- contacts that were saved before are kept while there is room: the others may all be down just now.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from dht.contact import Contact
from dht.core.codec import CodecError, decode, encode
from dht.core.messages import ContactInfo

log = logging.getLogger(__name__)

SAVED_MAX = 64
"""Contacts saved: one that still lives at its old address is enough."""
FILE_BYTES_MAX = 64 << 10

_Saved = Annotated[tuple[ContactInfo, ...], msgspec.Meta(max_length=SAVED_MAX)]


class SavedContacts:
    """The file at `path`; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._written: tuple[ContactInfo, ...] = ()

    def load(self) -> list[Contact]:
        """What was saved; empty when there is no file or it is damaged."""
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                self._written = decode(file.read(FILE_BYTES_MAX), _Saved)
        except FileNotFoundError:
            return []
        except (OSError, CodecError) as error:
            log.warning("%s can't be read, starting without saved contacts: %s", self._path, error)
            return []
        return [Contact(key, (host, port)) for key, host, port in self._written]

    def save(self, contacts: Iterable[Contact]) -> None:
        """Write the contacts, then earlier ones while there is room. A full disk is not worth a peer: it is logged."""
        infos = {contact.key: (contact.key, contact.ip, contact.port) for contact in contacts}
        for info in self._written:
            infos.setdefault(info[0], info)
        chosen = tuple(infos.values())[:SAVED_MAX]
        if self._path is None or set(chosen) == set(self._written):
            return
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            temporary.write_bytes(encode(chosen))
            os.replace(temporary, self._path)
        except OSError as error:
            log.warning("%s can't be written: %s", self._path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        self._written = chosen
