"""What every command ends with."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Exit statuses of ``klplug``; a wrong use of the command line is ``UNREADABLE`` too."""

    CLEAN = 0
    FINDINGS = 1
    UNREADABLE = 2


class Unreadable(Exception):
    """What was asked about can't be read. The message names it and says what is allowed."""
