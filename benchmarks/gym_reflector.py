"""How good the gym's base model is before any ROSD: exact error quotes, and solving with and without an idea.

    python -m benchmarks.gym_reflector [--model=models/gym] [--problems=512]

The problems occur in no training text. The reflector decodes greedily and the solver at temperature 1, as in
the quickstart. Prints shares as JSON: for each family, problems that are solved; `idea`, those solved with
one right line of the solution in the prompt; `exact`, wrong attempts whose quote is exactly the first wrong
line.
"""

import argparse
import json

import jax
import numpy as np

from rosd_jax.gym import problems, texts
from rosd_jax.models.families import read_config
from rosd_jax.models.weights import load_params
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.text import prompts, spans
from rosd_jax.text.tokenizer import load_tokenizer
from rosd_jax.train.step import responses


def main() -> None:
    """Prints the shares as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", default="models/gym")
    parser.add_argument("--problems", type=int, default=512)
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.problems)))


def measure(path: str, count: int) -> dict[str, float]:
    """The shares, over `count` held-out problems each."""
    tokenizer = load_tokenizer(path)
    model = read_config(path, num_tokens=tokenizer.num_tokens, dtype="float32", remat="none")
    params = load_params(path, model)
    rng = np.random.default_rng(1)

    def ask(asked: list[str], temperature: float) -> list[str]:
        ids = tokenizer.encode_chats([[{"role": "user", "content": text}] for text in asked], thinking=False)
        sampling = Sampling(temperature, stop_ids=tokenizer.stop_ids)
        engine = Engine(model, None, Limits(72, 256, prompts=len(ids)), sampling)
        requests = [Request(prompt, uid) for uid, prompt in enumerate(ids)]
        return tokenizer.decode_all(responses(engine.generate(params, requests, jax.random.key(0))))

    def draw(family: str) -> list[problems.Chain]:
        return [problems.sample_chain(rng, family, "test") for _ in range(count)]

    def solved(chains: list[problems.Chain], responses: list[str]) -> float:
        answers = [problems.respond(problems.solve(chain)).split("\n")[-1] for chain in chains]
        right = [response.endswith(answer) for response, answer in zip(responses, answers, strict=True)]
        return float(np.mean(right))

    result = {}
    for family in problems.STEPS:
        chains = draw(family)
        result[family] = solved(chains, ask([chain.text for chain in chains], 1.0))
    chains = draw("chain")
    lines = [problems.solve(chain)[rng.integers(len(chain.steps))] for chain in chains]
    shown = [prompts.idea_text(c.text, line, texts.WORDING) for c, line in zip(chains, lines, strict=True)]
    result["idea"] = solved(chains, ask(shown, 1.0))
    attempts = [texts.wrong_solution(chain, rng) for chain in chains]
    asked = [texts.reflection_text(c, w)[0] for c, w in zip(chains, attempts, strict=True)]
    quotes = [spans.parse_reflection(raw)[1] for raw in ask(asked, 0.0)]
    exact = []
    for chain, attempt, quote in zip(chains, map(problems.respond, attempts), quotes, strict=True):
        error = problems.first_error(chain, attempt) or (0, 0)
        exact.append(quote == attempt[slice(*error)])
    result["exact"] = float(np.mean(exact))
    return result


if __name__ == "__main__":
    main()
