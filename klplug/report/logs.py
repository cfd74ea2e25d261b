"""What trainers leave behind, read as far as it goes: scalars by tag and step, and what was torn.

TensorBoard's event files, ``.wandb`` files of offline W&B runs, JSON lines with a step (flat, or
with the scalars under ``data``), CSV with a column of steps, and what was printed to a console.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klplug.numerics import number_of

EVENTS = "events.out.tfevents."
WANDB = ".wandb"
CONSOLE = (".log", ".txt", ".out")
TOLD = 3  # lines of a file that are named each
SNIFFED = 65536  # bytes at the start of a file, by which it is told what it is

# Columns and keys that count training steps; the first that is there. W&B counts calls as _step.
STEPS = (
    "train/global_step",
    "training/global_step",
    "step",
    "global_step",
    "eval/global_step",
    "_step",
)

# What consoles say of a step: ``step:3 - actor/kl:0.1 - ...``, or words and a dictionary.
_DASHED = re.compile(r"\bstep:(\d+) - (?=\S+:)(.*)")
_PAIR = re.compile(r"(?:^| - )([^\s:]+):(\S+)")
_WORDED = re.compile(r"\b[Gg]lobal[ _]step (\d+)(?:: |, eval_metrics: )(\{.*\})")
_EVALUATED = "eval_metrics"
_ITEM = re.compile(r"'([^']+)': (?:[\w.]+\()?(-?(?:[\d.]+(?:e[+-]?\d+)?|inf|nan))")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

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
    times: list[float] = field(default_factory=list)  # wall clock, where a format has it
    paused: float = 0.0  # seconds of these in which nothing ran

    def add(self, tag: str, step: int, value: float) -> None:
        series = self.scalars[tag]
        # A step that comes again is of a run that was resumed before it: what it had logged beyond
        # is of a branch that was given up.
        if step in series and step != next(reversed(series)):
            series = self.scalars[tag] = _before(step, series)
        series[step] = value

    @property
    def first(self) -> float:
        """The first step that was logged; infinite where none was."""
        return min((min(series) for series in self.scalars.values()), default=math.inf)

    def follows(self, earlier: Log) -> bool:
        """Whether all of it was written after the other, as its clock says."""
        return bool(self.times and earlier.times) and min(self.times) >= max(earlier.times)

    def join(self, other: Log, resumed: bool) -> None:
        """Add what another file has of the same run; where that was ``resumed`` with it, in the
        place of what stood at its first step and beyond."""
        if resumed:
            before = {tag: _before(other.first, own) for tag, own in self.scalars.items()}
            self.scalars = defaultdict(dict, {tag: own for tag, own in before.items() if own})
        for tag, series in other.scalars.items():
            self.scalars[tag].update(series)
        self.config |= other.config
        self.problems += other.problems
        if self.times and other.times:
            self.paused += max(0.0, min(other.times) - max(self.times))
        self.paused += other.paused
        self.times += other.times


def _before(first: float, series: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in series.items() if step < first}


Reader = Callable[[Path, Log], None]


def kind(path: Path) -> Reader | None:
    """The function that reads a file; ``None`` if it is no log. By its name, then by its start."""
    name, suffix = path.name, path.suffix
    if name.startswith(EVENTS):
        return _events
    if suffix == WANDB:
        return _wandb
    if name == "metrics.jsonl":
        return _json_lines
    if suffix not in (".jsonl", ".csv", *CONSOLE):
        return None
    try:
        with path.open("rb") as file:
            # Some programs of Windows put a byte order mark first.
            start = file.read(SNIFFED).decode("utf-8-sig", errors="replace")
    except OSError:
        return None
    if suffix == ".jsonl":
        return _json_lines if re.match(r'\{"step": ?\d', start) else None
    if suffix == ".csv":
        columns = next(csv.reader(start.splitlines()), [])
        return _table if _step_column(columns) is not None else None
    # Training says its first step late: a console's log is read to the end.
    return _console if any(_spoken(path)) else None


def read(path: Path, log: Log) -> None:
    """Add what can be read of one file to an empty ``log``, and to its problems what can't."""
    reader = kind(path)
    assert reader is not None, f"{path} is no log"
    try:
        reader(path, log)
    except OSError as error:
        log.problems.append(f"{path}: {error.strerror or error}")
    except csv.Error as error:
        log.problems.append(f"{path}: {error}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        # protobuf's module is google: nothing to install by that name.
        extra = "wandb" if package == "wandb" else "'klplug[report]'"
        log.problems.append(f"{path}: reading it needs {package}: pip install {extra}")
    else:
        # One that has a time was written well: text, say, stands in a file of its own.
        if not log.scalars and not log.times:
            log.problems.append(f"{path}: no scalar in it")


def _json_lines(path: Path, log: Log) -> None:
    wrong = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            record = record.pop("data", record)
            items = list(record.items())
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError):
            wrong.append(number)
            continue
        for tag, value in items:
            found = math.nan if value is None else number_of(value)
            if found is not None:
                log.add(tag, step, found)
    for number in wrong[:TOLD]:
        log.problems.append(f"{path}, line {number}: no JSON object with a step")
    if more := len(wrong[TOLD:]):
        log.problems.append(f"{path}: {more} more lines are no JSON object with a step")


