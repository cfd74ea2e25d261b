"""The mean of models: its bytes worked out by hand, and every pair of models that has none."""

from __future__ import annotations

import json
import math
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klplug.cli.soup import soup
from tests.cli.conftest import Klplug

F32 = {"a.weight": (2, 2), "b.weight": (3,), "empty": (0,)}


def written(folder: Path, numbers: dict[str, list[float]], **changes: Any) -> Path:
    """A model in one file or, with ``shards``, in one for each tensor."""
    shapes = {**F32, **changes.get("shapes", {})}
    config = {"architectures": ["Tiny"], "model_type": "tiny", "vocab_size": 3}
    config["num_attention_heads"] = 2
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changes.get("config", {})}))
    vocabulary = changes.get("vocabulary", {"x": 0, "y": 1})
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    if not changes.get("shards"):
        (folder / "model.safetensors").write_bytes(file_of(numbers, shapes))
        return folder
    names = {name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate(numbers, 1)}
    for name, file in names.items():
        (folder / file).write_bytes(file_of({name: numbers[name]}, shapes))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def file_of(numbers: dict[str, list[float]], shapes: dict[str, tuple[int, ...]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in numbers.items():
        packed = struct.pack(f"<{len(values)}f", *values)
        header[name] = {
            "dtype": "F32",
            "shape": shapes[name],
            "data_offsets": [len(data), len(data) + len(packed)],
        }
        data += packed
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


ONE = {"b.weight": [1.0, 2.0, 3.0], "a.weight": [0.0, 4.0, -8.0, 0.5], "empty": []}
TWO = {"a.weight": [8.0, 0.0, 8.0, 0.5], "empty": [], "b.weight": [-1.0, 2.0, 7.0]}


@pytest.mark.parametrize("shards", [False, True])
def test_the_mean_has_the_first_models_files(
    klplug_command: Klplug, tmp_path: Path, shards: bool
) -> None:
    one = written(tmp_path / "one", ONE, shards=shards)
    two = written(tmp_path / "two", TWO, shards=not shards)
    out = tmp_path / "made" / "soup"
    done = klplug_command("soup", one, two, "--weights", "0.25,0.75", "--out", out)
    assert done.status == 0 and f"{out} = 0.25 {one} + 0.75 {two}" in " ".join(done.out.split())
    expected = {
        "b.weight": [-0.5, 2.0, 6.0],
        "a.weight": [6.0, 1.0, 4.0, 0.5],
        "empty": [],
    }
    as_if = written(tmp_path / "expected", expected, shards=shards)
    names = sorted(path.name for path in as_if.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (as_if / name).read_bytes(), name
    assert [path.name for path in out.parent.iterdir()] == ["soup"]  # nothing half made


def test_three_models_weigh_the_same_and_json_says_so(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    models = [written(tmp_path / str(i), {"b.weight": [3.0 * i] * 3}) for i in range(3)]
    done = klplug_command("soup", *models, "--out", tmp_path / "out", "--json")
    assert json.loads(done.out)["weights"] == [1 / 3] * 3
    made = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert struct.unpack("<3f", made[-12:]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("changes", "words", "told"),
    [
        ({}, ("--weights", "0.5,0.6"), "--weights 0.5,0.6: they sum to 1.1, and must sum to 1"),
        ({}, ("--weights", "0.5,0.500002"), "they sum to 1.000002, and must sum to 1"),
        ({}, ("--weights", "1"), "--weights 1: 1 of them for 2 models"),
        ({}, ("--weights", "1.5,-0.5"), "each must be a positive number"),
        ({}, ("--weights", "nan,1"), "each must be a positive number"),
        ({}, ("--weights", "half"), "--weights half: numbers with commas between"),
        ({"config": {"architectures": ["Other"]}}, (), "has architectures ['Other']"),
        ({"config": {"vocab_size": 4}}, (), "has vocab_size 4"),
        ({"config": {"num_attention_heads": 4}}, (), "has num_attention_heads 4"),
        ({"vocabulary": {"x": 1, "y": 0}}, (), "tokenizers of other vocabularies"),
        ({"shapes": {"a.weight": (4, 1)}}, (), "a.weight has shape (4, 1)"),
    ],
)
def test_what_has_no_mean_is_one_line(
    klplug_command: Klplug,
    tmp_path: Path,
    changes: dict[str, Any],
    words: tuple[str, ...],
    told: str,
) -> None:
    one, two = written(tmp_path / "one", ONE), written(tmp_path / "two", TWO, **changes)
    done = klplug_command("soup", one, two, "--out", tmp_path / "out", *words)
    assert done.status == 2 and told in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The file's header, changed; what stands behind it stays."""

    def rewrite(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        own = json.loads(data[8:end])
        text = json.dumps(change(own) or own).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])

    return rewrite


def a_says(**row: Any) -> Callable[[Path], None]:
    return header(lambda own: own["a.weight"].update(row))


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A model in shards, whose index is changed."""

    def rewrite(folder: Path) -> None:
        shutil.rmtree(folder)
        written(folder, TWO, shards=True)
        file = folder / "model.safetensors.index.json"
        own = json.loads(file.read_text())
        file.write_text(json.dumps(change(own) or own))

    return rewrite


def no_shard(folder: Path) -> None:
    index(lambda own: None)(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def content(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def number(value: float) -> Callable[[Path], None]:
    changed = {**TWO, "b.weight": [1.0, value, 3.0]}
    return lambda folder: (folder / "model.safetensors").write_bytes(file_of(changed, F32)) and None


NO_FILE = "is no file of safetensors: of a.weight its header says"
FIRST, THIRD = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (header(lambda own: [1]), "its header is no JSON object"),
        (header(lambda own: own.update({"a.weight": [1]})), NO_FILE),
        (header(lambda own: own["a.weight"].pop("dtype") and None), NO_FILE),
        (header(lambda own: own["a.weight"].pop("data_offsets") and None), NO_FILE),
        (a_says(data_offsets=[0, 16, 16]), NO_FILE),
        (a_says(data_offsets=["0", "16"]), NO_FILE),
        (a_says(data_offsets=[-16, 0]), NO_FILE),  # of the header's own bytes
        (a_says(data_offsets=[16, 0]), NO_FILE),
        (a_says(data_offsets=[4, 16]), NO_FILE),
        (a_says(shape=[2, 3]), NO_FILE),
        (a_says(data_offsets=[2**50, 2**50 + 16]), "is cut: a.weight ends at byte"),
        (no_shard, "model-00002-of-00003.safetensors can't be read: "),
        (index(lambda own: [own]), "index.json is no JSON object"),
        (index(lambda own: {"weight_map": [FIRST]}), "has no weight_map"),
        (index(lambda own: {"weight_map": {}}), "has no weight_map"),
        (index(lambda own: own["weight_map"].update(x=3)), "x is in 3, which must be a file"),
        (index(lambda own: own["weight_map"].update(x=f"../one/{FIRST}")), "must be a file beside"),
        (index(lambda own: own["weight_map"].update(x=FIRST)), f"x is in {FIRST}, and it is not"),
        (
            index(lambda own: own["weight_map"].update({"a.weight": THIRD})),
            f"says that a.weight is in {THIRD}, and it is not",
        ),
        (content("config.json", "[]"), "config.json is no JSON object"),
        (content("tokenizer.json", "[]"), "tokenizer.json is no JSON object"),
        (number(math.nan), "b.weight has numbers that are not finite in the mean"),
        (number(math.inf), "b.weight has numbers that are not finite in the mean"),
    ],
)
def test_a_model_that_is_broken_is_one_line(
    klplug_command: Klplug, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    one, two = written(tmp_path / "one", ONE), written(tmp_path / "two", TWO)
    change(two)
    for models in ((one, two), (two, one)):
        done = klplug_command("soup", *models, "--out", tmp_path / "out")
        assert done.status == 2 and told in done.err and len(done.err.strip().splitlines()) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_one_tensor_of_one_model_is_read_at_a_time(tmp_path: Path) -> None:
    """What torch holds, the mean itself, Python does not count."""
    size, names = 1 << 18, [f"{i}.weight" for i in range(4)]
    models = [
        written(
            tmp_path / str(i),
            dict.fromkeys(names, [float(i)] * size),
            shapes=dict.fromkeys(names, (size,)),
        )
        for i in range(3)
    ]
    tracemalloc.start()
    soup(models, None, tmp_path / "out")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4 * size < most < 1.5 * 4 * size


def test_a_folder_that_cannot_be_made_is_named(klplug_command: Klplug, tmp_path: Path) -> None:
    models = [written(tmp_path / "one", ONE), written(tmp_path / "two", TWO)]
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "soup"
    done = klplug_command("soup", *models, "--out", out)
    assert done.status == 2 and f"--out {out} can't be written: " in done.err


def test_folders_that_can_be_no_soup(klplug_command: Klplug, tmp_path: Path) -> None:
    one = written(tmp_path / "one", ONE)
    lacking = written(tmp_path / "lacking", {"b.weight": [1.0, 2.0, 3.0]})
    (tmp_path / "empty").mkdir()
    cut = written(tmp_path / "cut", TWO)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-4])
    text = written(tmp_path / "text", TWO)
    (text / "model.safetensors").write_text("no tensors, but more than eight characters")
    for models, told in (
        ([one], "two models at least"),
        ([one, one / ".." / "one"], "each named once"),
        ([one, tmp_path / "empty"], "has neither model.safetensors nor"),
        ([one, lacking], "has no tensor a.weight"),
        ([one, cut], "is cut: b.weight ends at byte"),
        ([one, text], "is no file of safetensors"),
    ):
        done = klplug_command("soup", *models, "--out", tmp_path / "out")
        assert done.status == 2 and told in done.err, told
        assert not (tmp_path / "out").exists()
    done = klplug_command("soup", one, written(tmp_path / "two", TWO), "--out", one)
    assert done.status == 2 and "is there already" in done.err
