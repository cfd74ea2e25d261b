"""What verl loads in each of its processes: entry point ``klplug`` of the group ``verl.plugins``.

Importing this module is installing the plugin. verl logs a plugin's exception at DEBUG level and
goes on with its own KL, so a failure is printed here, and ends a process whose command line asks
for klplug. (``SystemExit`` is no ``Exception``, which is what verl catches.) A worker has no such
command line; there verl's own ``kl_penalty`` stops at the kl_type it does not know.

On verl 0.7 and 0.8, which know no entry points: ``VERL_USE_EXTERNAL_MODULES=klplug_verl``.
"""

from __future__ import annotations

import importlib.util
import os
import sys

try:
    from klplug_verl_guard import asked, refuse
except ImportError as error:
    # The other way round than there: a directory hides the guard.
    _found = importlib.util.find_spec("klplug_verl_guard")
    print(
        f"klplug: error: the package klplug_verl_guard is found at {_found and _found.origin}, "
        f"which is not klplug's own ({error}). Rename that directory, or run from elsewhere",
        file=sys.stderr,
        flush=True,
    )
    if any("klplug." in word or "_as_loss" in word for word in sys.argv[1:]):
        raise SystemExit(2) from None
    raise


def install() -> None:
    """Replace verl's KL in each hooked module as this process imports it."""
    import wrapt

    from klplug_verl.hooks import PATCH, apply_to

    for module in PATCH.modules:
        wrapt.register_post_import_hook(apply_to, module)


if os.environ.get("KLPLUG_DISABLE") != "1":
    try:
        install()
    except Exception as error:
        refuse(f"the plugin for verl can't be installed ({type(error).__name__}: {error})")
elif asked(sys.argv):
    refuse("KLPLUG_DISABLE=1 is set, and this command line asks for a kl_type of klplug's")
