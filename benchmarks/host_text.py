"""Seconds that a host spends on the text of a step at the real size: 32 x 8 responses of 8,192 tokens.

    ROSD_DATA_DIR=DIR python -m benchmarks.host_text [--rounds=3]

A response is solutions of ProcessBench one after the other, up to 8,192 tokens of Qwen3's tokenizer. Half are
wrong. Of the quotes a third are exact, a third have other white space and marks, so that the slower search
finds them, and a third are not in the response. Printed: the median seconds of each part of the step.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

from benchmarks.timing import interleaved, summary, table
from rosd_jax.config import default_config, validate
from rosd_jax.distill import reflect, teacher
from rosd_jax.text.prompts import ENGLISH
from rosd_jax.text.tokenizer import Tokenizer, load_tokenizer
from rosd_jax.types import Graded, Problem, Prompts, Reflected, Rollout

GROUPS = 32
SAMPLES = 8
LENGTH = 8192
IDEA = "The sign changes when the term is moved to the other side of the equation. " * 4


def make_batch(directory: Path, tokenizer: Tokenizer) -> Graded:
    """A graded batch; every second row is right."""
    lines = (directory / "processbench" / "reflector_bench.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = []
    tokens = []
    next_row = 0
    for _ in range(GROUPS * SAMPLES):
        ids: list[int] = []
        while len(ids) < LENGTH:
            ids += tokenizer.encode(rows[next_row % len(rows)]["response"] + "\n\n")
            next_row += 1
        tokens.append(ids[:LENGTH])
        texts.append(tokenizer.decode(ids[:LENGTH]))
    problems = tuple(
        Problem(row["id"], "processbench", "math", ({"role": "user", "content": row["problem"]},), "42")
        for row in rows[:GROUPS]
    )
    prompts = tokenizer.encode_chats([p.messages for p in problems], thinking=False)
    B = len(texts)
    rollout = Rollout(
        np.array(tokens, np.int32), np.full(B, LENGTH), np.zeros((B, LENGTH), np.float32), np.ones(B, bool)
    )
    rewards_B = np.arange(B, dtype=np.float32) % 2
    return Graded(Prompts(problems, tuple(prompts)), rollout, tuple(texts), rewards_B, thinking_open=False)


def answer(row: int, text: str) -> str:
    """What the reflector says about a response."""
    at = len(text) * (row % 7 + 1) // 9
    quote = text[at : at + 200]
    if row % 3 == 1:
        quote = " ".join(quote.split()).replace(".", ",")
    if row % 3 == 2:
        quote = quote[::-1]
    return f"<error_quote>{quote}</error_quote>\n<explanation>{IDEA}</explanation>"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    data = Path(os.environ["ROSD_DATA_DIR"])
    tokenizer = load_tokenizer(data / "qwen3_tokenizer")
    config = validate(default_config())
    graded = make_batch(data, tokenizer)
    plans = reflect.plan_rollouts(graded, config.reflect)
    raws = {row: answer(row, text) for row, text in enumerate(graded.texts) if plans[row].kind}

    def decode() -> None:
        tokenizer.decode_all(graded.rollout.tokens_BR)

    def prompts() -> None:
        reflect.build_prompts(graded, plans, tokenizer, config.reflect, thinking=False, wording=ENGLISH)

    def read() -> Reflected:
        said = {
            row: reflect.read_answer(graded, row, raw, tokenizer, config.lesson, thinking_open=False)
            for row, raw in raws.items()
        }
        return reflect.gather(graded, plans, raws, said, config.lesson)

    reflected = read()

    def teach() -> None:
        teacher.teacher_prompts(reflected, tokenizer, config.lesson, thinking=False, wording=ENGLISH)

    parts = {
        "decode the responses": decode,
        "build the reflector's prompts": prompts,
        "parse reflections, locate quotes": read,
        "build the teacher's prompts": teach,
    }
    times, errors = interleaved(parts, warmups=0, reps=rounds)
    assert not errors, errors
    print(
        table(["part", "seconds"], [[name, f"{summary(times[name])['median'] / 1e3:.2f}"] for name in parts])
    )


if __name__ == "__main__":
    main()
