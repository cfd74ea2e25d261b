"""Shell scripts, read as bash would read them; none of it is run.

``parser`` finds the statements (``syntax``), over ``scanner``: ``dollar`` reads expansions,
``words`` words and quotes, ``simple`` simple commands, ``brackets`` ``[[ ]]``. ``reader`` walks
each of them, in a ``Shell`` (``state``): ``expansion`` of words, with ``braces``, ``patterns`` and
``arithmetic``; ``assignment``; ``flow``, with ``conditions``, and ``branches`` where one is not
decided; ``builtins``; ``scripts`` in scripts. ``values`` has what a variable may hold, ``command``
what is found, and ``script`` is the way in.
"""

from klplug.audit.shell.command import Command
from klplug.audit.shell.scanner import with_newlines
from klplug.audit.shell.script import Broken, Cut, Script
from klplug.audit.shell.values import Word

__all__ = ["Broken", "Command", "Cut", "Script", "Word", "with_newlines"]
