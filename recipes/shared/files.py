"""A YAML file as it was meant: what YAML takes without a word is an error here."""

from pathlib import Path
from typing import Any

import yaml

from recipes.shared.settings import SettingsError


class UniqueKeys(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def from_yaml(path: Path) -> Any:
    """What a file holds; None where it is empty.

    Raises:
        SettingsError: It cannot be read, or has a key twice.
    """
    try:
        # UniqueKeys is a safe loader.
        return yaml.load(path.read_text("utf-8"), UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not YAML: {error}") from error
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
