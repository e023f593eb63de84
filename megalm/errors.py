"""The errors a user can meet, and the exit status that each one ends the program with.

Every message is one line: the value, the reason, the remedy.
"""

HUNG = 50
"""Exit status of the ranks of a run that the watchdog ended; also the number of the (real-time) signal that does it."""

FROZEN = HUNG + 1
"""The number of the signal by which the watchdog has a rank write its stacks and stand still until that."""


class MegalmError(Exception):
    """Something failed while running: exit status 1."""

    exit_status = 1


class UserError(MegalmError):
    """What the user wrote or passed is wrong: exit status 2, before memory is taken or a group is formed."""

    exit_status = 2


class ConfigError(UserError):
    """A recipe, an override or a DeepSpeed JSON is wrong."""


class DataError(UserError):
    """A text, token or tokenizer file is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint are missing, lost by the disk, or not as they were written; an older one may do."""


class StorageError(CheckpointError):
    """A disk refused a write; what is saved already is kept, and another start may find the disk well."""

    exit_status = 1


class LaunchError(UserError):
    """A launcher is asked for what it cannot do, or left an environment that is partial or contradicts the recipe."""


class Interrupted(MegalmError):
    """A signal asked to stop; the run is saved and goes on when it is started again: exit status 75 (EX_TEMPFAIL)."""

    exit_status = 75


class CorruptionError(MegalmError):
    """Ranks that must hold the same numbers do not: a GPU or its memory is broken. No start may follow by itself."""

    exit_status = 51


class Diverged(MegalmError):
    """Steps went wrong again and again; another start would only compute the same. No start may follow by itself."""

    exit_status = 52


class OutOfMemory(MegalmError):
    """A rank's device or machine has no memory left; another start would come to the same."""


class DistributedError(MegalmError):
    """A peer died, could not be reached in time, or reported an error of its own."""


class AbsentRanks(DistributedError):
    """Ranks that a launcher has announced did not arrive in time; `ranks` are those, where rank 0 knows them."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
