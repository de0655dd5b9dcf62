"""Stop requests from the driver and from a draining node, on a separate cluster; the last test stops its node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import subprocess, sys
from pathlib import Path
from services.cluster import start_cluster
from services.settings import Settings

start_cluster(Settings(home=Path(sys.argv[1])), cpus=2)
import ray
from services.platform.processes import wait_until
from services.training.stopping import ask_to_stop


@ray.remote(num_cpus=1)
class Worker:
    def enter(self, first):
        from services.training.stopping import StopRequest

        self.request = StopRequest(first).__enter__()

    def asked(self):
        return self.request.asked

    def leave(self, kind=None):
        self.request.__exit__(kind, None, None)


assert not ask_to_stop(), "nobody trains"
first, other = Worker.remote(), Worker.remote()
ray.get([first.enter.remote(True), other.enter.remote(False)])
assert ask_to_stop()
assert wait_until(lambda: ray.get(first.asked.remote()), 60)
assert not ray.get(other.asked.remote()), "the first one tells it"
ray.get([first.leave.remote(), other.leave.remote()])
assert not ask_to_stop(), "they train no more"
ray.get([first.enter.remote(True), other.enter.remote(False)])
assert not ray.get(first.asked.remote()), "a request is over with the training that it was for"
assert ask_to_stop()
ray.get([first.leave.remote(OSError), other.leave.remote(OSError)])
ray.get([first.enter.remote(True), other.enter.remote(False)])
assert wait_until(lambda: ray.get(first.asked.remote()), 60), "a request outlives workers that fail before they heed it"
print("driver heard", flush=True)

context = ray.get_runtime_context()
command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", context.gcs_address]
command += ["--node-id", context.get_node_id(), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
subprocess.run([*command, "--reason-message", "spot", "--deadline-remaining-seconds", "600"], check=True)
assert wait_until(lambda: ray.get(other.asked.remote()), 60)
print("node heard", flush=True)
"""


def test_workers_hear_of_their_driver_and_that_their_node_leaves(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.stdout.split("\n")[:2] == ["driver heard", "node heard"], done.stdout + done.stderr
