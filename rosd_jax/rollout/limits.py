"""What an engine may hold, and how many pages that takes."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_PAGE = 64  # positions


@dataclass(frozen=True)
class Limits:
    """The sizes of an engine, fixed when it is compiled (hashable).

    With fewer response pages than its slots may come to need, a shard preempts its newest sequences, which
    are later decoded again from their start. Where the distinct prompts of a call take more than
    prompt_tokens, the call is split into turns.
    """

    max_new: int  # tokens of a response, at least 1
    max_prompt: int  # tokens of a prompt
    slots: int | None = None  # maximum concurrent sequences, over all shards; None: all of a call
    page_length: int | None = None  # positions of a page; None: shorter for short responses, to limit waste
    response_pages: int | None = None  # a shard's pages for responses; None: for its slots at full length
    prompt_tokens: int | None = None  # a shard's cache capacity for distinct prompts; None: for all of a call
    # What a call's numbers of rows and of distinct prompts are multiples of, so that few shapes are compiled.
    rows: int = 1
    prompts: int = 1

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.page_length or page_length(self.max_new)


def page_length(max_new: int) -> int:
    """Positions of a page: 16 to LONGEST_PAGE, so that a short response fills most of its last one."""
    return min(LONGEST_PAGE, max(16, 1 << max(0, max_new.bit_length() - 2)))


def own_pages(page: int, max_new: int) -> int:
    """The most pages that a sequence may need in addition to the shared ones of its prompt."""
    return (max_new + page - 2) // page + 1


def table_pages(page: int, prompt: int, max_new: int) -> int:
    """Pages of the longest sequence; its last token is never fed."""
    return -(-(prompt + max_new - 1) // page)
