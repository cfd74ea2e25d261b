"""What gradient does a training command follow? Reads it, runs nothing.

>>> from klplug.audit import audit
>>> audit(["python", "-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo"]).gradient
'none'
"""

from klplug.audit.command import audit
from klplug.audit.errors import AuditError
from klplug.audit.findings import RULES, SEVERITIES, Finding, Rule
from klplug.audit.report import Report
from klplug.audit.verdict import Verdict

__all__ = [
    "RULES",
    "SEVERITIES",
    "AuditError",
    "Finding",
    "Report",
    "Rule",
    "Verdict",
    "audit",
]
