"""What klplug would refuse a host's command for, before anything starts."""

from collections.abc import Sequence

from klplug.audit.command import audit
from klplug.audit.errors import AuditError


def refusal(command: Sequence[str]) -> str | None:
    """The first refusal, as klplug's audit reads the command; None where it knows of none."""
    try:
        findings = audit(command).findings
    except AuditError:  # of a release that it does not know: the host will say
        return None
    refused = (found.message for found in findings if found.id == "klplug-refuses")
    return next(refused, None)
