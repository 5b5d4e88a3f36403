"""The engine on several GPUs: a process each, and a main process that has none."""

from __future__ import annotations

import gc
import tempfile
from contextlib import ExitStack
from pathlib import Path

from podsim.config import Deployment
from podsim.hardware import gpu_named
from podsim.kv_cache import num_blocks_for
from podsim.measure import require_gpu
from podsim.model import model_named
from podsim.ranks import Rank, Ranks
from podsim.scheduler import StepTime
from podsim.serving import (
    HostTime,
    Progress,
    Served,
    Server,
    llama_of,
    require_servable,
    slot_len,
)
from podsim.tensor_parallel import join_group, require_gpus
from podsim.workload import Trace


class SharedServer:
    """The same as `Server` on the GPUs of a deployment, in a process each; this one has none.

    Raises InputError, here and later, also for whatever fails in one of the processes: then all of
    them are ended.
    """

    def __init__(
        self,
        deployment: Deployment,
        max_len: int,
        on_progress: Progress = lambda what, done, total: None,
    ) -> None:
        require_servable(deployment)
        require_gpus(deployment.tensor_parallel_size)
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self._ranks = stack.enter_context(
                Ranks(
                    _serve_on_one_gpu,
                    deployment.tensor_parallel_size,
                    (deployment, max_len, Path(folder, "meeting").as_uri()),
                    on_progress,
                )
            )
            self.host_time: HostTime = self._ranks.answer()
            self._stack = stack.pop_all()

    def serve(self, trace: Trace, step_time: StepTime, seed: int = 0) -> Served:
        """Serve a trace from its first arrival to its last token, in real time."""
        served: Served = self._ranks.ask((trace, step_time, seed))
        return served

    def close(self) -> None:
        """End the processes."""
        self._stack.close()


def server_for(
    deployment: Deployment,
    max_len: int,
    on_progress: Progress = lambda what, done, total: None,
) -> Server | SharedServer:
    """A server on as many GPUs as the deployment has."""
    kind = Server if deployment.tensor_parallel_size == 1 else SharedServer
    return kind(deployment, max_len, on_progress)


def _serve_on_one_gpu(rank: Rank, deployment: Deployment, max_len: int, meeting: str) -> None:
    """Life of the process of one of several GPUs."""
    model = model_named(deployment.model)
    group = join_group(rank, model, meeting)
    if not group.is_first:
        gpu = gpu_named(deployment.gpu)
        require_gpu(gpu)
        num_blocks = num_blocks_for(deployment, model, gpu)
        llama = llama_of(deployment, slot_len(deployment, max_len, num_blocks), num_blocks, group)
        llama.capture()
        gc.collect()
        gc.disable()  # a collection would hold up a step of all
        llama.follow()
    server = Server(deployment, max_len, rank.tell, group)
    rank.answer(server.host_time)
    for trace, step_time, seed in rank.questions():
        rank.answer(server.serve(trace, step_time, seed))
