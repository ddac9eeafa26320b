"""A real kube-apiserver over a real etcd, for the length of a test session.

The programs are in the folder that KUBEBUILDER_ASSETS names, as for envtest; `make test-api` builds them where it is
not set.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import trustme
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kubernetes import client as kube
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

ADMIN_TOKEN = "admin-of-the-tests"
SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class ApiServer:
    """A running API server.

    Attributes:
        folder: Holds its CA, ca.pem, and its other files.
        kubeconfig: The administrator's kubeconfig.
        token: The administrator's token.
        program: None where the server runs in a container.
    """

    url: str
    folder: Path
    kubeconfig: Path
    token: str = ADMIN_TOKEN
    program: Program | None = None

    def writes(self, *agents: str, since: datetime | None = None) -> list[tuple[str, str, str, str]]:
        """Writes by clients whose user agents have one of these prefixes, from the audit log: verb, namespace, resource, name.

        The API server logs a write after its response, so the log may lack the latest one.
        """
        found = []
        for line in (self.folder / "audit.log").read_text().splitlines():
            entry = json.loads(line)
            object_ = entry.get("objectRef", {})
            if entry["userAgent"].startswith(agents) and (
                since is None or datetime.fromisoformat(entry["requestReceivedTimestamp"]) >= since
            ):
                resource = "/".join(filter(None, (object_.get("resource"), object_.get("subresource"))))
                found.append((entry["verb"], object_.get("namespace", ""), resource, object_.get("name", "")))
        return found

    @contextlib.contextmanager
    def controller_manager(self) -> Iterator[None]:
        """Runs Kubernetes' controllers while entered: garbage collection, Deployments, namespaces, ServiceAccounts."""
        arguments = [
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={self.folder / 'accounts.key'}",
            "--use-service-account-credentials=false",
            f"--root-ca-file={self.folder / 'ca.pem'}",
            "--leader-elect=false",
            "--secure-port=0",
        ]
        with process(assets() / "kube-controller-manager", arguments, self.folder):
            yield

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Runs kubectl as the administrator; returns its output. AssertionError with its message where it fails."""
        done = subprocess.run(
            ["kubectl", f"--kubeconfig={self.kubeconfig}", *arguments],
            env=os.environ | {"PATH": search_path()},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, bodies: list[dict[str, Any]], *options: str) -> None:
        """Runs `kubectl apply --server-side`."""
        self.kubectl("apply", "--server-side", "--filename=-", *options, stdin=yaml.safe_dump_all(bodies))

    def kubeconfig_of(self, namespace: str, account: str) -> Path:
        """A kubeconfig of a ServiceAccount, valid for an hour."""
        request = kube.AuthenticationV1TokenRequest(
            spec=kube.V1TokenRequestSpec(audiences=[self.url], expiration_seconds=3600)
        )
        made = kube.CoreV1Api(self.client()).create_namespaced_service_account_token(account, namespace, request)
        assert made.status is not None
        assert made.status.token is not None
        path = self.folder / f"{namespace}-{account}.yaml"
        path.write_text(yaml.safe_dump(_kubeconfig(self.url, self.folder / "ca.pem", made.status.token)))
        return path

    def client(self) -> kube.ApiClient:
        """A client of the API server with the administrator's rights."""
        configuration = kube.Configuration()
        configuration.host = self.url
        configuration.ssl_ca_cert = str(self.folder / "ca.pem")
        configuration.api_key = {"authorization": f"Bearer {self.token}"}
        return kube.ApiClient(configuration)


def assets() -> Path:
    """The folder of the programs; RuntimeError where KUBEBUILDER_ASSETS names none."""
    named = os.environ.get("KUBEBUILDER_ASSETS")
    if not named or not (Path(named) / "kube-apiserver").exists():
        raise RuntimeError("KUBEBUILDER_ASSETS names no folder with kube-apiserver and etcd; run `make test-api`.")
    return Path(named)


def search_path() -> str:
    """PATH, with the folder of the programs first where one is named."""
    return ":".join(filter(None, (os.environ.get("KUBEBUILDER_ASSETS"), os.environ["PATH"])))


