"""What klplug would refuse a host's command for, before anything starts."""

from collections.abc import Sequence

from klplug.audit.command import audit
from klplug.audit.errors import AuditError
from recipes.shared.settings import SettingsError


def check_served(kl_type: str, command: Sequence[str]) -> None:
    """Else the host would refuse the command, minutes later.

    Raises:
        SettingsError: klplug does not serve the kl_type there, as its audit reads the command.
    """
    try:
        findings = audit(command).findings
    except AuditError:  # of a release that it does not know: the host will say
        return
    for found in findings:
        if found.id == "klplug-refuses":
            raise SettingsError(f"KL_TYPE={kl_type}: {found.message}")
