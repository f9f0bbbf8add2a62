"""Holds Python's garbage collector while the package is imported: a fifth of that time was its.

Importing this stops it, `resume` lets it go on as before; nothing is collected or kept for ever.
"""

import gc

_was_on = gc.isenabled()
gc.disable()


def resume() -> None:
    """Put the collector back as it was found."""
    if _was_on:
        gc.enable()
