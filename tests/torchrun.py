"""Runs started by torchrun, and their living processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

MINUTE = 60


class Torchrun:
    """Processes started by torchrun on one or several "nodes" of this machine."""

    def __init__(self, *arguments, processes=(2,), marker):
        self.marker = f"TEST_OF_PROCESSES={marker}"
        place = ["--standalone"]
        if len(processes) > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = "--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])
            place = ["--nnodes", str(len(processes)), *address]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict([self.marker.split("=", 1)])
        pipe = subprocess.PIPE
        self.agents = []
        for node, number in enumerate(processes):
            place_of_node = [*place, "--node_rank", str(node)] if len(processes) > 1 else place
            start = [sys.executable, "-m", "torch.distributed.run", *place_of_node, "--nproc_per_node", str(number)]
            self.agents.append(
                subprocess.Popen(
                    [*start, *map(str, arguments)],
                    stdout=pipe,
                    stderr=pipe,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                    start_new_session=True,
                )
            )

    def end(self, timeout=10 * MINUTE):
        """Wait for the end; return exit code, standard output and standard error of the first node."""
        for agent in self.agents[1:]:
            agent.communicate(timeout=timeout)
        out, err = self.agents[0].communicate(timeout=timeout)
        return self.agents[0].returncode, out, err

    def alive(self):
        """Ids of the living processes by rank (None for the agents)."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                environment = (
                    (folder / "environ").read_text(errors="replace").split("\0") if folder.name.isdigit() else ()
                )
                if self.marker in environment:
                    found[next((e[5:] for e in environment if e.startswith("RANK=")), None)] = int(folder.name)
        return found

    def kill(self):
        """Kill all living processes and wait for their end."""
        while alive := self.alive():
            for number in alive.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            for agent in self.agents:
                agent.poll()
            time.sleep(0.02)
        for agent in self.agents:
            agent.communicate()
