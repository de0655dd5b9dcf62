"""Network interface of the process group: that of the node's address in Ray."""

from __future__ import annotations

import os
import socket

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class NodeTorchConfig(TorchConfig):
    """Ray Train's configuration of ``torch.distributed``, with the network interface of each node's Ray address.

    By default, gloo listens on the address of the host name, which is
    127.0.1.1 on Debian and Ubuntu and
    unreachable from other hosts.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Backend that sets the interface on each worker before the process group is created."""
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]  # Ray annotates it by private types
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Set the interface of this node's Ray address for gloo and NCCL, unless the environment sets one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """Return the network interface with this address; None if there is none."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, found in psutil.net_if_addrs().items():
        # Link-local addresses end with % and the name of the interface.
        if any(entry.family in families and entry.address.partition("%")[0] == address for entry in found):
            return name
    return None
