"""The one exception for mistakes of the user, and the "did you mean" that its messages end with.

Anything a user can get wrong (a missing file, an unknown key, a corrupt checkpoint) raises `UserError` with one
message that names the file, the field or id and, where there is one, the nearest valid choice. The command line
prints it without a traceback and exits with status 2; the Python API lets it through as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; `str(error)` is the whole message."""


# what a terminal obeys in the place of showing it: control characters, and marks that turn the direction of text
_TURNS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_OBEYED = {code: chr(code).encode("unicode_escape").decode() for code in (*range(0x20), *range(0x7F, 0xA0), *_TURNS)}
_OBEYED_LINES = {code: text for code, text in _OBEYED.items() if chr(code) not in "\n\t"}


def printable(text: str, *, lines: bool = True) -> str:
    """`text` for a terminal: a name from a file cannot move the cursor, colour, hide or reverse what is printed.

    Such characters appear as escapes (`\\x1b`); `lines` keeps line ends and tabs.
    """
    return text.translate(_OBEYED_LINES if lines else _OBEYED)


def nearest(name: object, choices: Iterable[object]) -> str:
    """The end of a message about an unknown name: ` (did you mean "x"?)`, or the choices when nothing is near."""
    options = [str(choice) for choice in choices]
    match = difflib.get_close_matches(str(name), options, n=1, cutoff=0.55)
    if match:
        return f' (did you mean "{match[0]}"?)'
    if not options:
        return ""
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f" (choices: {shown})"
