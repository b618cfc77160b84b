"""
Numbers of bpf/clawker_abi.h by name, and layouts as the compiler gave them (BTF).

Nothing here repeats a number or an offset: both are read from what the programs were built from.
"""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

OBJECTS = Path(str(files("clawker_cp") / "_bpf"))


def root() -> Path:
    """
    The repository the tests run from; raises `FileNotFoundError` elsewhere.
    """
    for directory in (Path.cwd(), *Path.cwd().parents):
        if (directory / "bpf/clawker_abi.h").exists():
            return directory
    raise FileNotFoundError("bpf/clawker_abi.h: run from the repository")


def _numbers() -> SimpleNamespace:
    text = (root() / "bpf/clawker_abi.h").read_text()
    found: dict[str, int] = {}
    for name, shift, number in re.findall(r"CLAWKER_(\w+) = (1u << )?(\d+)", text):
        found[name] = 1 << int(number) if shift else int(number)
    for name, number in re.findall(r"#define CLAWKER_(\w+) (0x[0-9a-f]+|\d+)u?\b", text):
        found[name] = int(number, 0)
    return SimpleNamespace(**found)


ABI = _numbers()
REASONS = {value: name[2:].lower() for name, value in vars(ABI).items() if name.startswith("R_")}
VERDICTS = {value: name[2:].lower() for name, value in vars(ABI).items() if name.startswith("V_")}


@dataclass(frozen=True)
class Field:
    """Where a member lies, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Layout:
    """A structure as BTF describes it."""

    size: int
    fields: dict[str, Field]

    def read(self, data: bytes, name: str) -> int | bytes:
        """A member's value: a little-endian number up to eight bytes, else the bytes."""
        field = self.fields[name]
        raw = data[field.offset : field.offset + field.size]
        return int.from_bytes(raw, "little") if field.size in (1, 2, 4, 8) else raw


# Kinds of <linux/btf.h>, and how many bytes follow a type's three words.
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _ENUM64 = 1, 2, 3, 4, 5, 6, 19
_FOLLOWING = {1: 4, 3: 12, 14: 4, 17: 4}
_EACH = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


def layouts(path: Path) -> dict[str, Layout]:
    """
    Every named structure in an object's BTF.
    """
    data, strings = _sections(path)
    types: list[tuple[str, int, int, int, bytes]] = [("", 0, 0, 0, b"")]
    at = 0
    while at < len(data):
        name, info, size = struct.unpack_from("<III", data, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        extra = _FOLLOWING.get(kind, _EACH.get(kind, 0) * count)
        types.append((_text(strings, name), kind, count, size, data[at + 12 : at + 12 + extra]))
        at += 12 + extra

    def size_of(number: int) -> int:
        _, kind, _, size, extra = types[number]
        if kind in (_INT, _STRUCT, _UNION, _ENUM, _ENUM64):
            return size
        if kind == _PTR:
            return 8
        if kind == _ARRAY:
            element, _, length = struct.unpack("<III", extra)
            return size_of(int(element)) * int(length)
        return size_of(size)  # typedef, const, volatile: `size` is the type

    found = {}
    for name, kind, count, size, extra in types:
        if kind == _STRUCT and name:
            members = [struct.unpack_from("<III", extra, 12 * i) for i in range(count)]
            fields = {_text(strings, n): Field((bits & 0xFFFFFF) // 8, size_of(t)) for n, t, bits in members}
            found[name] = Layout(size, fields)
    return found


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def _sections(path: Path) -> tuple[bytes, bytes]:
    """Type and string sections of an object's BTF, through libbpf's ELF reader."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    libbpf.btf__parse.restype = ctypes.c_void_p
    libbpf.btf__raw_data.restype = ctypes.c_void_p
    libbpf.btf__raw_data.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32)]
    libbpf.btf__free.argtypes = [ctypes.c_void_p]
    btf = libbpf.btf__parse(str(path).encode(), None)
    if not btf:
        raise OSError(ctypes.get_errno(), f"no BTF in {path}")
    try:
        size = ctypes.c_uint32()
        raw = ctypes.string_at(libbpf.btf__raw_data(btf, ctypes.byref(size)), size.value)
    finally:
        libbpf.btf__free(btf)
    head, types_at, types_len, strings_at, strings_len = struct.unpack_from("<IIIII", raw, 4)
    return raw[head + types_at :][:types_len], raw[head + strings_at :][:strings_len]
