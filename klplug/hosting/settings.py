"""What a user asked, and why it is refused: the same words for a run and for its audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from klplug.controllers import KLController, kl_controller
from klplug.spec import KLSpec


class SettingsError(ValueError):
    """The command line asks for something that can't be, said before anything starts."""


class Unknown(Exception):
    """A value that only a run can tell: what rests on it is neither said nor ruled out."""


class Settings(Protocol):
    """The settings of one run, by the host's own keys: a live config, or what an audit read."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value, with the release's defaults; ``default`` where it has no such setting.

        Raises:
            Unknown: only a run could tell.
        """

    def has(self, key: str) -> bool:
        """Whether the release, or the command, has this setting, or any inside of it."""

    def wrote(self, key: str) -> bool:
        """Whether the command itself says it: a default or a config file contradicts nothing."""

    def named(self, key: str) -> str:
        """The key as a user of this release writes it."""

    def below(self, key: str) -> Any:
        """What is written inside of a key: a mapping, or whatever else stands there."""


@dataclass(frozen=True)
class Asked:
    """What a user asked, checked; each adapter's plan adds what its hooks need to know.

    ``kl_coef`` is nan where only a run could tell.
    """

    spec: KLSpec
    kl_coef: float
    kl_ctrl: str = "fixed"
    kl_target: float | None = None
    kl_horizon: float | None = None
    divides_by_length: bool = False

    def controller(self) -> KLController:
        return kl_controller(self.kl_ctrl, self.kl_coef, self.kl_target, self.kl_horizon)


@dataclass(frozen=True)
class Refusal:
    """One reason why a run is not started.

    Attributes:
        id: the row that says so.
        key: the setting that it is about; ``None`` for the ``kl_type`` itself.
        words: one line that names the setting, its value and what is allowed.
    """

    id: str
    key: str | None
    words: str


Row = Callable[[Any, Settings], Iterator[tuple[str | None, str]]]


def refusals(rows: Iterable[Row], plan: Asked, settings: Settings) -> Iterator[Refusal]:
    """Every refusal that is certain; a row yields the setting that it is about, and its words."""
    for row in rows:
        try:
            for key, words in row(plan, settings):
                yield Refusal(row.__name__, key, words)
        except Unknown:
            continue


def no_hidden_states(plan: Asked, settings: Settings) -> Iterator[tuple[str | None, str]]:
    """A row of every host: what the core can do, and no adapter hands over yet."""
    for term in plan.spec.terms:
        if term.vocab == "exact":
            yield (
                None,
                f"kl_type {term}: vocab=exact is refused: klplug gets no hidden states from this "
                f"host yet. In a loop of your own klplug.exact_kl serves it; here use "
                f"'{term.estimator}_as_loss'",
            )


@dataclass(frozen=True)
class Edit:
    """One change to a command: all that sets ``key`` is deleted, and ``words`` are added.

    Attributes:
        key: a setting.
        words: what to add in its stead; empty where it is deleted.
        value: what they set it to, as the host reads it.
    """

    key: str
    words: tuple[str, ...] = ()
    value: Any = None


def overridden(
    set_to: Mapping[str, Any], decided: Iterable[str], settings: Settings
) -> list[tuple[str, Any]]:
    """Keys that the command writes and ``kl_type`` decides otherwise, with what they were."""
    return [
        (key, value)
        for key in decided
        if settings.wrote(key) and (value := settings.get(key)) != set_to.get(key, _NOTHING)
    ]


_NOTHING = object()
