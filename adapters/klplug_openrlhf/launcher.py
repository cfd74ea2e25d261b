"""``python -m klplug_openrlhf``: OpenRLHF's own ``train_ppo_ray``, with its KL replaced.

OpenRLHF's command line lives under ``if __name__ == "__main__"``, so it is run as it is, with two
functions wrapped on the way: ``parse_args`` (klplug's options, and the switches that follow from
them) and ``ray.init`` (so that every worker of the run installs klplug before anything else).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import wrapt

HOST_MODULE = "openrlhf.cli.train_ppo_ray"
SETUP_HOOK = "klplug_openrlhf.install.install"


def main() -> None:
    """Run OpenRLHF's trainer with the command line of this process."""
    if os.environ.get("KLPLUG_DISABLE") == "1":
        fail(
            "KLPLUG_DISABLE=1 is set, and this launcher is for running with klplug: unset it, or "
            f"run python -m {HOST_MODULE}"
        )
    for package in (HOST_MODULE.partition(".")[0], "ray"):
        if importlib.util.find_spec(package) is None:
            fail(
                f"{package} is not installed for {sys.executable}: install OpenRLHF with vLLM there"
            )
    import ray

    wrapt.wrap_function_wrapper(ArgumentParser, "parse_args", parse_args)
    wrapt.wrap_function_wrapper(ray, "init", init_ray)
    if ray.is_initialized():  # the host then calls no ray.init
        ask_nodes(
            ". Ray was up before OpenRLHF: leave that to it, or give that ray.init "
            f"runtime_env={{'worker_process_setup_hook': {SETUP_HOOK!r}}}"
        )
    runpy.run_module(HOST_MODULE, run_name="__main__", alter_sys=True)


def fail(message: str) -> None:
    """One line on standard error and exit status 2, as argparse does, without its page of usage."""
    print(f"klplug: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def ask_nodes(hint: str = "") -> None:
    """Stop unless klplug is in the workers of every node of the cluster that Ray is on."""
    from klplug.hosting.cluster import check_nodes
    from klplug.hosting.settings import SettingsError

    try:
        check_nodes("openrlhf", SETUP_HOOK.rpartition(".")[0], hint)
    except SettingsError as error:
        fail(str(error))


def parse_args(
    original: Callable[..., Namespace],
    parser: ArgumentParser,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Namespace:
    """OpenRLHF's ``parse_args`` with klplug's options; any other parser's goes through."""
    options = parser._option_string_actions
    estimator = options.get("--algo.kl.estimator") or options.get("--kl_estimator")
    if estimator is None:
        return original(*args, **kwargs)
    from klplug import parse
    from klplug.hosting.folder import claim
    from klplug.hosting.patching import HookError
    from klplug_openrlhf.hooks import COMMAND, PATCH
    from klplug_openrlhf.settings import derive

    estimator.choices = None  # full kl_types are allowed too; derive() says what is wrong
    add_options(parser)
    parsed = original(*args, **kwargs)
    try:
        line = derive(parsed, written_options(parser))
        PATCH.check(parse(vars(parsed)["klplug.kl_type"]).requires)
        COMMAND.apply()
        _claims[:] = claims_of(parsed)
        for checkpoints in _claims:
            claim(*checkpoints, make=False)
    except (ValueError, HookError) as error:
        fail(str(error))
    print(line, flush=True)
    return parsed


# Of the command: a folder that is there is claimed as its words are read, before anything is taken
# from a cluster. One that is not is made when Ray is up: OpenRLHF has yet to check those words.
_claims: list[tuple[str, str, str]] = []


def claims_of(args: Namespace) -> list[tuple[str, str, str]]:
    """What ``claim`` is given: of a run that saves any checkpoints, its one folder."""
    from klplug_openrlhf.keys import CHECKPOINTS, KL_TYPE, SAVES, flag, read

    if not any(read(args, key, -1) > 0 for key in SAVES):
        return []
    folder = read(args, CHECKPOINTS)
    return [(folder, f"{flag(args, CHECKPOINTS)} {folder}", read(args, KL_TYPE))]


def add_options(parser: ArgumentParser) -> None:
    from klplug.controllers import SETTINGS
    from klplug.hosting.references import SETTINGS as REFERENCE
    from klplug.hosting.stored import SETTINGS as SOURCE

    group = parser.add_argument_group(
        "klplug", "KL regularisation by the gradient it has; decides all of the host's KL options"
    )
    group.add_argument(
        "--klplug.kl_type",
        metavar="KL_TYPE",
        help="formulation: <estimator>_<placement>[,option=value...], as in k2_as_loss, "
        "k1_in_reward, 'k2_as_loss,horizon=sequence', or none",
    )
    group.add_argument(
        "--klplug.kl_coef", type=float, metavar="BETA", help="coefficient of the KL term"
    )
    group.add_argument(
        "--klplug.kl_ctrl",
        default="fixed",
        metavar="CTRL",
        help="fixed; linear or cosine, to --klplug.kl_end in --klplug.kl_steps; adaptive or pid, "
        "which hold --klplug.kl_target",
    )
    for name, meaning in SETTINGS.items():
        group.add_argument(f"--klplug.{name}", type=float, help=meaning)
    for name, meaning in REFERENCE.items():
        metavar = name.rpartition("_")[2].upper()
        group.add_argument(f"--klplug.{name}", metavar=metavar, help=meaning)
    for name, meaning in SOURCE.items():
        group.add_argument(f"--klplug.{name}", metavar="FILE", help=meaning)


def written_options(parser: ArgumentParser) -> Namespace:
    """Only what stands on the command line: a host's defaults can't contradict a kl_type."""
    bare = copy.deepcopy(parser)
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    return ArgumentParser.parse_known_args(bare)[0]


def init_ray(
    original: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``ray.init`` with klplug's worker hook in the runtime environment, beside the host's own.

    Then every node is asked for klplug: on one that lacks it each worker would die of the hook,
    with a page of Ray's own.
    """
    from klplug.hosting.folder import claim
    from klplug.hosting.settings import SettingsError

    runtime_env = dict(kwargs.pop("runtime_env", None) or {})
    present = runtime_env.get("worker_process_setup_hook") or _job_setup_hook()
    if present not in (None, SETUP_HOOK):
        fail(
            f"runtime_env has worker_process_setup_hook={present!r}, and klplug needs that place "
            f"for {SETUP_HOOK!r}: call it from yours, or leave yours out"
        )
    if present is None:
        runtime_env["worker_process_setup_hook"] = SETUP_HOOK
    context = original(*args, runtime_env=runtime_env, **kwargs)
    ask_nodes()
    try:
        for checkpoints in _claims:
            claim(*checkpoints)
    except SettingsError as error:
        fail(str(error))
    return context


def _job_setup_hook() -> str | None:
    # Ray refuses a key that both the job's runtime environment and ray.init's have.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    hook: str | None = (job.get("runtime_env") or {}).get("worker_process_setup_hook")
    return hook
