"""The one error of the audit."""


class AuditError(ValueError):
    """A file or command that can't be audited: names the thing, and what is accepted."""


class NoCommand(AuditError):
    """A file in which nothing starts a trainer that klplug audits: among others it is counted."""
