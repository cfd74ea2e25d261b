"""What every Ray worker runs before anything else: ``worker_process_setup_hook``.

Light on purpose: it runs in vLLM's and Ray's own helpers too, and must not import torch there.
"""

from __future__ import annotations

import wrapt

# The modules of the hook table, which can't be imported here; a test compares them.
MODULES = (
    "openrlhf.models.utils",
    "openrlhf.models.loss",
    "openrlhf.trainer.ray.launcher",
    "openrlhf.trainer.ray.ppo_actor",
    "openrlhf.trainer.ppo_utils.experience_maker",
    "openrlhf.trainer.ppo_trainer",
)


def install() -> None:
    """Replace OpenRLHF's KL in each module as this process imports it; a failure stops the run."""
    for module in MODULES:
        wrapt.register_post_import_hook("klplug_openrlhf.hooks:apply_to", module)
