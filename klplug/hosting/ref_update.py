"""``ref_update``: when the reference follows the policy, and how far."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class RefUpdate:
    """After each ``every`` steps the reference is ``decay`` of itself and the rest of the policy.

    Attributes:
        every: steps of the trainer, counted from the first one and on through resumes.
        decay: in [0, 1); 0 makes the reference the policy.
    """

    every: int
    decay: float = 0.0

    @classmethod
    def parse(cls, written: str) -> RefUpdate:
        """From ``reset:200`` or ``ema:0.99,every=10``.

        Raises:
            ValueError: names the part that is wrong, and what is allowed.
        """
        said = f"klplug.ref_update={written}"
        kind, _, rest = written.partition(":")
        number, *options = rest.split(",")
        if kind == "reset" and not options:
            return cls(_steps(number, "N", said))
        if kind == "ema" and len(options) < 2:
            every = 1
            if options:
                key, _, value = options[0].partition("=")
                if key != "every":
                    raise ValueError(f"{said}: the option {key!r} is unknown. {_FORMS}")
                every = _steps(value, "every", said)
            return cls(every, _decay(number, said))
        known = kind in ("reset", "ema")
        wrong = f"{','.join(options)!r} is too much" if known else f"{kind!r} is unknown"
        raise ValueError(f"{said}: {wrong}. {_FORMS}")

    @property
    def keeps_nothing(self) -> bool:
        """Whether each step but the first starts with the policy itself as the reference."""
        return self.every == 1 and self.decay == 0

    def is_due(self, step: int) -> bool:
        """Whether the reference follows once this step is done, the first one being 1."""
        return step % self.every == 0


_FORMS = "Write reset:N, as in reset:200, or ema:DECAY,every=N, as in ema:0.99,every=10"


def _steps(text: str, name: str, said: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ValueError(f"{said}: {name} is {text!r}, and must be a whole number from 1 up")
    return int(text)


def _decay(text: str, said: str) -> float:
    try:
        decay = float(text)
    except ValueError:
        decay = -1.0
    if not 0 < decay < 1:
        raise ValueError(f"{said}: the decay is {text!r}, and must be above 0 and below 1")
    return decay