def _step_column(columns: list[str]) -> str | None:
    named = {column.strip().lower(): column for column in reversed(columns)}
    return next((named[step] for step in STEPS if step in named), None)


def _several_runs(columns: Sequence[str]) -> list[str]:
    """The runs of a W&B export that has one tag of more than one of them."""
    named: dict[str, list[str]] = defaultdict(list)
    for column in columns:
        run, _, tag = column.rpartition(" - ")
        if run and run not in named[tag]:
            named[tag].append(run)
    return max(named.values(), key=len) if any(len(runs) > 1 for runs in named.values()) else []


def _table(path: Path, log: Log) -> None:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        steps = _step_column(list(rows.fieldnames or ()))
        assert steps is not None
        if runs := _several_runs(rows.fieldnames or ()):
            raise csv.Error(f"columns of several runs ({', '.join(runs)}): export one run a file")
        found: list[tuple[int, dict[str, str]]] = []
        for row in rows:
            try:
                found.append((int(float(row[steps])), row))
            except (TypeError, ValueError, OverflowError):
                log.problems.append(f"{path}, line {rows.line_num}: no step")
        # A table may be sorted in any way.
        for step, row in sorted(found, key=lambda pair: pair[0]):
            for column, cell in row.items():
                # W&B's export names its columns "run - tag", and adds "... __MIN".
                tag = column.rpartition(" - ")[2] if column else ""
                if column == steps or not cell or tag.endswith(("__MIN", "__MAX")):
                    continue
                try:
                    log.add(tag, step, float(cell))
                except (TypeError, ValueError):
                    continue


def _spoken(path: Path) -> Iterator[tuple[int, dict[str, float], bool]]:
    """Steps that a console printed, with their scalars, and whether the line ends.

    Of one that does not, the last number may be half of one: it is left out.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if "step" not in line:
                continue
            whole, line = line.endswith("\n"), _ESCAPES.sub("", line)
            if found := _DASHED.search(line):
                pairs = _PAIR.findall(found[2])
                values = {tag: _number(value) for tag, value in pairs[: None if whole else -1]}
            elif found := _WORDED.search(line):
                values = _dictionary(found[2])
                if _EVALUATED in found[0]:
                    values = {f"eval/{tag}": value for tag, value in values.items()}
            else:
                continue
            if kept := {tag: value for tag, value in values.items() if value is not None}:
                yield int(found[1]), kept, whole or found[0].endswith("}")


def _number(text: str) -> float | None:
    # A number of numpy prints as np.float64(0.5).
    found = re.fullmatch(r"(?:[\w.]+\()?([^()]+)\)?", text)
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None


def _dictionary(text: str) -> dict[str, float | None]:
    try:
        made = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # nan, or numbers of numpy: no literals
        return {tag: _number(value) for tag, value in _ITEM.findall(text)}
    return {tag: number_of(value) for tag, value in made.items()}


def _console(path: Path, log: Log) -> None:
    for step, values, whole in _spoken(path):
        for tag, value in values.items():
            log.add(tag, step, value)
        if not whole:
            log.problems.append(f"{path}: ends within the line of step {step}")


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
        log.times.append(event.wall_time)
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
    except (_Torn, DecodeError, ValueError, OverflowError) as error:
        log.problems.append(f"{path}: torn or corrupt: {error}")


def _wandb_step(history: Any, log: Log) -> None:
    items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in history.item}
    steps = (number_of(items.get(key)) for key in STEPS)
    step = next((int(s) for s in steps if s is not None), int(history.step.num))
    for tag, value in items.items():
        # W&B writes numbers that are not finite as words.
        found = math.nan if value in ("NaN", "Infinity", "-Infinity") else number_of(value)
        if found is None:
            continue
        if tag == "_timestamp" and math.isfinite(found):
            log.times.append(found)
        if not tag.startswith("_"):
            log.add(tag, step, found)


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
