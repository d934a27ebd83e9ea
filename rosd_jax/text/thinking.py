"""What a model says outside its thinking. Imports nothing, so that the checkers' workers load it quickly."""

from __future__ import annotations

OPEN = "<think>"
CLOSE = "</think>"


def outside_thinking(text: str, *, opened: bool = False) -> str:
    """The text outside `<think>...</think>`, untrimmed; what stands inside is no answer.

    A `</think>` that nothing opened also takes all text before it, and a `<think>` that never closes
    takes all text after it. opened: the prompt ended inside a thinking block, so the text begins there;
    without a `</think>` all of it is thinking, which gives "".
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
