"""Each host's runs in that host's environment."""

from tests.conftest import HOSTS, NAMED

collect_ignore = [f"test_{host}.py" for host in HOSTS if host not in NAMED]
