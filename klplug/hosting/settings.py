"""What a user asked, and of which settings: the same for a run and for its audit."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from klplug.controllers import CONTROLS, KLController, kl_controller
from klplug.controllers import SETTINGS as CONTROLLER_SETTINGS
from klplug.hosting.ref_update import RefUpdate
from klplug.hosting.state import Reference
from klplug.numerics import number_of
from klplug.spec import KLSpec


class SettingsError(ValueError):
    """The command line asks for something that can't be, said before anything starts."""


class Unknown(Exception):
    """A value that only a run can tell: what rests on it is neither said nor ruled out."""


class Settings(Protocol):
    """The settings of one run, by the host's own keys: a live config, or what an audit read."""

    @property
    def trainer(self) -> str:
        """The module or file that starts the run; empty where another process started it."""

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


def number(settings: Settings, key: str, default: float | None = None) -> float:
    """A setting that is to be a number; ``default`` where there is none.

    Raises:
        Unknown: only a run could tell, or it is no number, which the host itself will say.
    """
    value = number_of(settings.get(key, default))
    if value is None or not math.isfinite(value):
        raise Unknown(key)
    return value


def started() -> str:
    """The module that ``python -m`` started this process with; empty where there is none."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else ""


Said = Iterator[tuple[str | None, str]]
"""What a row yields: the setting that it is about, and one line."""


@dataclass(frozen=True)
class Asked:
    """What a user asked, checked; each adapter's plan adds what its hooks need to know.

    ``kl_coef`` is nan where only a run could tell. ``model`` is the policy's, and the reference's
    too where ``ref_model`` names no other; an audit does not ask.
    """

    spec: KLSpec
    kl_coef: float
    kl_ctrl: str = "fixed"
    kl_target: float | None = None
    kl_horizon: float | None = None
    kl_band: float | None = None
    kl_end: float | None = None
    kl_steps: float | None = None
    divides_by_length: bool = False
    model: str | None = None
    ref_model: str | None = None
    ref_update: str | None = None
    source: str | None = None
    teacher: str | None = None

    @property
    def is_active(self) -> bool:
        return self.spec.measures

    @property
    def over_vocabulary(self) -> bool:
        """Whether it needs the policy's hidden states, and of the reference more than log-probs."""
        return self.vocab != "sample"

    @property
    def vocab(self) -> str:
        """That of the term over the vocabulary, which a sum has one of at most."""
        return next((term.vocab for term in self.spec.terms if term.over_vocabulary), "sample")

    @property
    def needs_reference(self) -> bool:
        """Whether any term is to the reference model, and not to the sampler.

        Of answers that the reference gave itself its log-probs are stored.
        """
        return self.source is None and "ref_log_probs" in self.spec.requires

    @property
    def needs_teacher(self) -> bool:
        """Whether any term is to a second frozen model."""
        return "teacher_log_probs" in self.spec.requires

    @property
    def in_reward(self) -> KLSpec:
        return self.spec.placed("in_reward")

    @property
    def as_loss(self) -> KLSpec:
        return self.spec.placed("as_loss")

    @property
    def words(self) -> str:
        """What was asked, for the line that says what a run does."""
        coef = f" kl_coef={self.kl_coef:g}" if self.spec.terms else ""
        reference = "" if self.ref_model is None else f" ref_model={self.ref_model}"
        update = "" if self.ref_update is None else f" ref_update={self.ref_update}"
        source = "" if self.source is None else f" source={self.source}"
        teacher = "" if self.teacher is None else f" teacher={self.teacher}"
        return f"kl_type={self.spec}{coef}{reference}{update}{teacher}{source}"

    def models(self) -> dict[str, Reference]:
        """What the KL is to, by role: the reference, the teacher, or as the source the reference's
        own answers, in whose place no model is loaded."""
        paths = {
            "reference": (self.ref_model or self.model) if self.needs_reference else None,
            "teacher": self.teacher,
            "source": self.source,
        }
        return {role: Reference.of(path) for role, path in paths.items() if path is not None}

    def moving(self) -> RefUpdate | None:
        """How the reference follows the policy; ``None`` where it stays as it is.

        Raises:
            ValueError: names what is wrong, and what is allowed.
        """
        return None if self.ref_update is None else RefUpdate.parse(self.ref_update)

    def controller(self) -> KLController:
        if self.kl_ctrl != "fixed" and not self.spec.terms:
            raise SettingsError(
                f"kl_ctrl={self.kl_ctrl} with kl_type {self.spec}: there is no coefficient to "
                "move. Leave it out"
            )
        # A coefficient that only a run could tell is not refused for what it might be.
        start = 1.0 if math.isnan(self.kl_coef) else self.kl_coef
        settings = {name: getattr(self, name) for name in CONTROLLER_SETTINGS}
        try:
            return kl_controller(self.kl_ctrl, start, **settings)
        except TypeError as error:
            raise SettingsError(str(error)) from None

    @property
    def is_driven(self) -> bool:
        """Whether a KL moves the coefficient, so that there must be one to measure."""
        return CONTROLS[self.kl_ctrl].driven


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
