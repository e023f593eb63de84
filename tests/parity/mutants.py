"""`python -m tests.parity.mutants`: plant every fault, print what the gate said; a fault that passes is a failure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from tests.parity import (
    context_faults,
    expert_faults,
    faults,
    latent_faults,
    mtp_faults,
    offload_faults,
    option_faults,
    overlap_faults,
    recomputation_faults,
    schedule_faults,
)
from tests.parity.cases import OPTIMIZERS, misses
from tests.parity.faults import Mutant, Patches
from tests.parity.harness import RankReport, compare, reference_run, train_rank
from tests.worker_pool import WorkerError, WorkerPool

STEPS = 8

MUTANTS: tuple[Mutant, ...] = (
    *faults.MUTANTS,
    *option_faults.MUTANTS,
    *schedule_faults.MUTANTS,
    *context_faults.MUTANTS,
    *latent_faults.MUTANTS,
    *mtp_faults.MUTANTS,
    *expert_faults.MUTANTS,
    *offload_faults.MUTANTS,
    *overlap_faults.MUTANTS,
    *recomputation_faults.MUTANTS,
)

_IN_EVERY_TEST_RUN = (
    "no_all_reduce_behind_a_column_parallel_layer",
    "replicated_norms_counted_on_every_tensor_rank",
    "stale_tied_embedding",
    "loss_weighted_by_this_ranks_tokens",
    "earlier_microbatches_fade_under_zero_2",
    "same_dropout_mask_for_the_heads_of_every_rank",
    "labels_shifted_behind_a_stage_boundary",
    "layers_counted_from_the_stage_s_first",
    "head_norms_see_one_ranks_heads_only",
    "padding_has_a_loss",
    "muon_orthogonalises_each_ranks_shard",
    "the_owners_result_is_lost_on_the_last_partition",
    "weight_gradients_made_twice_for_a_microbatch",
    "weight_gradients_of_another_microbatch_s_inputs",
    "message_taken_for_that_of_the_other_chunk",
    "key_gradients_stay_where_they_were_made",
    "heads_change_places_with_tokens_out_of_order",
    "projections_down_see_one_ranks_tokens",
    "further_tokens_are_those_of_the_row_s_begin",
    "expert_gradients_summed_over_all_data_ranks",
    "loads_balanced_over_a_microbatch",
    "tied_weight_summed_after_its_first_use",
    "gradient_of_a_chunk_taken_for_another_s",
    "inputs_are_gathered_again_out_of_order",
)
REPRESENTATIVE = tuple([mutant.plant.__name__ for mutant in MUTANTS].index(name) for name in _IN_EVERY_TEST_RUN)
"""The mutants, by their place, that every test run plants."""


@contextmanager
def planted(plant: Callable[[], Patches]) -> Iterator[None]:
    """Break what the mutant breaks, inside."""
    with ExitStack() as stack:
        for patch in plant():
            stack.enter_context(patch)
        yield


def train_mutant(mesh: ParallelMesh, config: RunConfig, steps: int, place: int) -> RankReport:
    """Train a rank with the mutant at this place of MUTANTS planted; runs in a worker."""
    with planted(MUTANTS[place].plant):
        return train_rank(mesh, config, steps)


def verdict(pool: WorkerPool, place: int) -> str:
    """Return what the gate says of a mutant: empty where it passed unseen. Raises WorkerError for a broken one."""
    mutant = MUTANTS[place]
    config = mutant.case.config(precision="fp64", **OPTIMIZERS[mutant.optimizer])
    expected = reference_run(config, STEPS)
    try:
        reports = pool.run(train_mutant, config, STEPS, place, layout=mutant.case.layout)
        return "; ".join(misses(compare(reports, expected), "fp64"))
    except WorkerError as error:
        last = str(error).strip().splitlines()[-1]
        if any(word in last for word in ("TypeError", "AttributeError", "NameError")):
            raise  # the code that it replaces has changed: nothing was planted
        return f"stopped: {last}"
    except AssertionError as error:
        return str(error)


def main(words: list[str]) -> int:
    """Plant the mutants whose names hold all words and print a row each; return 1 where one passed."""
    chosen = {place: mutant for place, mutant in enumerate(MUTANTS) if all(word in mutant.name for word in words)}
    if not chosen:
        print(f"no fault has {' and '.join(words)} in its name", file=sys.stderr)
        return 2
    pool = WorkerPool(8)
    width = max(len(mutant.name) for mutant in chosen.values())
    caught = 0
    for place, mutant in chosen.items():
        try:
            said = verdict(pool, place)
            caught += bool(said)
        except WorkerError as error:
            said = f"NOT PLANTED: {str(error).strip().splitlines()[-1]}"
        print(f"{mutant.name:<{width}}  {mutant.case.name:<28}  {said or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen)} faults planted, {caught} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
