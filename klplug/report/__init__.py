"""Pictures and numbers of finished runs: one page from the logs of either host."""

from klplug.report.page import Report, report

__all__ = ["Report", "report"]
