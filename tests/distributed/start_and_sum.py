"""A worker program for the tests of start-up: join the world, sum over it, leave; errors as the command has them."""

import os
import sys
import time

import torch
import torch.distributed as dist

from megalm.distributed import launch
from megalm.distributed.rendezvous import read_environment
from megalm.errors import MegalmError


def main() -> int:
    """Sum once, or until the end of time with the argument `forever`; return the exit status."""
    failed = True
    try:
        place = read_environment(os.environ)
        launch.start(place, "cpu", start_timeout_s=30, collective_timeout_s=30)
        who = f"rank {dist.get_rank()}"
        with launch.peer_errors(who):
            while True:
                total = torch.ones(1)
                dist.all_reduce(total)
                if "forever" not in sys.argv:
                    break
                print("summed", flush=True)
                time.sleep(0.1)
        launcher = place.launcher if place else None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        agreed = os.environ["WORLD_SIZE"] == str(dist.get_world_size()) and all(os.environ.get(name) for name in names)
        # One write: the launchers join what the ranks print.
        sys.stdout.write(f"{who} of {dist.get_world_size()} by {launcher}: {total.item():.0f} {agreed}\n")
        sys.stdout.flush()
        failed = False
        return 0
    except MegalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        launch.stop(failed)


if __name__ == "__main__":
    sys.exit(main())
