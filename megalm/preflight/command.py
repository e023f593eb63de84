"""`megalm doctor`: one machine, or every node of a launched world."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megalm.distributed.rendezvous import Rendezvous, rank_nodes, read_environment
from megalm.errors import AbsentRanks, ConfigError, LaunchError
from megalm.files import write_durably
from megalm.preflight import report, witness
from megalm.preflight.finding import Place, worst
from megalm.preflight.node import examine, node_name
from megalm.preflight.witness import Witness

_WORD_S = 5.0
_COLLECTIVE_TIMEOUT_S = 600  # a node may take that long until all checks that hang there are given up


def examine_machine(run_dir: Path, needed_bytes: int, local_ranks: int, as_json: bool) -> int:
    """Check this machine, print what was found, and return the exit status: 1 if something fails."""
    findings = examine(Place(run_dir, needed_bytes, local_ranks=local_ranks))
    if as_json:
        print(json.dumps(report.machine_object(node_name(), findings), indent=2, ensure_ascii=False))
    else:
        print(report.machine_table(findings))
    return int(worst(findings) == "fail")


def examine_cluster(
    run_dir: Path, needed_bytes: int, exclude_file: Path | None, start_timeout_s: float, as_json: bool
) -> int:
    """Check every node of the world that a launcher started, print on rank 0, and return the same status on all ranks.

    With `exclude_file`, the names of failed nodes are written there, one a line: none where none failed. Raises
    AbsentRanks, after the same has been done for their nodes, where ranks do not arrive in time.
    """
    said = witness.ask(os.environ)
    rendezvous = read_environment(os.environ)
    witness.finish()
    rank = 0 if rendezvous is None else rendezvous.rank
    if rank == 0 and exclude_file is not None:
        _write_names(exclude_file, [])  # fails now rather than after the measurements
    try:
        return _in_world(Place(run_dir, needed_bytes), rendezvous, said, exclude_file, start_timeout_s, as_json)
    except AbsentRanks as error:
        if rank != 0:
            time.sleep(_WORD_S)  # rank 0 has the word, and under srun the first to end takes the others with it
            raise
        nodes = rank_nodes(os.environ)
        absent = list(dict.fromkeys(nodes[rank] for rank in error.ranks if rank < len(nodes)))
        if absent:
            if exclude_file is not None:
                _write_names(exclude_file, absent)
            if as_json:
                print(json.dumps({"level": "fail", "failed": absent, "exclude": report.exclude_line(absent)}, indent=2))
            else:
                print(report.exclude_line(absent))
        raise


def _in_world(
    place: Place,
    rendezvous: Rendezvous | None,
    said: Witness,
    exclude_file: Path | None,
    start_timeout_s: float,
    as_json: bool,
) -> int:
    """Join the world, examine it and return the exit status that all ranks share."""
    import torch
    import torch.distributed as dist

    from megalm.distributed import launch
    from megalm.distributed.collectives import agree
    from megalm.distributed.exchange import broadcast_json
    from megalm.distributed.world import joined_world
    from megalm.preflight.world import examine_world

    if torch.cuda.is_available():
        with contextlib.suppress(LaunchError):  # fewer GPUs than ranks: then it is a world of CPUs, and says so
            place = replace(place, device=launch.local_device(rendezvous, "cuda").index)
    # gloo alone: a node with a broken driver must not keep the others from saying so.
    with joined_world(rendezvous, "cpu", start_timeout_s, _COLLECTIVE_TIMEOUT_S):
        world = dist.group.WORLD
        assert world is not None
        cluster, error = examine_world(place, node_name(), world, said), None
        if cluster is not None:
            try:
                if as_json:
                    print(json.dumps(report.cluster_object(cluster), indent=2, ensure_ascii=False), flush=True)
                else:
                    print(report.cluster_table(cluster), flush=True)
                if exclude_file is not None:
                    _write_names(exclude_file, cluster.failed)
            except Exception as caught:
                error = caught
        agree(error, world)
        status: int = broadcast_json(None if cluster is None else int(cluster.level == "fail"), world)
    return status


def _write_names(path: Path, names: Sequence[str]) -> None:
    try:
        write_durably(path, "".join(f"{name}\n" for name in names).encode())
    except OSError as error:
        raise ConfigError(f"--exclude-file={path}: cannot be written ({error.strerror}); give another path") from error
