"""A host's functions import on a CPU with the stand-ins in place; one host per environment."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from benchmarks.measure import Row, table
from recipes import cpu_shim
from tests.conftest import NAMED

for host in NAMED:
    # verl reads some of them as it is imported.
    given = cpu_shim.environment(host)
    os.environ.update({k: v for k, v in given.items() if k not in ("PYTHONPATH", "PATH")})
    cpu_shim.install(host)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", help="file to write the results to, as a table in Markdown")


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """What the benchmarks measured; printed, and written where --table says."""
    found: list[Row] = []
    yield found
    text = table(found)
    print("\n" + text)
    if path := request.config.getoption("--table"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
