"""Replies that are read up to a limit, in compressed form and decompressed, whatever a server sends."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import cast

import httpx

from cards_integrations.http_client.settings import HIDDEN

REPLY_BYTES = 2**20  # of a reply at most, besides what its texts or tokens take
ERROR_BYTES = 4096  # that are read of an error page
EXCERPT = 200  # characters of a reply in an error
ACCEPTED = {"Accept-Encoding": "identity"}  # replies are short; whoever compresses them all the same is understood


class ReplyError(Exception):
    """A reply that is not read: it is too long, or compressed in a way that nobody asked for."""


@dataclass(frozen=True)
class Reply:
    """A reply that was read; of an error page only the beginning."""

    status: int
    content: bytes

    @property
    def is_success(self) -> bool:
        """True for 2xx; redirects are not followed."""
        return httpx.codes.is_success(self.status)


async def read_reply(response: httpx.Response, limit: int) -> Reply:
    """Read a reply to its end, or an error page as far as errors quote it.

    Args:
        response: Its head has come, and nothing of its body has been read.
        limit: Bytes of the body at most, decompressed.

    Raises:
        ReplyError: It is longer, or cannot be decompressed.
    """
    if not response.is_success:
        with suppress(ReplyError):
            return Reply(response.status_code, await _beginning(response, ERROR_BYTES))
        return Reply(response.status_code, b"")  # its status says enough
    declared = response.headers.get("Content-Length", "")
    long = declared.isdecimal() and int(declared) > limit
    content = b"" if long else await _beginning(response, limit + 1)
    if long or len(content) > limit:
        raise ReplyError(f"answered with more than {limit:,} bytes, the limit for this request.")
    return Reply(response.status_code, content)


async def _beginning(response: httpx.Response, most: int) -> bytes:
    """The first bytes of the body, decompressed no further than these."""
    content, inflate = bytearray(), _inflate(response.headers.get("Content-Encoding", "identity"))
    async with aclosing(cast(AsyncGenerator[bytes], response.aiter_raw())) as pieces:
        async for piece in pieces:
            room = most - len(content)
            try:
                content += piece[:room] if inflate is None else inflate.decompress(piece, room)
            except zlib.error as error:
                raise ReplyError(f"answered with a body that cannot be decompressed: {error}.") from None
            if len(content) >= most:
                break
    return bytes(content)


def _inflate(encoding: str) -> zlib._Decompress | None:
    """What decompresses a body piece by piece; None if it is not compressed."""
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its first bytes say
    raise ReplyError(f"answered in Content-Encoding {encoding[:40]!r}, and was asked for none.")


def excerpt(content: bytes, key: str | None) -> str:
    """The beginning of a reply's text, quoted, with the key masked: a server may repeat what it was sent."""
    shown = content[:ERROR_BYTES].decode(errors="replace")
    if key:
        shown = shown.replace(key, HIDDEN)
        if len(content) >= ERROR_BYTES:
            shown = shown[: -len(key)]  # it may be cut in the middle of the key
    return repr(shortened(" ".join(shown.split())))


def shortened(text: str) -> str:
    """The beginning of a text, as long as errors quote one."""
    return text if len(text) <= EXCERPT else text[:EXCERPT] + " ..."
