"""A response without its thinking. Imports nothing, so that the checkers' workers load it quickly."""

from __future__ import annotations

OPEN = "<think>"
CLOSE = "</think>"


def outside_thinking(text: str, *, opened: bool) -> str:
    """The text outside `<think>...</think>`, not trimmed.

    A `</think>` without an opening tag removes all text before it, and a `<think>` that is never closed
    removes all text after it. opened: the prompt ended inside a thinking block, so the text begins there;
    without a `</think>` all of it is thinking, and the result is "".
    """
    if opened:
        text = OPEN + text
    *closed, rest = text.split(CLOSE)
    kept: list[str] = []
    for piece in closed:
        before, found, _ = piece.partition(OPEN)
        if found:
            kept.append(before)
        else:
            kept.clear()
    return "".join(kept) + rest.partition(OPEN)[0]
