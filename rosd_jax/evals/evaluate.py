"""avg@k, pass@k and maj@k of one data set, and its raw generations.

Each set is scored separately; sets are never pooled. train/loop.py samples and grades between the two parts,
so this module depends neither on the model nor on the tokenizer.

    requests_of(name, encoded, samples)                      -> what to sample
    score_set(problems, rollout, texts, grades, votes)       -> numbers, generations
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rosd_jax.data.pipeline import Encoded
from rosd_jax.errors import UserError
from rosd_jax.rewards.grade import SUCCESS, Grade
from rosd_jax.rollout.batching import Request
from rosd_jax.types import HostRollout, Problem


def scores(rewards_NK: np.ndarray, votes: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of N items with K samples each.

    votes[n][k] is the answer that a sample votes for, "" if none was read. Equal answers must be equal text,
    as `Grader.votes` makes them.

    avg:      mean over items of their mean reward (avg@k)
    avg_se:   standard error of avg over items, the independent units; NaN for a single item
    pass:     share of items with at least one correct sample (pass@k)
    maj:      share of items whose most frequent answer is correct (maj@k), judged by its first sample; of
              equally frequent answers the first sampled counts; "" counts only if there is no other answer
    distinct: mean number of different answers per item, without ""

    Raises ValueError if there is no item or the shapes differ.
    """
    N, K = rewards_NK.shape
    if N == 0 or K == 0 or [len(row) for row in votes] != [K] * N:
        raise ValueError(f"need votes of N >= 1 items x K >= 1 samples, not {N} x {K}")
    rewards_NK = rewards_NK.astype(np.float64)
    mean_N = rewards_NK.mean(axis=1)
    voted_N = [row[_majority(names)] for row, names in zip(rewards_NK, votes, strict=True)]
    return {
        "avg": float(mean_N.mean()),
        "avg_se": float(mean_N.std(ddof=1) / math.sqrt(N)) if N > 1 else math.nan,
        "pass": float((rewards_NK >= SUCCESS).any(axis=1).mean()),
        "maj": float(np.mean(np.array(voted_N) >= SUCCESS)),
        "distinct": sum(len(set(row) - {""}) for row in votes) / N,
        "k": K,
        "n": N,
    }


def majority_letter(problems: Sequence[Problem]) -> float:
    """The accuracy of always answering the most frequent gold letter of these problems."""
    letters = Counter(problem.answer.strip().upper() for problem in problems)
    return max(letters.values()) / len(problems)


def requests_of(name: str, encoded: Encoded, samples: int) -> list[Request]:
    """`samples` requests per problem of the set `name`. Sample k of item n has uid n * samples + k.

    Raises UserError for a set without problems.
    """
    if not encoded:
        raise UserError(
            f"eval.sets names {name!r}, which has no problem left; drop the set, or raise "
            "data.max_prompt_tokens if all its prompts were too long"
        )
    prompts = [ids for _, ids in encoded for _ in range(samples)]
    return [Request(ids, uid) for uid, ids in enumerate(prompts)]


def score_set(
    problems: Sequence[Problem],
    rollout: HostRollout,
    texts: Sequence[str],
    grades: Sequence[Grade],
    votes: Sequence[str],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The numbers of one set, and one generation per response, in the order of the problems.

    The N problems have K responses each, problem by problem, as `requests_of` asks for them. texts, grades:
    of each response. votes: the answer that each votes for, with equal text for equal answers. The numbers
    are those of `scores`, `length` (mean tokens of a response), `truncated` (share cut at the limit) and, if
    every problem is multiple choice, `majority_letter`.
    """
    K = len(texts) // len(problems)
    rows = zip(rollout.tokens_BR, rollout.length_B, strict=True)
    responses = [tokens_R[:length].tolist() for tokens_R, length in rows]
    repeated = [problem for problem in problems for _ in range(K)]
    finished = rollout.finished_B.tolist()
    columns = zip(repeated, texts, responses, grades, votes, finished, strict=True)
    generations = [
        {
            "uid": problem.uid,
            "sample": i % K,
            "response": text,
            "token_ids": ids,
            "reward": float(grade.score),
            "prediction": grade.prediction,
            "vote": vote,
            "truncated": not done,
        }
        for i, (problem, text, ids, grade, vote, done) in enumerate(columns)
    ]
    return _numbers(problems, generations, K), generations


def _majority(votes: Sequence[str]) -> int:
    """Index of the first sample that votes for the most frequent answer."""
    counts = Counter(name for name in votes if name) or Counter(votes)
    return list(votes).index(max(counts, key=lambda name: counts[name]))  # of equally frequent ones the first


def _numbers(
    problems: Sequence[Problem], generations: Sequence[dict[str, Any]], samples: int
) -> dict[str, float]:
    shape = (len(problems), samples)
    rewards_NK = np.array([row["reward"] for row in generations], np.float64).reshape(shape)
    votes = [row["vote"] for row in generations]
    numbers = scores(rewards_NK, [votes[i : i + samples] for i in range(0, len(votes), samples)])
    if all(problem.kind == "own" for problem in problems) and not any(votes):
        numbers["maj"] = math.nan  # the user's function gives no predictions
    numbers["length"] = float(np.mean([len(row["token_ids"]) for row in generations]))
    numbers["truncated"] = float(np.mean([row["truncated"] for row in generations]))
    if all(problem.kind == "mcq" for problem in problems):
        numbers["majority_letter"] = majority_letter(problems)
    return numbers
