#!/usr/bin/env python3
"""Unpacks Jane Austen's six novels from the R package janeaustenr, without R.

Usage: unpack_janeausten.py DATA/Rdata.rdb OUTPUT.txt

An R lazy-load database is a row of entries, each a big-endian u32 (bytes when unpacked) and a zlib
stream that holds one object in R's XDR serialisation. The novels are the character vectors: one
string a line. The output is UTF-8 text with a form feed before each chapter, which ends a document
(src/data/text_reader.h).
"""
import os
import re
import struct
import sys
import zlib

CHARACTER_VECTOR = 16
STRING = 9
MOST_BYTES = 64 << 20
# "CHAPTER I", "Chapter 12", "CHAPTER XLIX."; volumes begin with a chapter anyway.
CHAPTER = re.compile(r"^(chapter)\s+([ivxlc]+|[0-9]+)\.?\s*$", re.IGNORECASE)


class Cursor:
    """Reads big-endian fields; running out of bytes is an error."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def take(self, count):
        if count < 0 or self.position + count > len(self.data):
            raise ValueError("the R object ends early")
        self.position += count
        return self.data[self.position - count:self.position]

    def integer(self):
        return struct.unpack(">i", self.take(4))[0]


def entries(data):
    """Yields the unpacked entries of a lazy-load database."""
    position = 0
    while position + 4 < len(data):
        unpacked_bytes = struct.unpack(">I", data[position:position + 4])[0]
        if unpacked_bytes > MOST_BYTES:
            raise ValueError(f"an entry of {unpacked_bytes} bytes")
        unpacker = zlib.decompressobj()
        entry = unpacker.decompress(data[position + 4:], MOST_BYTES)
        if len(entry) != unpacked_bytes or not unpacker.eof:
            raise ValueError(f"the entry at byte {position} is damaged")
        yield entry
        position = len(data) - len(unpacker.unused_data)


def lines_of(entry):
    """The strings of an entry that is a character vector; None for other objects."""
    cursor = Cursor(entry)
    if cursor.take(2) != b"X\n":
        raise ValueError("not in R's XDR serialisation")
    version = cursor.integer()
    cursor.take(8)  # the writing R, the oldest reading R
    if version == 3:
        cursor.take(cursor.integer())  # native encoding
    if cursor.integer() & 0xFF != CHARACTER_VECTOR:
        return None
    lines = []
    for _ in range(cursor.integer()):
        if cursor.integer() & 0xFF != STRING:
            raise ValueError("a string is missing")
        length = cursor.integer()
        lines.append(cursor.take(max(length, 0)).decode("utf-8", errors="replace"))
    return lines


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1], "rb") as source:
        data = source.read()
    text = []
    for entry in entries(data):
        lines = lines_of(entry)
        if lines is None or len(lines) < 1000:
            continue
        print(f"{len(lines)} lines: {lines[0]}", file=sys.stderr)
        text.append("\f")
        for line in lines:
            text.append("\f" + line + "\n" if CHAPTER.match(line.strip()) else line + "\n")
    temporary = sys.argv[2] + ".tmp"
    with open(temporary, "w", encoding="utf-8", newline="\n") as output:
        output.write("".join(text).lstrip("\f"))
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, sys.argv[2])


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, zlib.error) as error:
        sys.exit(f"unpack_janeausten.py: {error}")
