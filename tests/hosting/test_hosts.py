"""The hosts that there are, as those who ask them see them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import klplug
from klplug.hosting.host import Host, hosts

HOSTS = list(hosts().values())


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_a_row_names_what_there_is(host: Host) -> None:
    for package in host.packages:
        assert importlib.util.find_spec(package) is not None
    for room in (
        *("keys", "plan", "refusals", "settings", "actor", "trainer"),
        *("command", "reading", "edit", "sources"),
    ):
        assert importlib.util.find_spec(f"{host.adapter}.{room}") is not None
    assert {path.stem for path in host.tables.glob("*.json")} >= set(host.tested)
    assert host.hooks is not None and host.hooks.host == host.name
    if host.setup is not None:
        module, _, function = host.setup.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_its_own_names_are_kl_types(host: Host) -> None:
    for placement, names in host.stock.items():
        for kl_type in names.values():
            assert [term.placement for term in klplug.parse(kl_type).terms] == [placement]


def test_a_kl_type_says_by_host_what_serves_it() -> None:
    row = klplug.kl_types()["k2_as_loss,head=combined"]
    assert dict(row.served) == {
        "openrlhf": "with policy_loss_type=ppo",
        "verl": "with loss_mode=vanilla",
    }
    assert set(klplug.kl_types()["k2_as_loss"].served.values()) == {"yes"}


def test_a_host_as_attribute_of_a_kl_type_still_works_and_warns() -> None:
    row = klplug.kl_types()["k2_as_loss,head=combined"]
    for name in ("verl", "openrlhf"):
        with pytest.warns(DeprecationWarning, match=f"KLType.served\\['{name}'\\]"):
            assert getattr(row, name) == row.served[name]
    with pytest.raises(AttributeError, match="no attribute 'trl'"):
        _ = row.trl


def test_no_table_lies_in_klplug_itself() -> None:
    found = {path.name for path in Path(klplug.__file__).parent.rglob("*.json")}
    assert found == {"frameworks.json"}  # of what klplug does not serve
