"""Shell scripts, read as bash would read them; none of it is run.

``parser`` finds the statements, ``reader`` walks them and expands words, ``values`` has what a
variable may hold where a condition is not decided.
"""

from klplug.audit.shell.reader import Command
from klplug.audit.shell.script import Cut, Script
from klplug.audit.shell.values import Word

__all__ = ["Command", "Cut", "Script", "Word"]
