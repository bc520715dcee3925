"""Asks UCX, in a separate process, which transports it offers here.

UCX ends its process on fatal errors, and a search for devices loads their drivers. nixl does not
report the transports; to read them from an agent's log (`nixl/ucx.py`) takes a peer.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Mapping

from pdctl.doctor.inventory import UCX
from pdctl.doctor.probe.command import answer
from pdctl.doctor.probe.software import nixl_library

_RESOURCE = re.compile(r"^#\s+resource \d+ .* (\S+/\S+)$", re.MULTILINE)
_VERSION = re.compile(r"^version (\S+)$", re.MULTILINE)
# UCP_PARAM_FIELD_FEATURES, UCP_FEATURE_RMA; ucp_params_t has fewer words than there are here.
_PARAMS = (1 << 0, 1 << 1, *[0] * 62)


def ucx(environment: Mapping[str, str]) -> UCX | None:
    """Return its version and transports. Raises Unknown: it has no answer."""
    library = nixl_library()
    if library is None:
        return None
    said = answer(sys.executable, "-m", __name__, library, environment=environment)
    version = _VERSION.search(said)
    return UCX(version=version[1] if version else "", transports=tuple(_RESOURCE.findall(said)))


def main(library: str) -> None:
    """Print the lines that `ucx` reads."""
    ucp, libc = ctypes.CDLL(library), ctypes.CDLL(None)
    ucp.ucp_get_version_string.restype = ctypes.c_char_p
    ucp.ucs_status_string.restype = ctypes.c_char_p
    print("version", ucp.ucp_get_version_string().decode(), flush=True)
    context = ctypes.c_void_p()
    params = (ctypes.c_uint64 * len(_PARAMS))(*_PARAMS)
    status = ucp.ucp_init_version(1, 0, params, None, ctypes.byref(context))
    if status:
        sys.exit(f"UCX does not start: {ucp.ucs_status_string(status).decode()}")
    ucp.ucp_context_print_info(context, ctypes.c_void_p.in_dll(libc, "stdout"))
    libc.fflush(None)


if __name__ == "__main__":
    main(sys.argv[1])
