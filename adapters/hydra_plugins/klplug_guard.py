"""On guard over a verl that does not load klplug: Hydra imports this in each of its commands.

Without ``VERL_USE_EXTERNAL_MODULES=klplug_verl`` a verl before 0.9 knows nothing of klplug, and
``VERL_USE_EXTERNAL_PLUGINS=none`` keeps it out of a later one. ``+klplug.kl_type`` would then be a
setting that nobody reads, and the run would go on with verl's own KL. Other commands of Hydra's
load nothing.
"""

from __future__ import annotations

import sys

if "verl" in sys.modules and "klplug_verl.hooks" not in sys.modules:
    from klplug_verl_guard import asked, refuse

    if asked(sys.argv):
        refuse(
            f"verl {getattr(sys.modules['verl'], '__version__', '')} did not load klplug, and this "
            "command asks for it. Before 0.9 it needs VERL_USE_EXTERNAL_MODULES=klplug_verl in "
            "the environment of every process. Since then VERL_USE_EXTERNAL_PLUGINS must be "
            "unset, or name klplug and klplug_guard"
        )
