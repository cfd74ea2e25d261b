"""A program with its arguments, as a script's walk meets it, and what else it may be.

Where a condition is not decided, a command is several: the words that follow from each way it can
go are its alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from klplug.audit.shell.values import (
    DEFAULT_IFS,
    Decision,
    Value,
    Word,
    decided,
    decisions,
    fields,
    number_of_runs,
    runs,
    usual,
    word,
)

_MAX_ALTERNATIVES = 64


@dataclass(frozen=True)
class Command:
    """A program with its arguments.

    Attributes:
        words: the program and its arguments, if every condition that is not decided goes its
            usual way (no variable set from outside, no argument passed).
        line, last_line: the lines it covers.
        end: where it ends in the script's text; ``None`` where it stands in another text.
        reached: ``False`` for one that is run only if a variable is set from outside, or an
            argument passed.
        sure: ``False`` for one that hangs on a condition which is not decided.
    """

    words: tuple[Word, ...]
    line: int
    last_line: int
    reached: bool = True
    sure: bool = True
    end: int | None = field(default=None, repr=False, compare=False)
    unsplit: tuple[Value, ...] = field(default=(), repr=False, compare=False)
    ifs: str = field(default=DEFAULT_IFS, repr=False, compare=False)

    @property
    def conditions(self) -> tuple[int, ...]:
        """Lines of the conditions that it hangs on and that are not decided."""
        return tuple(sorted({decision.line for decision in decisions(*self.unsplit)}))

    def alternatives(
        self, bears: Callable[[str], bool] = lambda text: True
    ) -> list[tuple[Word, ...]]:
        """What else the command may be, where a condition is not decided; ``words`` first.

        Args:
            bears: whether a word bears on what the caller asks; commands that differ in other
                words alone count as one.

        Returns:
            At most 64; ``words`` alone, its differing words marked as unknown, if there are more.
        """
        found: dict[Decision, None] = {}
        for value in self.unsplit:
            here = list(decisions(value))
            if not here or number_of_runs(here) > _MAX_ALTERNATIVES:
                found |= dict.fromkeys(here)
                continue
            for at, decision in enumerate(here):
                others = here[:at] + here[at + 1 :]
                if any(self._differs(value, taken, decision, bears) for taken in runs(others)):
                    found[decision] = None
        if not found:
            return [self.words]
        hanging = list(found)
        if number_of_runs(hanging) > _MAX_ALTERNATIVES:
            return [self._marked()]
        seen: dict[tuple[str, ...], tuple[Word, ...]] = {}
        for taken in runs(hanging):
            words = tuple(self._split(taken))
            seen.setdefault(tuple(w.text for w in words if bears(w.text)), words)
        return list(seen.values())

    def _differs(
        self,
        value: Value,
        taken: dict[Decision, int],
        decision: Decision,
        bears: Callable[[str], bool],
    ) -> bool:
        made = [
            [
                w
                for pieces in fields(usual(decided(value, {**taken, decision: option})), self.ifs)
                if bears((w := word(pieces)).text)
            ]
            for option in range(decision.options)
        ]
        return any(other != made[0] for other in made[1:])

    def _split(self, taken: dict[Decision, int]) -> Iterator[Word]:
        for value in self.unsplit:
            for pieces in fields(usual(decided(value, taken)), self.ifs):
                yield word(pieces)

    def _marked(self) -> tuple[Word, ...]:
        words: list[Word] = []
        for value in self.unsplit:
            found = list(decisions(value))
            lines = ", ".join(dict.fromkeys(str(d.line) for d in found))
            why = (f"it hangs on conditions that are not decided (line {lines})",)
            for pieces in fields(usual(value), self.ifs):
                made = word(pieces)
                words.append(replace(made, unknown=made.unknown + why) if found else made)
        return tuple(words)
