"""The formats of strings in JSON schemas, as regular expressions of exactly what Python and pydantic take."""

from __future__ import annotations

from functools import lru_cache
from zoneinfo import available_timezones

YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # from 0001
BY_FOUR = "(?:0[48]|[2468][048]|[13579][26])"
LEAP_YEAR = f"(?:[0-9]{{2}}{BY_FOUR}|{BY_FOUR}00)"
LONG_MONTH = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
SHORT_MONTH = "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
FEBRUARY = "02-(?:0[1-9]|1[0-9]|2[0-8])"
DATE = f"(?:{YEAR}-(?:{LONG_MONTH}|{SHORT_MONTH}|{FEBRUARY})|{LEAP_YEAR}-02-29)"
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
ZONE = "(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"

NUMBER = "[0-9]{1,4}"
SECONDS = rf"{NUMBER}(?:\.[0-9]{{1,6}})?S"
DAYS = f"(?:{NUMBER}Y(?:{NUMBER}M)?(?:{NUMBER}D)?|{NUMBER}M(?:{NUMBER}D)?|{NUMBER}D)"
CLOCK = f"T(?:{NUMBER}H(?:{NUMBER}M)?(?:{SECONDS})?|{NUMBER}M(?:{SECONDS})?|{SECONDS})"
DURATION = f"P(?:{NUMBER}W|{DAYS}(?:{CLOCK})?|{CLOCK})"

BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"{BYTE}(?:\.{BYTE}){{3}}"
GROUP = "[0-9a-fA-F]{1,4}"
IPV6 = "(?:" + "|".join([
    f"(?:{GROUP}:){{7}}{GROUP}",
    f"(?:{GROUP}:){{1,7}}:",
    *(f"(?:{GROUP}:){{1,{7 - after}}}(?::{GROUP}){{1,{after}}}" for after in range(1, 7)),
    f":(?::{GROUP}){{1,7}}",
    "::",
]) + ")"  # fmt: skip

LABEL = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,30}"
NAME = "[A-Za-z](?:-?[A-Za-z0-9]){0,30}"  # the last label: with a digit in front it would be read as a number
HOST_NAME = rf"(?:{LABEL}\.){{0,8}}{NAME}"
HOST = rf"(?:{HOST_NAME}|{IPV4}|\[{IPV6}\])"
PORT = "(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}))?"
CHARACTER = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
USER = r"(?:[A-Za-z0-9._~-]+(?::[A-Za-z0-9._~-]*)?@)?"
REST = rf"(?:/{CHARACTER}*)*(?:\?(?:{CHARACTER}|[/?])*)?(?:#(?:{CHARACTER}|[/?])*)?"
OPAQUE = f"(?:mailto|urn|tel|sms|data|news|geo|about):{CHARACTER}+(?:/{CHARACTER}*)*"
HOSTED = f"//{USER}{HOST}{PORT}{REST}"
SCHEME = (  # any but "file", which has neither user nor port
    "(?:[a-eg-z][a-z0-9+-]{1,19}|f(?:[a-hj-z0-9+-][a-z0-9+-]{0,18}|i(?:[a-km-z0-9+-][a-z0-9+-]{0,17})?"
    "|il(?:[a-df-z0-9+-][a-z0-9+-]{0,16}|e[a-z0-9+-]{1,16})?))"
)
URI = f"(?:{SCHEME}:{HOSTED}|file://(?:{HOST_NAME})?/{CHARACTER}+(?:/{CHARACTER}*)*|{OPAQUE})"

LOCAL_PART = "[A-Za-z0-9_+%-]{1,20}(?:\\.[A-Za-z0-9_+%-]{1,20}){0,2}"
EMAIL = rf"{LOCAL_PART}@(?:{LABEL}\.){{1,4}}[A-Za-z]{{2,20}}"
BASE64 = "(?:[{0}]{{4}})*(?:[{0}][AQgw]==|[{0}]{{2}}[AEIMQUYcgkosw048]=)?"

FREE = {
    "path",
    "file-path",
    "directory-path",
    "binary",
    "password",
    "regex",
    "json-string",
    "idn-email",
    "idn-hostname",
}
"""Formats that a grammar does not restrict: any text may have them."""


