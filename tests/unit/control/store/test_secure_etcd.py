"""Test the store in an etcd that asks for TLS, for a client's certificate, and for a user."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pdserve.control.store.errors import Refused, StoreUnreachable
from pdserve.control.store.protocol import put
from pdserve.errors import DeploymentError
from tests.unit.control.store.etcd_server import EtcdServer, in_loop, needs_etcd

if TYPE_CHECKING:
    from pdserve.control.store.etcd.client import EtcdAddress

pytestmark = needs_etcd

PASSWORD = "a password\u00e4"


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def certify(folder: Path, name: str, authority: str) -> None:
    """Make a key, and a certificate for 127.0.0.1 that an authority has signed."""
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    files = ("-keyout", f"{name}.key", "-out", f"{name}.csr")
    openssl(folder, "req", *curve, *files, "-subj", f"/CN={name}")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    signer = ("-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-CAcreateserial")
    files = ("-in", f"{name}.csr", "-out", f"{name}.crt")
    openssl(folder, "x509", "-req", *files, *signer, "-days", "2", "-extfile", "names")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two authorities, and certificates of a server and of clients."""
    folder = tmp_path_factory.mktemp("certificates")
    for authority in "ca", "stranger":
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        files = ("-keyout", f"{authority}.key", "-out", f"{authority}.crt")
        openssl(folder, "req", "-x509", *curve, *files, "-subj", f"/CN={authority}", "-days", "2")
    certify(folder, "server", "ca")
    certify(folder, "client", "ca")
    certify(folder, "other", "stranger")
    (folder / "password").write_text(f"{PASSWORD}\n")
    (folder / "wrong").write_text("wrong")
    return folder


@pytest.fixture(scope="module")
def secure_etcd(
    certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdServer]:
    """Run an etcd with TLS in both directions."""
    options = (
        *("--cert-file", str(certificates / "server.crt")),
        *("--key-file", str(certificates / "server.key")),
        *("--trusted-ca-file", str(certificates / "ca.crt"), "--client-cert-auth"),
    )
    server = EtcdServer(tmp_path_factory.mktemp("secure"), *options, scheme="https")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def address(
    server: EtcdServer,
    folder: Path,
    ca: str = "ca",
    name: str = "client",
    user: str = "",
    password: str = "password",
) -> EtcdAddress:
    from pdserve.control.store.etcd.client import EtcdAddress

    return EtcdAddress(
        (server.endpoint,),
        ca=folder / f"{ca}.crt",
        certificate=folder / f"{name}.crt" if name else None,
        key=folder / f"{name}.key" if name else None,
        user=user,
        password_file=folder / password if user else None,
    )


async def enable_users(server: EtcdServer, folder: Path) -> None:
    """Make a root, and a user who may write one deployment's keys; then ask for users."""
    from aetcd import rpc

    from pdserve.control.store.etcd.client import EtcdClient

    client = EtcdClient(address(server, folder), 0, 5.0)
    await client.connect()
    auth = rpc.AuthStub(client.channel)
    for user in "root", "pdserve":
        await auth.UserAdd(rpc.AuthUserAddRequest(name=user, password=PASSWORD))
    await auth.RoleAdd(rpc.AuthRoleAddRequest(name="mine"))
    allowed = rpc.Permission(
        permType=rpc.Permission.READWRITE, key=b"/pdserve/mine/", range_end=b"/pdserve/mine0"
    )
    await auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="mine", perm=allowed))
    for user, role in ("root", "root"), ("pdserve", "mine"):
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=user, role=role))
    await auth.AuthEnable(rpc.AuthEnableRequest())
    await client.close()


@in_loop
async def test_tls_and_users(secure_etcd: EtcdServer, certificates: Path) -> None:
    from pdserve.control.store.etcd.store import EtcdStore

    for wrong in (
        address(secure_etcd, certificates, ca="stranger"),
        address(secure_etcd, certificates, name=""),
        address(secure_etcd, certificates, name="other"),
    ):
        stranger = EtcdStore(wrong, "mine", 2.0)
        with pytest.raises(StoreUnreachable, match=f"listing '', at {secure_etcd.endpoint}"):
            await stranger.list_prefix("")
        await stranger.close()

    store = EtcdStore(address(secure_etcd, certificates), "mine")
    assert await put(store, "a", b"1")
    await store.close()

    await enable_users(secure_etcd, certificates)
    nobody = EtcdStore(address(secure_etcd, certificates), "mine")
    with pytest.raises(Refused, match=r"permission denied|user name is empty"):
        await put(nobody, "a", b"2")
    await nobody.close()
    wrong_user = EtcdStore(
        address(secure_etcd, certificates, user="pdserve", password="wrong"), "mine"
    )
    with pytest.raises(Refused, match=r"user 'pdserve': .*authentication failed"):
        await wrong_user.list_prefix("")
    await wrong_user.close()

    user = address(secure_etcd, certificates, user="pdserve")
    others = EtcdStore(user, "others")
    with pytest.raises(Refused, match="permission denied"):
        await others.list_prefix("")
    with pytest.raises(Refused, match="permission denied"):
        await put(others, "a", b"")
    with pytest.raises(Refused, match="permission denied"):
        await anext(others.watch_prefix("", 1))
    await others.close()

    mine = EtcdStore(user, "mine")
    async with aclosing(mine.watch_prefix("", 1)) as changes:
        revision = await put(mine, "a", b"3")
        while (change := await anext(changes)).revision < revision:
            pass
        assert change.value == b"3"
    lease = await mine.grant(5)
    await mine.keep_alive(lease.id)

    secure_etcd.kill()  # it forgets the tokens of its users
    secure_etcd.start()
    assert await put(mine, "a", b"4")
    await mine.close()


def test_what_does_not_go_together_is_refused() -> None:
    from pdserve.control.store.etcd.client import EtcdAddress

    ends, path = ("127.0.0.1:2379",), Path("x")
    with pytest.raises(DeploymentError, match="no endpoints"):
        EtcdAddress(())
    with pytest.raises(DeploymentError, match="a certificate needs its key"):
        EtcdAddress(ends, ca=path, certificate=path)
    with pytest.raises(DeploymentError, match="with TLS only"):
        EtcdAddress(ends, certificate=path, key=path)
    with pytest.raises(DeploymentError, match="needs a password_file"):
        EtcdAddress(ends, ca=path, user="me")
    with pytest.raises(DeploymentError, match="a password is only sent with TLS"):
        EtcdAddress(ends, user="me", password_file=path)
    with pytest.raises(DeploymentError, match="No such file"):
        EtcdAddress(ends, ca=Path("/nowhere")).credentials()
