"""``klplug soup A B --out DIR``: the weighted mean of models, as a model.

A file of safetensors is the length of its header (8 bytes, little endian), the header (JSON: dtype,
shape and offsets by name), and the bytes of the tensors. The mean has the first model's files,
header for header, so it is written as it is read: one tensor after another.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from klplug.cli.output import AsJson, console, print_json
from klplug.cli.status import Unreadable

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What has a mean. A tensor of another dtype must be the same in all models."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
ALIKE = ("architectures", "model_type", "vocab_size")
LIKE_WHERE_SAID = ("num_attention_heads", "num_key_value_heads", "hidden_act", "rope_theta")
"""What two architectures differ in whose tensors are of the same shapes."""


class NoSoup(Unreadable, ValueError):
    """Models that have no mean, or that can't be read."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, and the header's words for it."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    size: int

    def bytes(self) -> bytearray:
        found = bytearray(self.size)
        with self.file.open("rb") as content:
            content.seek(self.start)
            content.readinto(found)
        return found

    def tensor(self) -> Tensor:
        """Flat, in its own dtype."""
        import torch

        return torch.frombuffer(self.bytes(), dtype=getattr(torch, DTYPES[self.dtype]))


@dataclass(frozen=True)
class Model:
    """A folder of safetensors: its files in order, and its tensors by name, in the files' order."""

    folder: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]

    @classmethod
    def read(cls, folder: Path) -> Model:
        index, one = folder / INDEX, folder / ONE
        places: dict[str, str] = {}
        if index.is_file():
            places = _places(index)
            files = tuple(folder / name for name in dict.fromkeys(places.values()))
        elif one.is_file():
            files = (one,)
        else:
            raise NoSoup(f"{folder} has neither {ONE} nor {INDEX}: a model's folder is needed")
        entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _entries(file):
                if name in entries:
                    raise NoSoup(f"{folder} has {name} twice")
                entries[name] = entry
        for name, place in places.items():
            if name not in entries or entries[name].file.name != place:
                raise NoSoup(f"{index} says that {name} is in {place}, and it is not")
        return cls(folder, files, entries)

    def json(self, name: str) -> Any:
        path = self.folder / name
        return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NoSoup(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise NoSoup(f"{path} is no JSON object")
    return found


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor, by the index of a model in shards."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise NoSoup(f"{index} has no weight_map, which names the file of each tensor")
    for name, place in places.items():
        if not isinstance(place, str) or Path(place).name != place:
            raise NoSoup(f"{index}: {name} is in {place!r}, which must be a file beside the index")
    return places


def _header(file: Path) -> bytes:
    """The length and the header, as they stand in the file."""
    try:
        with file.open("rb") as content:
            length = content.read(8)
            size = struct.unpack("<Q", length)[0]
            if size > os.stat(file).st_size:
                raise NoSoup(f"{file} is no file of safetensors: its header has {size} bytes")
            return length + content.read(size)
    except (OSError, struct.error) as error:
        raise NoSoup(f"{file} can't be read: {error}") from None


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    header = _header(file)
    try:
        tensors = json.loads(header[8:])
    except ValueError as error:
        raise NoSoup(f"{file} is no file of safetensors: {error}") from None
    if not isinstance(tensors, dict):
        raise NoSoup(f"{file} is no file of safetensors: its header is no JSON object")
    tensors.pop("__metadata__", None)
    for name, row in tensors.items():
        if not _is_row(row):
            raise NoSoup(f"{file} is no file of safetensors: of {name} its header says {row!r}")
    size = file.stat().st_size
    for name, row in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (len(header) + offset for offset in row["data_offsets"])
        if end > size:
            raise NoSoup(f"{file} is cut: {name} ends at byte {end}, and the file at {size}")
        yield name, Entry(file, begin, row["dtype"], tuple(row["shape"]), end - begin)


def _is_row(row: Any) -> bool:
    """Whether a header can say so of a tensor: its bytes are as many as its numbers take."""
    try:
        dtype, shape, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]
        size = SIZES[dtype] * math.prod(shape) if dtype in SIZES else end - begin
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end - begin))
        return whole and bool(end - begin == size)
    except (KeyError, TypeError, ValueError):
        return False


