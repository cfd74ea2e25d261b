"""``python -m klplug``: the command ``klplug``."""

from klplug.cli import main

if __name__ == "__main__":
    main()
