"""What becomes of a run whose steps go wrong: each is reported, and too many send it back to an earlier checkpoint.

A step that is wrong (`stability`) made no update. Where that does not help, the weights themselves are suspect: the run
takes up a checkpoint from before the trouble and goes on with the data behind it. All ranks know the same loss and
gradient norm, so all decide alike.
Source: Chowdhery et al. 2022, section 5.1 (PaLM: restarted about 100 steps before a spike, its batches skipped).
"""

from __future__ import annotations

from collections.abc import Callable

from megalm.checkpoint.manager import CheckpointManager
from megalm.checkpoint.reader import CheckpointReader
from megalm.errors import Diverged
from megalm.train.continuing import progress_of
from megalm.train.monitor import Throughput
from megalm.train.saving import SaveCheckpoints
from megalm.train.tracking import Tracker
from megalm.train.trainer import StepResult, Trainer, TrainState

RECENT_STEPS = 10
"""`stability.patience` wrong steps within so many make the run go back."""
FORGOTTEN_STEPS = 1000
"""So many steps behind the last trouble the count of `stability.rollbacks` begins anew."""
_REMEDY = "lower optim.lr, lengthen lr_schedule.warmup_steps, or look at the data of these steps"


class GoBack:
    """Report the steps that made no update, and go back to a checkpoint when they come too close together."""

    def __init__(
        self,
        tracker: Tracker,
        meter: Throughput,
        manager: CheckpointManager,
        save: SaveCheckpoints,
        load: Callable[[CheckpointReader], None],
    ) -> None:
        self.tracker = tracker
        self.meter = meter
        self.manager = manager
        self.save = save
        self.load = load

    def after_wrong_step(self, trainer: Trainer, result: StepResult) -> bool:
        """Report the step that was skipped, and return whether the run went back. Every rank calls.

        Raises Diverged where there is no checkpoint to go back to, or the run went back too often.
        """
        state, settings = trainer.state, trainer.config.stability
        self.tracker.event(
            {"step": state.step, "event": "skipped step", "reason": result.wrong or "", "train/loss": result.loss}
        )
        state.skipped_steps = [step for step in state.skipped_steps if step > state.step - RECENT_STEPS] + [state.step]
        if len(state.skipped_steps) < settings.patience:
            return False
        text = f"step {state.step}: {result.wrong}; {settings.patience} of the last {RECENT_STEPS} steps made no update"
        if state.step > state.left_at + FORGOTTEN_STEPS:
            state.rollbacks = 0
        if state.rollbacks >= settings.rollbacks:
            raise Diverged(f"{text} and the run went back {state.rollbacks} times before; {_REMEDY}")
        reader = self._checkpoint(state)
        if reader is None:
            raise Diverged(f"{text} and there is no checkpoint to go back to; {_REMEDY}")
        self._go_back(trainer, reader)
        return True

    def _checkpoint(self, state: TrainState) -> CheckpointReader | None:
        """Load the newest checkpoint before the wrong steps, after a rollback in vain an earlier one, and return it."""
        first = state.skipped_steps[0]
        return self.manager.latest(self.load, [min(first, state.went_to), first] if state.rollbacks else [first])

    def _go_back(self, trainer: Trainer, reader: CheckpointReader) -> None:
        """Take up the checkpoint with the data behind the present step, and make it the newest one."""
        left = trainer.state
        now = trainer.state = progress_of(reader)
        now.samples, now.tokens, now.rollbacks = left.samples, left.tokens, left.rollbacks + 1
        now.left_at, now.went_to = left.step, now.step
        self.manager.drop_after(now.step)
        self.save.went_back(reader)
        self.tracker.rewind(now.step)
        self.meter.start(now.step)
        tell_of_damaged(self.tracker, self.manager, now.step)
        self.tracker.event(
            {
                "step": now.step,
                "event": "went back",
                "from_step": left.step,
                "reason": f"{len(left.skipped_steps)} skipped steps since step {left.skipped_steps[0]}",
                "next_sample": now.samples,
            }
        )
        self.save.save(trainer, wait=True)  # or an interruption now would bring the same data again


def tell_of_damaged(tracker: Tracker, manager: CheckpointManager, step: int) -> None:
    """Say which damaged checkpoints were passed over for the one of `step`, and why."""
    for reason in manager.passed_over.values():
        tracker.event({"step": step, "event": "DAMAGED CHECKPOINT PASSED OVER", "reason": reason})
