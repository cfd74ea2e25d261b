"""What hosts leave behind, read as far as it goes: scalars by tag and step, and what was torn.

Three kinds of file: TensorBoard's event files, the quickstart's ``metrics.jsonl``, and the
``.wandb`` file of an offline W&B run.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVENTS = "events.out.tfevents."
JSON_LINES = "metrics.jsonl"
WANDB = ".wandb"

_TFRECORD_FRAME = 16  # bytes around each record: length, its checksum, the data's checksum
_WANDB_HEADER = b":W&B"
_WANDB_BLOCK = 32768
_WANDB_FRAME = 7  # bytes before each chunk: checksum, length, type


@dataclass
class Log:
    """The scalars of one or several files: ``scalars[tag][step]``, and what could not be read."""

    scalars: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    config: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, tag: str, step: int, value: float) -> None:
        # Resumed runs log some steps twice: the later one went on.
        self.scalars[tag][step] = value


def is_log(path: Path) -> bool:
    """Whether a file's name is that of a log."""
    name = path.name
    return name.startswith(EVENTS) or name == JSON_LINES or path.suffix == WANDB


def read(path: Path, log: Log) -> None:
    """Add what can be read of one file to ``log``, and to its problems what can't."""
    before = sum(map(len, log.scalars.values()))
    reader = _events if path.name.startswith(EVENTS) else _json_lines
    reader = _wandb if path.suffix == WANDB else reader
    try:
        reader(path, log)
    except OSError as error:
        log.problems.append(f"{path}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        log.problems.append(f"{path}: reading it needs {package}: pip install {package}")
    else:
        if sum(map(len, log.scalars.values())) == before:
            log.problems.append(f"{path}: no scalar in it")


def _json_lines(path: Path, log: Log) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.problems.append(f"{path}, line {number}: no JSON object with a step")
            continue
        for tag, value in record.items():
            if value is None or _is_number(value):
                log.add(tag, step, math.nan if value is None else float(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _events(path: Path, log: Log) -> None:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.util.tensor_util import make_ndarray

    size, read_up_to = path.stat().st_size, 0
    # The loader ends without a word at a record that is torn or whose checksum is wrong.
    for record in RawEventFileLoader(str(path)).Load():
        try:
            event = Event.FromString(record)
        except DecodeError:
            break
        read_up_to += len(record) + _TFRECORD_FRAME
        for value in event.summary.value:
            if value.HasField("simple_value"):
                log.add(value.tag, event.step, value.simple_value)
            elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
                log.add(value.tag, event.step, float(make_ndarray(value.tensor)))
    if read_up_to < size:
        log.problems.append(f"{path}: torn or corrupt after byte {read_up_to:,} of {size:,}")


def _wandb(path: Path, log: Log) -> None:
    data = path.read_bytes()
    if data[:4] != _WANDB_HEADER:
        log.problems.append(f"{path}: not a W&B file")
        return
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    try:
        for record in _wandb_records(data):
            message = Record.FromString(record)
            for item in (*message.run.config.update, *message.config.update):
                log.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if message.HasField("history"):
                _wandb_step(message.history, log)
    except (_Torn, DecodeError, ValueError) as error:
        log.problems.append(f"{path}: torn or corrupt: {error}")


def _wandb_step(history: Any, log: Log) -> None:
    items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in history.item}
    # W&B counts calls; hosts log the training step beside it.
    steps = (items.get(key) for key in ("train/global_step", "training/global_step", "_step"))
    step = next((int(s) for s in steps if s is not None), int(history.step.num))
    for tag, value in items.items():
        if _is_number(value) and not tag.startswith("_"):
            log.add(tag, step, float(value))


class _Torn(Exception):
    """A chunk of a W&B file is not whole."""


def _wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a ``.wandb`` file, which is a LevelDB log after a header of 7 bytes.

    W&B's Python package has the messages, and in 0.31 no reader: that is inside wandb-core.
    """
    position, record = _WANDB_FRAME, b""
    while position < len(data):
        room = _WANDB_BLOCK - position % _WANDB_BLOCK
        if room < _WANDB_FRAME:  # too little for a chunk: padding
            position += room
            continue
        head = data[position : position + _WANDB_FRAME]
        length = int.from_bytes(head[4:6], "little")
        chunk = data[position + _WANDB_FRAME : position + _WANDB_FRAME + length]
        if len(head) < _WANDB_FRAME or len(chunk) < length:
            raise _Torn(f"the last record, at byte {position:,} of {len(data):,}, is not whole")
        if zlib.crc32(head[6:7] + chunk) != int.from_bytes(head[:4], "little"):
            raise _Torn(f"wrong checksum at byte {position:,} of {len(data):,}")
        position += _WANDB_FRAME + length
        kind = head[6]  # 1: whole record; 2, 3, 4: first, middle and last part of one
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield record
