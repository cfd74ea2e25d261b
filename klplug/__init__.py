"""KL regularisation for RL on language models: one string, one gradient, on every host.

>>> import klplug
>>> term = klplug.kl_term("k2_as_loss,ratio=none", log_probs, ref_log_probs, mask)  # doctest: +SKIP
>>> loss = policy_loss + kl_coef * klplug.aggregate(term.loss, mask)  # doctest: +SKIP
"""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

from klplug.catalogue import KLType, kl_types
from klplug.controllers import AdaptiveKL, FixedKL, KLController, kl_controller
from klplug.samples import Samples, SampleWeight, sample_weights
from klplug.spec import KLSpec, check_kl_coef, parse

if TYPE_CHECKING:
    from klplug.aggregation import aggregate
    from klplug.exact import ExactKL, exact_kl, top_log_probs, topk_kl
    from klplug.posterior import posterior_log_probs
    from klplug.step import KLStep, policy_loss
    from klplug.stored import StoredKL, stored_kl, stored_metrics
    from klplug.tally import Tally
    from klplug.term import KLTerm, kl_return_baseline, kl_term, reward_to_go

__all__ = [
    "AdaptiveKL",
    "ExactKL",
    "FixedKL",
    "KLController",
    "KLSpec",
    "KLStep",
    "KLTerm",
    "KLType",
    "SampleWeight",
    "Samples",
    "StoredKL",
    "Tally",
    "__version__",
    "aggregate",
    "check_kl_coef",
    "exact_kl",
    "kl_controller",
    "kl_return_baseline",
    "kl_term",
    "kl_types",
    "parse",
    "policy_loss",
    "posterior_log_probs",
    "reward_to_go",
    "sample_weights",
    "stored_kl",
    "stored_metrics",
    "top_log_probs",
    "topk_kl",
]

# What works on tensors, and where it is. It is loaded when asked for: torch takes seconds, and the
# command line does without.
_ON_TENSORS = {
    "ExactKL": "exact",
    "KLStep": "step",
    "KLTerm": "term",
    "StoredKL": "stored",
    "Tally": "tally",
    "aggregate": "aggregation",
    "exact_kl": "exact",
    "kl_return_baseline": "term",
    "kl_term": "term",
    "policy_loss": "step",
    "posterior_log_probs": "posterior",
    "reward_to_go": "term",
    "stored_kl": "stored",
    "stored_metrics": "stored",
    "top_log_probs": "exact",
    "topk_kl": "exact",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_TENSORS:
        raise AttributeError(f"module 'klplug' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"klplug.{_ON_TENSORS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
