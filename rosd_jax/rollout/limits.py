"""What an engine may hold, and how many pages that takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rosd_jax.errors import UserError

LONGEST_PAGE = 64  # positions


@dataclass(frozen=True)
class Limits:
    """The sizes of an engine, fixed when it is compiled (hashable).

    With fewer response pages than its slots may come to need, a shard preempts its newest sequences, which
    are later decoded again from their start. Where the distinct prompts of a call take more than
    prompt_tokens, the call is split into turns. Raises UserError, which is a ValueError, for a size that is
    not an int in [1, 2**31), for response_pages that a single response may exceed, and for prompt_tokens
    that a single prompt may exceed.
    """

    max_new: int  # tokens of a response
    max_prompt: int  # tokens of a prompt
    slots: int | None = None  # maximum concurrent sequences, over all shards; None: all of a call
    page_length: int | None = None  # positions of a page; None: shorter for short responses, to limit waste
    response_pages: int | None = None  # a shard's pages for responses; None: for its slots at full length
    prompt_tokens: int | None = None  # a shard's cache capacity for distinct prompts; None: for all of a call
    # What a call's numbers of rows and of distinct prompts are multiples of, so that few shapes are compiled.
    rows: int = 1
    prompts: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new", "max_prompt", "rows", "prompts"):
            _check_size(name, getattr(self, name))
        for name in ("slots", "page_length", "response_pages", "prompt_tokens"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        pages = own_pages(self.page, self.max_new)
        if self.response_pages is not None and self.response_pages < pages:
            raise UserError(
                f"response_pages is {self.response_pages}; one sequence alone may need {pages}, so raise it "
                "or lower max_new"
            )
        tokens = whole_pages(self.max_prompt)
        if self.prompt_tokens is not None and self.prompt_tokens < tokens:
            raise UserError(
                f"prompt_tokens is {self.prompt_tokens}; one prompt of max_prompt = {self.max_prompt} tokens "
                f"may need {tokens}, in whole pages, so raise it or lower max_prompt"
            )

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.page_length or page_length(self.max_new)


def _check_size(name: str, size: int) -> None:
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if not whole or not 1 <= size < 2**31:
        raise UserError(f"{name} is {size!r}; it must be an int of at least 1 and below 2**31")


def whole_pages(tokens: int) -> int:
    """The tokens rounded up to pages of the longest kind, as prompts are counted."""
    return -(-tokens // LONGEST_PAGE) * LONGEST_PAGE


def page_length(max_new: int) -> int:
    """Positions of a page: 16 to LONGEST_PAGE, so that a short response fills most of its last one."""
    return min(LONGEST_PAGE, max(16, 1 << max(0, max_new.bit_length() - 2)))


def own_pages(page: int, max_new: int) -> int:
    """The most pages that a sequence may need in addition to the shared ones of its prompt."""
    return (max_new + page - 2) // page + 1


def table_pages(page: int, prompt: int, max_new: int) -> int:
    """Pages of the longest sequence; its last token is never fed."""
    return -(-(prompt + max_new - 1) // page)