@lru_cache(maxsize=64)
def format_pattern(name: str) -> str | None:
    """Return the pattern that a whole string of a format matches; None for a format without one."""
    found = _versioned_uuid(name) or _plain(name)
    return f"^(?:{found})$" if found else None


def _plain(name: str) -> str | None:
    match name:
        case "date" | "time" | "date-time":
            return {"date": DATE, "time": f"{TIME}{ZONE}?", "date-time": f"{DATE}[Tt]{TIME}{ZONE}?"}[name]
        case "ipv4network" | "ipv6network" | "ipvanynetwork":
            return {"ipv4network": _ipv4_networks(), "ipv6network": _ipv6_networks()}.get(
                name, f"{_ipv4_networks()}|{_ipv6_networks()}"
            )
        case "zoneinfo":
            return "|".join(sorted(zone.replace("+", r"\+") for zone in available_timezones())) or None
        case _:
            return PATTERNS.get(name)


def _versioned_uuid(name: str) -> str | None:
    version = name.removeprefix("uuid")
    if not name.startswith("uuid") or version not in ("", *"12345678"):
        return None
    third = f"{version}[0-9a-fA-F]{{3}}-[89abAB][0-9a-fA-F]{{3}}" if version else "[0-9a-fA-F]{4}-[0-9a-fA-F]{4}"
    return f"[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{third}-[0-9a-fA-F]{{12}}"


def _ipv4_networks() -> str:
    """Return a pattern of addresses with the length of their prefix, in which all bits after the prefix are 0."""
    found = [rf"{IPV4}(?:/32)?", "0\\.0\\.0\\.0/0"]
    for length in range(1, 32):
        whole, bits = divmod(length, 8)
        parts = [BYTE] * whole + ([f"(?:{'|'.join(map(str, range(0, 256, 2 ** (8 - bits))))})"] if bits else [])
        found.append(r"\.".join(parts + ["0"] * (4 - len(parts))) + f"/{length}")
    return "|".join(found)


def _ipv6_networks() -> str:
    found = [f"{IPV6}(?:/128)?", "::/0"]
    for length in range(1, 128):
        whole, bits = divmod(length, 16)
        parts = [GROUP] * whole + ([_beginning_of_group(bits)] if bits else [])
        found.append(":".join(parts) + ("::" if len(parts) < 8 else "") + f"/{length}")
    return "|".join(found)


def _beginning_of_group(bits: int) -> str:
    """Return a pattern of four hexadecimal digits whose bits after the first `bits` are 0."""
    whole, rest = divmod(bits, 4)
    last = ["", "[08]", "[048cC]", "[02468aAcCeE]"][rest]
    return f"[0-9a-fA-F]{{{whole}}}{last}" + "0" * (4 - whole - bool(rest))


PATTERNS = {
    "naive-date-time": f"{DATE}[Tt]{TIME}",
    "duration": DURATION,
    "email": EMAIL,
    "name-email": rf"{EMAIL}|[A-Za-z]{{1,20}}(?: [A-Za-z]{{1,20}}){{0,3}} <{EMAIL}>",
    "hostname": HOST_NAME,
    "ipv4": IPV4,
    "ipv6": IPV6,
    "ipvanyaddress": f"{IPV4}|{IPV6}",
    "ipv4interface": f"{IPV4}(?:/(?:[12]?[0-9]|3[0-2]))?",
    "ipv6interface": f"{IPV6}(?:/(?:[1-9]?[0-9]|1[01][0-9]|12[0-8]))?",
    "ipvanyinterface": f"{IPV4}(?:/(?:[12]?[0-9]|3[0-2]))?|{IPV6}(?:/(?:[1-9]?[0-9]|1[01][0-9]|12[0-8]))?",
    "uri": URI,
    "url": URI,
    "multi-host-uri": URI,
    "base64": BASE64.format("A-Za-z0-9+/"),
    "base64url": BASE64.format("A-Za-z0-9_-"),
    "fraction": "-?[0-9]{1,18}(?:/[1-9][0-9]{0,17})?",
    "json-pointer": "(?:/(?:[^/~]|~[01])*)*",
}
