"""Which worker this process is, from the variables that torchrun and srun set. Imports nothing heavy.

Every worker owns the shards with `shard % world_size == rank`, so there is no lock and no coordinator, and any number
of workers can finish in the next run what is missing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from actcache.errors import OthersUnfinishedError, SettingsError

_VARIABLES = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # SLURM_NTASKS is also set without srun
)


@dataclass(frozen=True)
class Worker:
    """One of `world_size` processes that run the same command. `local_rank` counts within a host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # it selects the GPU

    def owns(self, shard: int) -> bool:
        return shard % self.world_size == self.rank

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def check_others(self, n_missing: int, n_shards: int, kind: str) -> None:
        """Raise OthersUnfinishedError if, after this worker has finished, shards of other workers are missing."""
        if n_missing:
            raise OthersUnfinishedError(
                f"Worker {self.rank} of {self.world_size} is done. {n_missing} of {n_shards} shards belong to other "
                f"workers; the last one to finish seals the {kind}. If one died, run the same command again."
            )


def find_worker(environment: Mapping[str, str] = os.environ) -> Worker:
    """The worker that this process is; it is alone unless torchrun or srun started it.

    Raises:
        SettingsError: the variables are not integers, or the rank is outside 0..world_size - 1.
    """
    for launcher, rank, world_size, local_rank in _VARIABLES:
        if rank in environment and world_size in environment:
            variables = {name: environment.get(name, "0") for name in (rank, world_size, local_rank)}
            try:
                worker = Worker(*(int(value) for value in variables.values()))
            except ValueError as error:
                raise SettingsError(f"{launcher} set {variables}; expected integers.") from error
            if not 0 <= worker.rank < worker.world_size or worker.local_rank < 0:
                raise SettingsError(f"{launcher} set {variables}; expected 0 <= {rank} < {world_size}.")
            return worker
    return Worker()
