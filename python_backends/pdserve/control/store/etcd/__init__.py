"""A store for many hosts, in etcd; needs the extra `pdserve[etcd]`."""

import importlib.util

from pdserve.errors import DeploymentError

if importlib.util.find_spec("aetcd") is None:
    raise DeploymentError("a store in etcd needs aetcd: pip install 'pdserve[etcd]'")
