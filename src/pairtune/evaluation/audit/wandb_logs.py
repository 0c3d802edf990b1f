"""Evidence from W&B's offline runs."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pairtune.errors import BadInput, one_line
from pairtune.evaluation.audit.evidence import Evidence, TrialLog
from pairtune.evaluation.audit.logged_rows import add_rows, describe, trl_names
from pairtune.extras import require


def evidence_of_wandb(path: Path) -> Evidence:
    """Read one W&B offline run folder, or a folder of them (`wandb/offline-run-*`).

    Raises:
        BadInput: there is no run, one is damaged, or the package `wandb` is not installed.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.wandb")) or sorted(path.rglob("*.wandb"))
    return Evidence(path, "W&B offline run", [_log_of_wandb(file) for file in files])


def _log_of_wandb(file: Path) -> TrialLog:
    log = TrialLog(file.parent.name)
    config: dict[str, Any] = {}
    rows = []
    for record in _wandb_records(file):
        if record.HasField("run"):
            log.name = record.run.display_name or log.name
            config |= {item.key: _value(item.value_json) for item in record.run.config.update}
        elif record.HasField("config"):
            config |= {item.key: _value(item.value_json) for item in record.config.update}
        elif record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): _value(item.value_json) for item in record.history.item}
            rows.append(trl_names(row))
    add_rows(log, rows)
    describe(log, config)
    return log


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# W&B's file format: a header of 7 bytes, then LevelDB's log format. Blocks of 32 KiB hold pieces, each with checksum,
# length and type; a record is one whole piece, or a first, any middle and a last one.
_WANDB_HEADER, _WANDB_BLOCK, _WANDB_PIECE = b":W&B", 32768, struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def _wandb_records(file: Path) -> Iterator[Any]:
    """The records of a run's file; where its writer was killed, those up to the last whole one."""
    require("wandb", f"{file}: a W&B run")
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    if not content.startswith(_WANDB_HEADER):
        raise BadInput(f"{file}: is not a W&B run; give its folder (run-..., offline-run-...) or its .wandb file")
    try:
        for data in _wandb_data(content):
            record = Record()
            record.ParseFromString(data)
            yield record
    except (ValueError, DecodeError) as error:
        raise BadInput(f"{file}: the W&B run is damaged ({one_line(error)})") from error


def _wandb_data(content: bytes) -> Iterator[bytes]:
    place, pieces = len(_WANDB_HEADER) + 3, b""
    while place + _WANDB_PIECE.size <= len(content):
        left = _WANDB_BLOCK - place % _WANDB_BLOCK
        if left < _WANDB_PIECE.size:  # too short for a piece: padding
            place += left
            continue
        checksum, length, kind = _WANDB_PIECE.unpack_from(content, place)
        piece = content[place + _WANDB_PIECE.size : place + _WANDB_PIECE.size + length]
        if len(piece) < length:
            return  # still being written, or truncated
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"wrong checksum at byte {place}")
        pieces = piece if kind in (_WHOLE, _FIRST) else pieces + piece
        if kind in (_WHOLE, _LAST):
            yield pieces
        place += _WANDB_PIECE.size + length
