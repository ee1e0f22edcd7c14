"""What the command line prints goes through here: tables, details and sentences as they are, never as markup.

Names, labels and messages are written by customers and engines. Rich would read `[...]` in them as styles, and `:x:` as
pictures; a terminal would obey their control characters. Style is given by `styled` alone.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

# Of what goes into a pipe or a file: no line of a table is folded there, and no uuid shortened.
PIPED_WIDTH = 1000


def printable(text: str) -> str:
    """The text with everything that a terminal might obey written out, such as `\\x1b`; lines and tabs stay."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else ascii(char)[1:-1] for char in text
    )


def one_line(text: str) -> str:
    """As `printable`, on one line: nobody's text passes for a line of its own."""
    return printable(text).replace("\n", "\\n")


def styled(text: str, style: str) -> Text:
    """Data in a style of Rich's, for `print` and for cells of tables."""
    return Text(printable(text), style)


class Screen(Console):
    """A console on which strings are data, also in tables and paddings."""

    def __init__(self, *, stderr: bool = False) -> None:
        is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
        width = None if is_terminal else PIPED_WIDTH
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """Rich's hook for each string that it shows."""
        return super().render_str(printable(text), **how)


console = Screen()
errors = Screen(stderr=True)


def say_error(sentence: str) -> None:
    """Prints why a command cannot go on, to stderr. What ends the command is the caller's."""
    errors.print(Text.assemble(("awan:", "red"), f" {printable(sentence)}"), soft_wrap=True)
