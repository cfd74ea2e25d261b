"""DeepSpeed's compiled CPU ops, built once into the checkout.

Symptom without it: the first run says nothing for minutes, while its Ray actors compile or wait.
Reason: OpenRLHF's optimiser is always DeepSpeed's FusedAdam, C++ that is built at first use.

    python -m recipes.cpu_shim.deepspeed_ops       (builds; in the host's environment)
"""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

SIGN_OF_LIFE = 20  # seconds between two lines while a compiler works
OPS = {"deepspeed_shm_comm": "ShareMemCommBuilder", "fused_adam": "FusedAdamBuilder"}
REPOSITORY = Path(__file__).resolve().parents[2]


def missing_ops(cache: Path) -> list[str]:
    return [op for op in OPS if not (cache / op / f"{op}.so").exists()]


@contextmanager
def compiled_ops(
    environment: Mapping[str, str], log: Path, announce: Callable[[str], None]
) -> Iterator[None]:
    """Holds the ops of `TORCH_EXTENSIONS_DIR` ready for a run, building them if need be.

    torch's own lock is a file: one left by a killed process makes all later ones wait for ever.
    The lock here ends with its process, so whoever has it alone may remove what was left.

    Raises:
        RuntimeError: There is no compiler, or it failed; with the log's path.
    """
    cache = Path(environment["TORCH_EXTENSIONS_DIR"])
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "users.lock").open("w") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce("waiting for another run that builds DeepSpeed's ops")
            fcntl.flock(users, fcntl.LOCK_SH)
        else:
            for left in cache.glob("*/lock"):
                left.unlink()
        if missing := missing_ops(cache):
            announce(f"building DeepSpeed's {' and '.join(missing)}, once (a few minutes)")
            build(environment, log, announce)
        fcntl.flock(users, fcntl.LOCK_SH)
        yield


def build(environment: Mapping[str, str], log: Path, announce: Callable[[str], None]) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise RuntimeError("DeepSpeed's CPU ops need a C++ compiler: there is no c++ or g++ here")
    command = [sys.executable, "-m", "recipes.cpu_shim.deepspeed_ops"]
    began = monotonic()
    with (
        log.open("a") as output,
        subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SIGN_OF_LIFE)
                    break
                announce(f"building DeepSpeed's ops, {monotonic() - began:.0f} s so far")
        finally:
            process.kill()  # one that has ended is let be
    if process.returncode:
        raise RuntimeError(f"DeepSpeed's CPU ops could not be built: see {log}")


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    for builder in OPS.values():
        get_accelerator().create_op_builder(builder).load(verbose=True)


if __name__ == "__main__":
    main()