def soup(folders: Sequence[Path], weights: Sequence[float] | None, out: Path) -> list[float]:
    """Write the weighted mean of the models in ``folders`` into ``out``; the weights are returned.

    Files, shards, index, dtypes, configuration and tokenizer are the first model's. Each tensor's
    mean is taken in float32, of float64 in float64, and rounded once; one tensor of one model is in
    memory beside it. ``out`` is there when it is whole.

    Raises:
        NoSoup: names what is wrong, the value, and what is allowed.
    """
    shares = _shares(folders, weights)
    models = [Model.read(folder) for folder in folders]
    for other in models[1:]:
        _check_alike(models[0], other)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NoSoup(f"--out {out} is there already: name a folder that is not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            for path in sorted(models[0].folder.iterdir()):
                if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
                    shutil.copy2(path, scratch / path.name)
            for file in models[0].files:
                with (scratch / file.name).open("wb") as content:
                    _write(file, models, shares, content)
            scratch.chmod(0o755)
            scratch.replace(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise NoSoup(f"--out {out} can't be written: {error}") from None
    return shares


def _shares(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        named = " ".join(map(str, folders))
        raise NoSoup(f"a soup is of two models at least, each named once, got {named}")
    if weights is None:
        return [1 / len(folders)] * len(folders)
    written = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(folders):
        raise NoSoup(f"--weights {written}: {len(weights)} of them for {len(folders)} models")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise NoSoup(f"--weights {written}: each must be a positive number")
    if abs(sum(weights) - 1) > 1e-6:
        raise NoSoup(f"--weights {written}: they sum to {sum(weights):.9g}, and must sum to 1")
    return list(weights)


def _check_alike(first: Model, other: Model) -> None:
    configs = [model.json("config.json") for model in (first, other)]
    for key in (*ALIKE, *LIKE_WHERE_SAID):
        own, its = (config.get(key) for config in configs)
        if own != its and (key in ALIKE or None not in (own, its)):
            raise NoSoup(
                f"{other.folder} has {key} {its!r} and {first.folder} {own!r}: a mean is of models "
                "of one architecture"
            )
    vocabularies = [_vocabulary(model) for model in (first, other)]
    if all(vocabularies) and vocabularies[0] != vocabularies[1]:
        raise NoSoup(f"{other.folder} and {first.folder} have tokenizers of other vocabularies")
    if lacking := first.entries.keys() ^ other.entries.keys():
        name = min(lacking)
        has, lacks = (first, other) if name in first.entries else (other, first)
        raise NoSoup(f"{lacks.folder} has no tensor {name}, and {has.folder} has")
    for name, own in first.entries.items():
        its = other.entries[name]
        if own.shape != its.shape:
            raise NoSoup(
                f"{name} has shape {its.shape} in {other.folder} and {own.shape} in {first.folder}"
            )
        if own.dtype != its.dtype and not {own.dtype, its.dtype} <= {*DTYPES}:
            raise NoSoup(
                f"{name} has dtype {its.dtype} in {other.folder} and {own.dtype} in {first.folder}"
            )


def _vocabulary(model: Model) -> Any:
    own = model.json("tokenizer.json").get("model")
    return own.get("vocab") if isinstance(own, dict) else None


def _write(file: Path, models: Sequence[Model], shares: Sequence[float], to: BinaryIO) -> None:
    """One file of the first model's, with the mean in the place of each of its tensors."""
    to.write(_header(file))
    for name, own in models[0].entries.items():
        if own.file != file:
            continue
        if own.dtype not in DTYPES:
            first = own.bytes()
            if any(model.entries[name].bytes() != first for model in models[1:]):
                raise NoSoup(f"{name} is of dtype {own.dtype}, which has no mean, and not the same")
            to.write(first)
            continue
        to.seek(own.start)
        mean = _mean([model.entries[name] for model in models], shares)
        if not mean.isfinite().all():
            raise NoSoup(
                f"{name} has numbers that are not finite in the mean. A model has such, or larger "
                f"ones than {DTYPES[own.dtype]} has, the dtype of {models[0].folder}"
            )
        import torch

        to.write(mean.view(torch.uint8).numpy().data)


def _mean(entries: Sequence[Entry], shares: Sequence[float]) -> Tensor:
    import torch

    wide = torch.float64 if entries[0].dtype == "F64" else torch.float32
    total = torch.zeros(math.prod(entries[0].shape), dtype=wide)
    for entry, share in zip(entries, shares, strict=True):
        if entry.size:
            total.add_(entry.tensor(), alpha=share)
    return total.to(getattr(torch, DTYPES[entries[0].dtype]))


def soup_command(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="Folders of safetensors, two or more.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W...",
            help="A weight for each model, with commas, of sum 1; else all alike.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Average models into one, a tensor at a time: as a reference, or to start from."""
    try:
        numbers = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise NoSoup(f"--weights {weights}: numbers with commas between, as 0.5,0.5") from None
    shares = soup(models, numbers, out)
    if as_json:
        print_json({"out": str(out), "models": [*map(str, models)], "weights": shares})
        return
    parts = " + ".join(f"{share:g} {model}" for share, model in zip(shares, models, strict=True))
    console().print(f"{out} = {parts}")
