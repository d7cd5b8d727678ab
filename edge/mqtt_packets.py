"""MQTT packets as bytes: what edge/mqtt_wire.py packs and takes apart (OASIS, MQTT 5 sections 1.5 and 2)."""

from __future__ import annotations

_WIDTH = {
    **dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), 1),
    **dict.fromkeys((0x13, 0x21, 0x22, 0x23), 2),
    **dict.fromkeys((0x02, 0x11, 0x18, 0x27), 4),
}
"""Bytes of the properties that are numbers (section 2.2.2.2)."""
_TEXTS = dict.fromkeys((0x03, 0x08, 0x09, 0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F), 1) | {0x26: 2}


def packed_length(value: int) -> bytes:
    """A variable byte integer (MQTT 5 section 1.5.5)."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def packet(header: int, body: bytes) -> bytes:
    """A packet of a fixed header's first byte and all that follows the length."""
    return bytes((header,)) + packed_length(len(body)) + body


def field(data: bytes) -> bytes:
    """A length-prefixed field (section 1.5.4)."""
    return len(data).to_bytes(2, "big") + data


def variable(data: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer (section 1.5.5) and where it ends; (0, 0) when it is not all here."""
    value = shift = 0
    for position in range(at, min(at + 4, len(data))):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    if len(data) >= at + 4:
        raise ConnectionAbortedError("the broker sent a packet whose length cannot be read")
    return 0, 0


def properties(data: bytes, at: int) -> tuple[dict[int, int], int]:
    """The numbers among the properties at ``at``, and where they end; texts are stepped over unread."""
    length, at = variable(data, at)
    stop = at + length
    found: dict[int, int] = {}
    while at < stop:
        identifier = data[at]
        at += 1
        if width := _WIDTH.get(identifier):
            found[identifier] = int.from_bytes(data[at : at + width], "big")
            at += width
        elif identifier == 0x0B:  # subscription identifier
            _, at = variable(data, at)
        else:
            for _ in range(_TEXTS.get(identifier, 0) or len(data)):
                if at + 2 > stop:
                    raise ConnectionAbortedError(f"the broker sent a property {identifier:#04x} that cannot be read")
                at += 2 + (data[at] << 8 | data[at + 1])
    if at != stop:
        raise ConnectionAbortedError("the broker sent properties that cannot be read")
    return found, stop
