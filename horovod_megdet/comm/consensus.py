"""What one rank learns alone, all agree on before anyone acts: a rank that skips a collective stops the others."""

import contextlib
from collections.abc import Iterator

from horovod_megdet import launched
from horovod_megdet.comm.collectives import gather_objects, size
from horovod_megdet.errors import EXIT_USER_ERROR, UserError


@contextlib.contextmanager
def agreement(name: str) -> Iterator[None]:
    """Runs the block on every rank; a :class:`UserError` on any of them becomes one on all of them.

    The message says which ranks and hosts it happened on unless it happened everywhere. Any other exception passes
    through: a rank that crashes ends the job (see :func:`abort`).
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    message, exit_code = ("", 0) if mine is None else (str(mine), mine.exit_code)
    reports = gather_objects((launched.host(), message, exit_code), f"agreement.{name}")
    sentences: dict[str, list[str]] = {}
    for number, (where, message, _) in enumerate(reports):
        if message:
            sentences.setdefault(message, []).append(f"rank {number} on {where}")
    if not sentences:
        return
    lines = [text if len(who) == size() else f"{text} ({', '.join(who)})" for text, who in sentences.items()]
    raise agreed_error("\n".join(lines), max(code for _, _, code in reports)) from mine


def agreed_error(sentence: str, exit_code: int = EXIT_USER_ERROR) -> UserError:
    """An error that all ranks raise together, so that they can end in an orderly way."""
    error = UserError(sentence)
    error.on_all_ranks = True
    error.exit_code = exit_code
    return error


def check_same(values: dict[str, str], name: str) -> None:
    """Raises a :class:`UserError` on all ranks, naming ranks, hosts and values, where one differs from rank 0's."""
    reports = gather_objects((launched.host(), values), f"check_same.{name}")
    reference_host, reference = reports[0]
    lines = []
    for number, (where, theirs) in enumerate(reports):
        for key, expected in reference.items():
            if theirs.get(key) != expected:
                lines.append(
                    f"{key} differs: {theirs.get(key)} on rank {number} ({where}), "
                    f"{expected} on rank 0 ({reference_host})"
                )
    if lines:
        raise agreed_error("The ranks do not agree, so they cannot train together.\n" + "\n".join(lines))
