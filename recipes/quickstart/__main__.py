"""`python -m recipes.quickstart`, or `make quickstart`: the options are make's variables."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from recipes.quickstart.run import RunError, quickstart
from recipes.quickstart.settings import settings
from recipes.shared.folder import FolderError
from recipes.shared.settings import STOCK, SettingsError

WIDTH = 120  # where no terminal says how wide it is


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m recipes.quickstart",
        description="GRPO with klplug on the real host, on a CPU, from start to picture.",
    )
    add = made.add_argument
    add("--host", default="openrlhf", help="openrlhf or verl")
    add(
        "--kl-type",
        default="k2_as_loss",
        help=f"any kl_type of klplug, or the host's own: {', '.join(STOCK)} (default: %(default)s)",
    )
    add("--kl-coef", type=float, help="strength of the KL, nats (default: the recipe's)")
    add("--steps", type=int, help="training steps (default: the recipe's)")
    add("--seed", type=int, default=42, help="of the problems, the samples and the host")
    add("--model", default="tiny", help="tiny, smollm2, a Hugging Face folder, or a hub's name")
    add(
        "--data",
        default="words",
        help="words, sums, gsm8k, or a .jsonl file or folder in GSM8K's form",
    )
    add("--gsm8k", help="with --data gsm8k: a local copy of it, file or folder")
    add("--ranks", type=int, default=1, help="data-parallel ranks (default: 1)")
    add("--updates", type=int, default=1, help="optimiser steps per rollout (default: 1)")
    add("--save-every", type=int, default=0, help="steps between copies (default: the last only)")
    add("--out", type=Path, help="folder of the run (default: runs/quickstart[-verl][-MODEL])")
    add("--overwrite", action="store_true", help="replace what another run left in --out")
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
    out, overwrite = arguments.pop("out"), arguments.pop("overwrite")
    # Before torch is loaded; as for the host's processes, see cpu_shim.environment.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        quickstart(settings(**arguments), out, overwrite, console)
    except (FolderError, SettingsError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
