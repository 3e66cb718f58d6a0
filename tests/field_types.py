"""Types that people give to the fields of pydantic classes, by name, in the groups of pydantic's own documentation."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import ipaddress
import pathlib
import re
import typing
import uuid
import zoneinfo
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, StringConstraints, Tag
from typing_extensions import TypedDict

T = typing.TypeVar("T")


class Colour(enum.Enum):
    red = "red"
    blue = "blue"


class Level(enum.IntEnum):
    low = 1
    high = 2


class Word(enum.StrEnum):
    yes = "yes"
    no = "no"


class Mixed(enum.Enum):
    one = 1
    two = "two"
    none = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool = True


class Puppy(Dog):
    weeks: Annotated[int, Field(ge=0, le=52)]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int
    b: str | None = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Tree(BaseModel):
    value: int
    children: Annotated[list[Tree], Field(max_length=2)] = []


class Aliased(BaseModel):
    first: int = Field(alias="firstName")


class Base64Bytes_(BaseModel):
    model_config = ConfigDict(val_json_bytes="base64", ser_json_bytes="base64")
    data: bytes


class Point(NamedTuple):
    x: int
    y: int = 0


class Movie(TypedDict, total=False):
    title: typing.Required[str]
    year: int


@dataclasses.dataclass
class Pair:
    left: int
    right: str = "r"


class Numbers(RootModel[list[int]]):
    pass


class Box(BaseModel, typing.Generic[T]):
    content: T


def _kind(value: Any) -> str:
    return str(value["kind"] if isinstance(value, dict) else value.kind)


MOMENT, DAY = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.date(2024, 1, 1)
TYPES: dict[str, Any] = {
    # --- of Python ---
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "None": None,
    "Any": Any,
    "object": object,
    "bytes": bytes,
    "complex": complex,
    "Decimal": decimal.Decimal,
    "date": datetime.date,
    "datetime": datetime.datetime,
    "time": datetime.time,
    "timedelta": datetime.timedelta,
    "UUID": uuid.UUID,
    "Path": pathlib.Path,
    "PurePath": pathlib.PurePath,
    "ZoneInfo": zoneinfo.ZoneInfo,
    "IPv4Address": ipaddress.IPv4Address,
    "IPv6Address": ipaddress.IPv6Address,
    "IPv4Interface": ipaddress.IPv4Interface,
    "IPv6Interface": ipaddress.IPv6Interface,
    "IPv4Network": ipaddress.IPv4Network,
    "IPv6Network": ipaddress.IPv6Network,
    "Enum": Colour,
    "IntEnum": Level,
    "StrEnum": Word,
    "Enum of several types": Mixed,
    "Literal": Literal["a", "b c"],
    "Literal of several types": Literal[1, "x", None, True],
    # --- containers ---
    "list": list,
    "list[int]": list[int],
    "list of lists": list[list[bool]],
    "tuple": tuple,
    "tuple[int, str]": tuple[int, str],
    "tuple[int, ...]": tuple[int, ...],
    "set[str]": set[str],
    "frozenset[int]": frozenset[int],
    "set[Enum]": set[Colour],
    "deque": collections.deque[int],
    "Sequence": collections.abc.Sequence[int],
    "Iterable": collections.abc.Iterable[int],
    "dict": dict,
    "dict[str, int]": dict[str, int],
    "dict[int, str]": dict[int, str],
    "dict[float, int]": dict[float, int],
    "dict[bool, int]": dict[bool, int],
    "dict[IntEnum, int]": dict[Level, int],
    "dict[Enum of several types, int]": dict[Mixed, int],
    "dict[Literal of integers, int]": dict[Literal[1, 2], int],
    "dict[tuple, int]": dict[tuple[int, int], int],
    "dict[int | None, int]": dict[int | None, int],
    "dict[int | Literal, int]": dict[int | Literal["all"], int],
    "dict[PositiveInt, int]": dict[pydantic.PositiveInt, int],
    "dict[NonNegativeInt, int]": dict[pydantic.NonNegativeInt, int],
    "dict[NegativeInt, int]": dict[pydantic.NegativeInt, int],
    "dict by range": dict[Annotated[int, Field(ge=8, lt=12)], int],
    "dict[date, int]": dict[datetime.date, int],
    "dict[UUID, int]": dict[uuid.UUID, int],
    "dict[Enum, int]": dict[Colour, int],
    "dict[Literal, int]": dict[Literal["a", "b"], int],
    "dict[Decimal, int]": dict[decimal.Decimal, int],
    "dict[Path, int]": dict[pathlib.Path, int],
    "dict by pattern": dict[Annotated[str, Field(pattern="^[a-z]+$")], int],
    "dict by length": dict[Annotated[str, Field(min_length=2, max_length=4)], int],
    "dict of counted size": Annotated[dict[str, int], Field(min_length=1, max_length=3)],
    "Mapping": collections.abc.Mapping[str, float],
    "defaultdict": collections.defaultdict[str, list[int]],
    "Counter": collections.Counter[str],
    "OrderedDict": collections.OrderedDict[str, int],
    "OrderedDict[int, int]": collections.OrderedDict[int, int],
    "Counter[int]": collections.Counter[int],
    "NamedTuple": Point,
    "TypedDict": Movie,
    "dataclass": Pair,
    # --- unions and classes ---
    "Optional": int | None,
    "Union": int | str | None,
    "Union of lists": list[int] | dict[str, int],
    "class": Cat,
    "class of a class": Puppy,
    "closed class": Closed,
    "open class": Open,
    "recursive class": Tree,
    "class with aliases": Aliased,
    "generic class": Box[int],
    "root class": Numbers,
    "smart union of classes": Cat | Dog,
    "discriminated union": Annotated[Cat | Dog, Field(discriminator="kind")],
    "union by a function": Annotated[Annotated[Cat, Tag("cat")] | Annotated[Dog, Tag("dog")], Discriminator(_kind)],
    "list of a union": list[Annotated[Cat | Dog, Field(discriminator="kind")]],
    "dict of classes": dict[str, Cat],
    # --- numbers of pydantic ---
    "PositiveInt": pydantic.PositiveInt,
    "NegativeInt": pydantic.NegativeInt,
    "NonNegativeInt": pydantic.NonNegativeInt,
    "NonPositiveInt": pydantic.NonPositiveInt,
    "StrictInt": pydantic.StrictInt,
    "StrictBool": pydantic.StrictBool,
    "PositiveFloat": pydantic.PositiveFloat,
    "NegativeFloat": pydantic.NegativeFloat,
    "int64": Annotated[int, Field(ge=-(2**63), lt=2**63)],
    "uint64": Annotated[int, Field(ge=0, le=2**64 - 1)],
    "beyond float": Annotated[int, Field(gt=2**60, lt=2**60 + 5000)],
    "multiple_of": Annotated[int, Field(multiple_of=7)],
    "multiple_of of a float": Annotated[float, Field(multiple_of=0.5)],
    "range": Annotated[float, Field(gt=0, le=1)],
    "excluded bound": Annotated[float, Field(gt=0, le=0.5)],
    "excluded bounds": Annotated[float, Field(gt=-1.5, lt=-1)],
    "multiple_of within a bound": Annotated[float, Field(gt=0, lt=0.5, multiple_of=0.1)],
    "Decimal of digits only": Annotated[decimal.Decimal, Field(max_digits=3)],
    "Decimal of many digits": Annotated[decimal.Decimal, Field(max_digits=38)],
    "Decimal of whole digits": Annotated[decimal.Decimal, Field(max_digits=5, decimal_places=0)],
    "long multiple_of": Annotated[int, Field(multiple_of=5, ge=0, le=10**15)],
    "Decimal of digits": Annotated[decimal.Decimal, Field(max_digits=5, decimal_places=2)],
    "Decimal of bounds": Annotated[decimal.Decimal, Field(ge=0, lt=100, decimal_places=1)],
    "ByteSize": pydantic.ByteSize,
    # --- strings of pydantic ---
    "constr": Annotated[str, Field(min_length=2, max_length=9)],
    "pattern": Annotated[str, Field(pattern=r"^[A-Z]{3}-\d{2}$")],
    "open pattern": Annotated[str, Field(pattern="^ab+c")],
    "stripped": Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)],
    "lower": Annotated[str, StringConstraints(to_lower=True)],
    "SecretStr": pydantic.SecretStr,
    "SecretBytes": pydantic.SecretBytes,
    "Secret[int]": pydantic.Secret[int],
    "bytes of a length": Annotated[bytes, Field(min_length=1, max_length=4)],
    "bytes as base64": Base64Bytes_,
    "Base64Bytes": pydantic.Base64Bytes,
    "Base64UrlBytes": pydantic.Base64UrlBytes,
    "EmailStr": pydantic.EmailStr,
    "NameEmail": pydantic.NameEmail,
    "AnyUrl": pydantic.AnyUrl,
    "HttpUrl": pydantic.HttpUrl,
    "AnyHttpUrl": pydantic.AnyHttpUrl,
    "FileUrl": pydantic.FileUrl,
    "FtpUrl": pydantic.FtpUrl,
    "WebsocketUrl": pydantic.WebsocketUrl,
    "PostgresDsn": pydantic.PostgresDsn,
    "RedisDsn": pydantic.RedisDsn,
    "AmqpDsn": pydantic.AmqpDsn,
    "MongoDsn": pydantic.MongoDsn,
    "MySQLDsn": pydantic.MySQLDsn,
    "IPvAnyAddress": pydantic.IPvAnyAddress,
    "IPvAnyInterface": pydantic.IPvAnyInterface,
    "IPvAnyNetwork": pydantic.IPvAnyNetwork,
    "UUID1": pydantic.UUID1,
    "UUID3": pydantic.UUID3,
    "UUID4": pydantic.UUID4,
    "UUID5": pydantic.UUID5,
    "UUID6": pydantic.UUID6,
    "UUID7": pydantic.UUID7,
    "UUID8": pydantic.UUID8,
    # --- dates of pydantic ---
    "AwareDatetime": pydantic.AwareDatetime,
    "NaiveDatetime": pydantic.NaiveDatetime,
    # --- containers of pydantic ---
    "conlist": Annotated[list[int], Field(min_length=1, max_length=3)],
    "conset of literals": Annotated[set[Literal[1, 2]], Field(max_length=2)],
    "OnErrorOmit": list[pydantic.OnErrorOmit[int]],
    "list of dates": list[datetime.date],
    "dict of decimals": dict[str, decimal.Decimal],
    "nested optional": list[dict[str, int | None] | None],
}
"""What a grammar holds entirely."""

VALUES: dict[str, list[Any]] = {
    "dict[IntEnum, int]": [{"1": 5}, {"1": 0, "2": 1}],
    "dict[Enum of several types, int]": [{"two": 2}],
    "dict[int | None, int]": [{"-7": 1}],
    "dict[int | Literal, int]": [{"3": 1, "all": 2}],
    "dict[PositiveInt, int]": [{"10": 1}],
    "dict by range": [{"8": 1, "11": 2}],
    "OrderedDict[int, int]": [{"3": 4}],
    "Counter[int]": [{"3": 4}],
    "excluded bound": [0.5, 0.001, 0.25],
    "excluded bounds": [-1.25],
    "Decimal of digits only": [123, 1.23, 12.3, -0.123, "1.23"],
    "Decimal of digits": [123.45, "123.45", -5],
    "Decimal of whole digits": [12345, "12345"],
    "nested optional": [[None, {"a": None}]],
    "recursive class": [{"value": 1, "children": [{"value": 2, "children": []}]}],
    "constr": ["é日", "\U0001f600\U0001f600"],
}
"""What is of a type and has to be possible."""

CHECKED: dict[str, tuple[Any, str]] = {
    "PastDate": (pydantic.PastDate, "the day of the check"),
    "FutureDate": (pydantic.FutureDate, "the day of the check"),
    "PastDatetime": (pydantic.PastDatetime, "the time of the check"),
    "FutureDatetime": (pydantic.FutureDatetime, "the time of the check"),
    "date of bounds": (Annotated[datetime.date, Field(ge=DAY)], "the schema does not tell bounds of dates"),
    "timedelta of bounds": (Annotated[datetime.timedelta, Field(ge=datetime.timedelta(days=1))], "the same"),
    "NewPath": (pydantic.NewPath, "the disk"),
    "Hashable": (collections.abc.Hashable, "lists and objects are not"),
    "FilePath": (pydantic.FilePath, "the disk"),
    "DirectoryPath": (pydantic.DirectoryPath, "the disk"),
    "re.Pattern": (re.Pattern, "that it compiles"),
    "FiniteFloat": (pydantic.FiniteFloat, "an exponent above 308"),
    "Fraction": (fractions.Fraction, "an exponent above 308"),
    "ImportString": (pydantic.ImportString, "what can be imported"),
    "Json": (pydantic.Json, "JSON within a string"),
    "Json[list[int]]": (pydantic.Json[list[int]], "JSON within a string"),
    "Base64Str": (pydantic.Base64Str, "that the bytes are UTF-8"),
    "Base64UrlStr": (pydantic.Base64UrlStr, "the same"),
    "Decimal below 1": (Annotated[decimal.Decimal, Field(max_digits=2, decimal_places=2)], "0, which has a digit"),
    "Decimal of many places": (Annotated[decimal.Decimal, Field(decimal_places=12)], "multiples of so little"),
    "conset": (Annotated[set[int], Field(min_length=2)], "that the items differ"),
    "look-ahead": (Annotated[str, Field(pattern=r"^(?!a)[a-z]+\b")], "conditions at a position of a pattern"),
    "validator": (Annotated[int, pydantic.AfterValidator(lambda value: value if value % 2 else 1 / 0)], "its code"),
}
"""What is partly left to validation, and what that is: the documented rest."""
