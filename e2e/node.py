"""A real cluster of one node on this machine: control plane, kubelet, containerd, kube-proxy, DNS. Needs root.

For machines that have neither a cluster nor Docker. `make cluster` keeps one up until Ctrl-C. All state is in one folder
and on two bridges and is removed at the end; only containerd's image store is kept, under ~/.cache/latentflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from support.apiserver import ApiServer, assets, process, running
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

ADDRESS, BRIDGE = "10.210.0.1", "latentflow0"
PODS, POD_BRIDGE = "10.211.0.0/16", "latentflow1"
SERVICES_DNS = "10.0.0.10"
NAME = "node"
# The container that holds a pod's namespaces.
PAUSE = "localhost/latentflow-pause:e2e"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "latentflow"
# The same in every run, so that a run removes what a killed one left behind.
_STATE = Path("/run/latentflow/containerd")
_NEEDED = ("containerd", "runc", "ctr", "conntrack", "ip", "nft")
_CNI = Path("/usr/lib/cni")


@contextlib.contextmanager
def cluster(folder: Path, *, provide: Callable[[Path], None]) -> Iterator[ApiServer]:
    """One node, Ready when entered.

    Args:
        provide: Imports the images into the store; called with containerd's socket.
    """
    _check()
    with contextlib.ExitStack() as stack:
        socket = stack.enter_context(_container_runtime(folder))
        provide(socket)
        stack.enter_context(_bridge())
        server = stack.enter_context(running(folder, address=ADDRESS, node=True))
        stack.enter_context(server.controller_manager())
        programs, kubeconfig = assets(), f"--kubeconfig={server.kubeconfig}"
        scheduler = [kubeconfig, "--leader-elect=false", "--secure-port=0"]
        stack.enter_context(process(programs / "kube-scheduler", scheduler, folder))
        stack.callback(_remove_containers, socket)
        config = _written(folder / "kubelet.yaml", _kubelet(folder, socket))
        kubelet = [f"--config={config}", kubeconfig, f"--node-ip={ADDRESS}", f"--hostname-override={NAME}"]
        stack.callback(_unmount, folder / "kubelet")
        stack.enter_context(process(programs / "kubelet", [*kubelet, f"--root-dir={folder / 'kubelet'}"], folder))
        proxy = _written(folder / "kube-proxy.yaml", _proxy(server))
        stack.callback(subprocess.run, ["nft", "delete", "table", "ip", "kube-proxy"], capture_output=True)
        stack.enter_context(process(programs / "kube-proxy", [f"--config={proxy}"], folder))
        _ready(server)
        server.apply(list(yaml.safe_load_all((Path(__file__).parent / "dns.yaml").read_text())))
        yield server


@contextlib.contextmanager
def _container_runtime(folder: Path) -> Iterator[Path]:
    """Runs containerd while entered and yields its socket. Images are kept between runs."""
    socket = folder / "containerd.sock"
    config = folder / "containerd.toml"
    config.write_text(_containerd(folder, socket))
    (folder / "cni").mkdir(exist_ok=True)
    _written(folder / "cni/10-pods.conflist", _network())
    with contextlib.ExitStack() as stack:
        stack.callback(_unmount, _STATE)
        stack.enter_context(process(Path(shutil.which("containerd") or ""), [f"--config={config}"], folder))
        _wait_for_containerd(socket)
        _remove_containers(socket)
        yield socket


class CtrError(Exception):
    """A command to containerd failed; the message is its standard error."""


def ctr(socket: Path, *arguments: str) -> str:
    """The output of a `ctr` command in Kubernetes' namespace of containerd. CtrError if it fails."""
    command = ["ctr", f"--address={socket}", "--namespace=k8s.io", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CtrError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _check() -> None:
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0:
        sys.exit("A node on this machine needs root.")
    if missing or not _CNI.exists():
        sys.exit(f"Not installed: {', '.join(missing) or _CNI}. On Debian: tools/debian")


@contextlib.contextmanager
def _bridge() -> Iterator[None]:
    """Gives the node its address, on its own bridge, while entered."""
    for name in (BRIDGE, POD_BRIDGE):
        subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    try:
        yield
    finally:
        for name in (BRIDGE, POD_BRIDGE):
            subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _written(path: Path, body: dict[str, Any]) -> Path:
    path.write_text(json.dumps(body))
    return path


def _containerd(folder: Path, socket: Path) -> str:
    # Without CAP_SYS_RESOURCE, as in a container, oom_score_adj cannot be lowered.
    return f"""
version = 2
root = "{CACHE / "containerd"}"
state = "{_STATE}"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_CNI}"
    conf_dir = "{folder / "cni"}"
"""


def _network() -> dict[str, Any]:
    bridge = {
        "type": "bridge",
        "bridge": POD_BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, portmap]}


def _kubelet(folder: Path, socket: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": ADDRESS,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(folder / "ca.pem")},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "clusterDNS": [SERVICES_DNS],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{socket}",
        # The machine's disk may be nearly full for other reasons; pods are not evicted for it.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "failCgroupV1": False,
        "failSwapOn": False,
    }


def _proxy(server: ApiServer) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(server.kubeconfig)},
        "hostnameOverride": NAME,
        "mode": "nftables",
        "clusterCIDR": PODS,
        "conntrack": {"maxPerCore": 0},
        "metricsBindAddress": f"{ADDRESS}:10249",
    }


@retry(retry=retry_if_exception_type(CtrError), stop=stop_after_delay(60), wait=wait_fixed(0.2))
def _wait_for_containerd(socket: Path) -> None:
    ctr(socket, "version")


@retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(120), wait=wait_fixed(0.5), reraise=True)
def _ready(server: ApiServer) -> None:
    nodes = json.loads(server.kubectl("get", "nodes", "--output=json"))["items"]
    ready = [c for node in nodes for c in node["status"].get("conditions", ()) if c["type"] == "Ready"]
    assert [c["status"] for c in ready] == ["True"], f"the node is not ready: {ready}"


def _remove_containers(socket: Path) -> None:
    """Ends all containers: the kubelet leaves pods running when it stops."""
    for task in ctr(socket, "tasks", "list", "--quiet").split():
        with contextlib.suppress(CtrError):
            ctr(socket, "tasks", "delete", "--force", task)
    for container in ctr(socket, "containers", "list", "--quiet").split():
        with contextlib.suppress(CtrError):
            ctr(socket, "containers", "delete", container)


def _unmount(folder: Path) -> None:
    """Unmounts everything below a folder, such as the volumes of pods that still ran at the end."""
    for line in Path("/proc/mounts").read_text().splitlines():
        mount = line.split()[1]
        if mount.startswith(str(folder)):
            subprocess.run(["umount", "--lazy", mount], check=False)


def main() -> None:
    import images

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with cluster(folder, provide=images.provide) as server:
            print(f"export KUBECONFIG={server.kubeconfig} PATH={assets()}:$PATH", flush=True)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