@contextlib.contextmanager
def running(folder: Path, *, address: str = "127.0.0.1", node: bool = False) -> Iterator[ApiServer]:
    """Runs etcd and the API server in `folder` while entered; the server is ready when entered.

    Args:
        address: The address to listen on.
        node: Whether kubelets will join: pods then run as ServiceAccounts, and the server connects to kubelets.
    """
    programs = assets()
    etcd_port, peer_port, api_port = _free_ports(3)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    server = authority.issue_cert(address, "127.0.0.1", "localhost", "10.0.0.1", "kubernetes.default.svc")
    _write(server, folder / "server")
    _write(
        authority.issue_cert("kube-apiserver", common_name="kube-apiserver", organization_name="system:masters"),
        folder / "kubelet-client",
    )
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (folder / "accounts.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    (folder / "tokens.csv").write_text(f"{ADMIN_TOKEN},admin,admin,system:masters\n")
    (folder / "audit.yaml").write_text(
        "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\n"
        "rules: [{level: Metadata, verbs: [create, update, patch, delete, deletecollection]}, {level: None}]\n"
    )
    url = f"https://{address}:{api_port}"
    etcd = [
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{etcd_port}",
        f"--advertise-client-urls=http://127.0.0.1:{etcd_port}",
        f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
        "--unsafe-no-fsync",
        "--log-level=error",
    ]
    api = [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--secure-port={api_port}",
        f"--bind-address={address}",
        "--service-cluster-ip-range=10.0.0.0/16",
        f"--tls-cert-file={folder / 'server.pem'}",
        f"--tls-private-key-file={folder / 'server.key'}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        f"--service-account-key-file={folder / 'accounts.key'}",
        f"--service-account-signing-key-file={folder / 'accounts.key'}",
        f"--service-account-issuer={url}",
        "--authorization-mode=Node,RBAC",
        f"--audit-policy-file={folder / 'audit.yaml'}",
        f"--audit-log-path={folder / 'audit.log'}",
    ]
    if node:
        api += [
            f"--advertise-address={address}",
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={folder / 'kubelet-client.pem'}",
            f"--kubelet-client-key={folder / 'kubelet-client.key'}",
        ]
    else:
        # Without a node there are no endpoints, and pods that never run need no ServiceAccount.
        api += ["--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount"]
    with process(programs / "etcd", etcd, folder), process(programs / "kube-apiserver", api, folder) as program:
        kubeconfig = folder / "kubeconfig.yaml"
        kubeconfig.write_text(yaml.safe_dump(_kubeconfig(url, folder / "ca.pem", ADMIN_TOKEN)))
        server_ = ApiServer(url=url, folder=folder, kubeconfig=kubeconfig, program=program)
        ready(server_)
        yield server_


def _write(certificate: trustme.LeafCert, path: Path) -> None:
    certificate.private_key_pem.write_to_path(path.with_suffix(".key"))
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(path.with_suffix(".pem"), append=True)


def _kubeconfig(url: str, authority: Path, token: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(authority)}}],
        "users": [{"name": "test", "user": {"token": token}}],
    }


class Program:
    """A running program; its log is in the folder, under its name."""

    def __init__(self, path: Path, arguments: list[str], folder: Path) -> None:
        self._command = [str(path), *arguments]
        self._folder = folder
        self._log = folder / f"{path.name}.log"
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            # In a session of its own: at Ctrl-C the tests stop the programs in order.
            self._child = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal, and kills the process where it still runs ten seconds later."""
        self._child.send_signal(sign)
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


@contextlib.contextmanager
def process(path: Path, arguments: list[str], folder: Path) -> Iterator[Program]:
    """Runs a program while entered."""
    program = Program(path, arguments, folder)
    try:
        yield program
    finally:
        program.stop()


@retry(
    retry=retry_if_exception_type((OSError, kube.ApiException, RuntimeError)),
    stop=stop_after_delay(SECONDS),
    wait=wait_fixed(0.1),
    reraise=True,
)
def ready(server: ApiServer) -> None:
    """Returns when the server is ready."""
    context = ssl.create_default_context(cafile=str(server.folder / "ca.pem"))
    request = urllib.request.Request(f"{server.url}/readyz", headers={"Authorization": f"Bearer {server.token}"})
    with urllib.request.urlopen(request, timeout=5, context=context) as response:
        if response.read() != b"ok":
            raise RuntimeError("the API server is not ready")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
