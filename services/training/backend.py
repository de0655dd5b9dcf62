"""How the workers of a job meet: on the address by which Ray knows their node."""

from __future__ import annotations

import os
import socket

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class NodeTorchConfig(TorchConfig):
    """Ray Train's configuration of ``torch.distributed``, with the network interface of each node's Ray address.

    Left alone, gloo takes the address that the host's name resolves to: 127.0.1.1 on Debian and Ubuntu, where no
    other host finds it.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Sets the interface on each worker before the process group is made."""
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]  # Ray annotates it by private types
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Tell gloo and NCCL the interface of this node's address in Ray, unless the environment names one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """The network interface that holds an address, None where none does."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, found in psutil.net_if_addrs().items():
        # The addresses of a link carry its name behind a %.
        if any(entry.family in families and entry.address.partition("%")[0] == address for entry in found):
            return name
    return None
