"""Shell scripts inside of YAML: a job for Kubernetes, Ray or SkyPilot, a workflow of GitHub's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import yaml

from klplug.audit.edits import Change


@dataclass(frozen=True)
class Block:
    """A script that stands in a file.

    Attributes:
        text: the script, each of its lines on the line where it stands in the file.
        places: where each of these lines begins in the file; empty where YAML writes it in another
            way; ``None`` where the file is the script.
    """

    text: str
    places: tuple[int, ...] | None = ()

    def in_file(self, changes: Sequence[Change]) -> tuple[Change, ...]:
        """Changes of the script as changes of the file."""
        if self.places is None:
            return tuple(changes)
        return tuple(replace(change, span=self._span(change.span)) for change in changes)

    def _span(self, span: tuple[int, int] | None) -> tuple[int, int] | None:
        if span is None or not self.places:
            return None
        first, last = (
            self.places[self.text.count("\n", 0, at)] + at - (self.text.rfind("\n", 0, at) + 1)
            for at in span
        )
        return first, last


def blocks(text: str, starts: Callable[[str], bool]) -> list[Block]:
    """The scripts in a YAML file that have a word which starts a trainer.

    Raises:
        yaml.YAMLError: it is none.
    """
    found: list[Block] = []
    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        found += _inside(document, text, starts, set())
    return found


def _inside(
    node: yaml.Node | None, text: str, starts: Callable[[str], bool], seen: set[int]
) -> Iterator[Block]:
    if id(node) in seen:  # an anchor, which may be within itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        values = {key.value: value for key, value in node.value}
        program, given = (_items(values.get(key)) for key in ("command", "args"))
        whole = [*program, *given]
        together = bool(program and given) and _start(whole, starts)
        if together:  # Kubernetes
            yield Block(_words(whole))
        for key, value in node.value:
            if not (together and key.value in ("command", "args")):
                yield from _inside(value, text, starts, seen)
    elif isinstance(node, yaml.SequenceNode):
        items = _items(node)
        if _start(items, starts):
            yield Block(_words(items))
        elif any(_starts_one(i, starts) for i in items) and not _SHELL.fullmatch(items[0].value):
            yield Block(_lines(items))
        else:
            for item in node.value:
                yield from _inside(item, text, starts, seen)
    elif isinstance(node, yaml.ScalarNode) and _starts_one(node, starts):
        yield _of_scalar(node, text)


def _items(node: yaml.Node | None) -> list[yaml.ScalarNode]:
    """The items of a list of words or of commands; of anything else there are none."""
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    return items if all(isinstance(item, yaml.ScalarNode) for item in items) else []


def _starts_one(node: yaml.ScalarNode, starts: Callable[[str], bool]) -> bool:
    return _started(re.split(r"[\s\"';&|()]+", node.value), starts)


def _start(items: Sequence[yaml.ScalarNode], starts: Callable[[str], bool]) -> bool:
    return _started([item.value for item in items], starts)


def _started(words: Sequence[str], starts: Callable[[str], bool]) -> bool:
    """Whether a program starts a trainer; a path to its file alone does not."""
    return any(
        starts(word) and any(map(_PROGRAM.fullmatch, words[:at])) for at, word in enumerate(words)
    )


_PROGRAM = re.compile(r"(?:.*/)?(?:python|torchrun|deepspeed|accelerate)[\d.]*|-m")
_SHELL = re.compile(r"(?:.*/)?(?:ba|da|z|k)?sh")


def _of_scalar(node: yaml.ScalarNode, text: str) -> Block:
    first = node.start_mark.line
    if node.style != "|":
        return Block("\n" * first + node.value)
    above = "\n" * (first + 1)
    lines = text.split("\n")
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line) + 1)
    places = []
    for number, line in enumerate((above + node.value).split("\n")):
        there = lines[number] if number < len(lines) else ""
        # What YAML takes away before the script's line.
        places.append(begins[min(number, len(lines) - 1)] + max(len(there) - len(line), 0))
    return Block(above + node.value, tuple(places))


def _words(items: Sequence[yaml.ScalarNode]) -> str:
    """One command: each item is a word, and stands on its line."""
    made, line = "", 0
    for item in items:
        gap = item.start_mark.line - line
        made += ("\n" if not made else " \\\n" if gap > 0 else " ") * max(gap, 1 if made else 0)
        line = max(line, item.start_mark.line)
        made += _quoted(item.value)
    return made


def _quoted(word: str) -> str:
    # $(NAME) is Kubernetes' own; nobody knows here what it stands for.
    if "$" not in word:
        return shlex.quote(word)
    return '"' + re.sub(r'([\\"`])', r"\\\1", word) + '"'


def _lines(items: Sequence[yaml.ScalarNode]) -> str:
    """Commands of one shell, one an item."""
    made = ""
    for item in items:
        below = item.start_mark.line + (item.style == "|") - made.count("\n")
        made += "\n" * max(below, 1 if made else 0) + item.value.rstrip("\n")
    return made
