"""Errors that a user can act on, and the exit codes that batch systems see."""

EXIT_CRASHED = 1
"""An unexpected exception: a bug, or a failing machine. A stack trace is printed."""

EXIT_USER_ERROR = 2
"""Bad configuration, data or checkpoint. One sentence is printed, without a stack trace."""

EXIT_NOT_FINITE = 3
"""The loss, the weights or the gradients became NaN or infinite; the last good checkpoint is kept."""

EXIT_NOT_SAVED = 4
"""Training ended, but its checkpoint could not be written (disk full, read-only)."""

EXIT_STALLED = 5
"""No rank has made progress for ``runtime.stall_timeout`` seconds; what each was doing is printed."""

EXIT_STOPPED = 85
"""Stopped by a signal after a checkpoint was written; start again with ``--resume``."""

EXIT_INTERRUPTED = 130
"""Stopped at once by a second Ctrl-C; nothing was written."""


class UserError(Exception):
    """A mistake in what the user gave us. ``str(error)`` is a sentence that says what to do.

    The command line prints it without a stack trace and ends every rank with ``exit_code``.
    """

    exit_code = EXIT_USER_ERROR
    on_all_ranks = False
    """True when all ranks raise it together, so that they can end in an orderly way; see ``comm.agreement``."""


class NotFiniteError(UserError):
    """Losses, weights or gradients are NaN or infinite; all ranks know it. ``what`` is the sentence without its end."""

    exit_code = EXIT_NOT_FINITE
    on_all_ranks = True

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. The last good checkpoint is kept. Lower solver.base_lr, lengthen solver.warmup_epochs, set "
            "solver.clip_gradient_norm, or look at the images."
        )


class NotSavedError(UserError):
    """A checkpoint that had to be written could not be."""

    exit_code = EXIT_NOT_SAVED
