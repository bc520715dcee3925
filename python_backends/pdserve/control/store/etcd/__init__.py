"""A store for many hosts, in etcd; needs the extra `pdserve[etcd]`."""
