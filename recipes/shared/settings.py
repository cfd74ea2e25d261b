"""What quickstart, recipes and evaluation let a user set in the same words, and its checks."""

from pathlib import Path

from klplug.numerics import LEAST, MOST

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache"
RUNS = REPOSITORY / "runs"

HOSTS = ("openrlhf", "verl")
STOCK = ("stock:k1", "stock:k2", "stock:k3")
WITHOUT_COEF = ("none", "monitor")
# numpy takes 32 bits, and vLLM adds an engine's number.
MOST_SEED = 2**31 - 1


class SettingsError(ValueError):
    """Something the user set cannot be; the message is all they need to see."""


def canonical_kl_type(kl_type: str) -> str:
    """A kl_type of klplug as it writes it, or one of the host's own.

    Raises:
        SettingsError: It is neither.
    """
    if kl_type in STOCK:
        return kl_type
    if kl_type.startswith("stock:"):
        raise SettingsError(f"KL_TYPE={kl_type}: of the host's own there are {', '.join(STOCK)}")
    from klplug import parse

    try:
        return str(parse(kl_type))
    except ValueError as error:
        raise SettingsError(
            f"KL_TYPE={kl_type}: {error}. For the host's own KL: {', '.join(STOCK)}"
        ) from error


def checked_kl_coef(kl_type: str, coef: float | None, default: float | None) -> float | None:
    """The coefficient of a canonical kl_type; `None` for one that takes none.

    Raises:
        SettingsError: It is no strength, or the kl_type takes none.
    """
    if kl_type in WITHOUT_COEF:
        if coef is not None:
            raise SettingsError(f"KL_COEF={coef:g}: KL_TYPE={kl_type} takes no coefficient")
        return None
    coef = default if coef is None else coef
    if coef is None or not LEAST <= coef <= MOST:
        written = "none" if coef is None else f"{coef:g}"
        raise SettingsError(
            f"KL_COEF={written}: a finite number above 0, in float32 "
            "(KL_TYPE=none is a run without KL)"
        )
    return coef


def checked_seed(seed: int) -> int:
    """A seed that everything in a host takes.

    Raises:
        SettingsError: It is none.
    """
    if not 0 <= seed <= MOST_SEED:
        raise SettingsError(f"SEED={seed}: a whole number from 0 to {MOST_SEED}")
    return seed


def is_folder(model: str, others: str = "") -> bool:
    """Whether a model is a Hugging Face folder; else it is written as a hub's name.

    Args:
        model: As the user wrote it.
        others: What else may be written there, for the message.

    Raises:
        SettingsError: It can be neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SettingsError(f"MODEL={model}: the folder has no config.json")
        return True
    if model.count("/") != 1 or model.startswith((".", "~", "/")):
        raise SettingsError(
            f"MODEL={model}: no such folder. Allowed: {others}a Hugging Face folder, "
            "or a hub's owner/name"
        )
    return False


def check_model(model: str, others: str = "") -> None:
    """A folder with a config.json, or a name that the hub knows.

    Raises:
        SettingsError: Neither.
    """
    if is_folder(model, others):
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(f"MODEL={model}: neither a folder nor on the hub. {reason}") from error
