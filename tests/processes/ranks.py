"""A server that starts ranks fast: it imports once what the programs of this folder need, and forks every rank.

Reads jobs from its standard input, one JSON object a line: "program", "processes", "arguments", and the file for the
"output" of all ranks. Ranks get the environment variables that torchrun would set. As with torchrun, the others are
killed when one ends with an error. For every job a line with the first exit status that is not 0 is written, or 0.
"""

import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import conftest  # noqa: F401

# Imported here and not by every rank.
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import Trainer  # noqa: F401

import traj_merge_callback.lightning
import traj_merge_callback.transformers  # noqa: F401


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def become(job, rank: int, port: int) -> None:
    """Make this process, just forked, one rank of a job."""
    if (size := job["processes"]) > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked"}
        os.environ |= {
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "WORLD_SIZE": f"{size}",
            "LOCAL_WORLD_SIZE": f"{size}",
        }
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    sys.argv = [job["program"], *job["arguments"]]
    sys.path[0] = str(Path(job["program"]).parent)


def waited_for(ranks: set[int]) -> int:
    """The first exit status of these processes that is not 0, after which the others are killed."""
    failed = 0
    while ranks:
        ended, status = os.waitpid(-1, 0)
        ranks.remove(ended)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
    return failed


def serve() -> str | None:
    """Start jobs until there are no more; in a rank, return the program that it is to run."""
    for line in sys.stdin:
        job, port = json.loads(line), free_port()
        ranks = set[int]()
        for rank in range(job["processes"]):
            if (forked := os.fork()) == 0:
                become(job, rank, port)
                return job["program"]
            ranks.add(forked)
        print(waited_for(ranks), flush=True)
    return None


if __name__ == "__main__" and (program := serve()) is not None:
    runpy.run_path(program, run_name="__main__")
