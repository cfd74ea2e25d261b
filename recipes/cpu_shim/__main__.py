"""`python -m recipes.cpu_shim HOST COMMAND...`: a command with the CPU stand-ins switched on."""

import os
import sys

from recipes.cpu_shim import HOSTS, environment


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in HOSTS:
        raise SystemExit(f"usage: python -m recipes.cpu_shim {{{','.join(HOSTS)}}} COMMAND...")
    host, *command = sys.argv[1:]
    os.execvpe(command[0], command, os.environ | environment(host))


if __name__ == "__main__":
    main()
