"""Test that aetcd need not be installed."""

from __future__ import annotations

import subprocess
import sys

HIDDEN = """
import importlib.util, sys
sys.modules["aetcd"] = None
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "aetcd" else found(name)
import pdserve.control.store.election, pdserve.control.store.leased, pdserve.control.store.view
import pdserve.control.store.file.store
try:
    import pdserve.control.store.etcd.store
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_store_in_etcd_says_what_to_install() -> None:
    result = subprocess.run(
        [sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=True, timeout=60
    )
    said = "DeploymentError a store in etcd needs aetcd: pip install 'pdserve[etcd]'\n"
    assert result.stdout == said
