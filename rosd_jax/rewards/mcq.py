r"""Checkers that read an answer out of a tag or a sentence: multiple choice, and the gym.

`fixed` reads the last complete `<answer>...</answer>` outside the thinking and accepts the usual
ways to write a choice: `B`, `b`, `B.`, `(B)`, `B: text`, `\boxed{B}`. The tag is required: a bare
letter without it scores 0. `release` is the released checker: whatever stands after the last
`<answer>` (or the whole text, where there is no tag) must equal the gold letter exactly.
"""

from __future__ import annotations

import re

from rosd_jax.rewards.grade import Grade, Mode, strip_thinking

# Opening marks, the letter, then nothing but closing marks, or a label's mark before its text.
_CHOICE = re.compile(
    r"(?:\\(?:boxed|text)\s*\{|[\s(\[*$])*"
    r"(?P<letter>[A-Za-z])"
    r"(?:[\s.)\]}*$]*$|\**(?::|[.)\]]\**\s))"
)
_TAGGED_LETTER_AT_END = re.compile(r"<answer>\s*[ABCD]\s*</answer>$")


def grade(response: str, answer: str, *, mode: Mode) -> Grade:
    """Grades a multiple-choice response against the gold letter."""
    if mode == "release":
        return _grade_release(response, answer)
    content = last_answer(strip_thinking(response))
    choice = _CHOICE.match(content) if content is not None else None
    letter = choice["letter"].upper() if choice else ""
    return Grade(float(letter == answer.strip().upper()), letter, bool(letter))


def grade_gym(response: str, answer: str) -> Grade:
    """Grades a gym response: the last `<answer>` block must equal the gold, white space aside."""
    content = last_answer(strip_thinking(response))
    if content is None:
        return Grade(0.0, "", False)
    prediction = " ".join(content.split())
    return Grade(float(prediction == " ".join(answer.split())), prediction, True)


def last_answer(text: str) -> str | None:
    """The content of the last complete `<answer>...</answer>`; None where there is none."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start < 0:
        return None
    return text[start + len("<answer>") :].partition("</answer>")[0]


def _grade_release(response: str, answer: str) -> Grade:
    # The released `incorrect_format` is 1 for a right format; well_formed has the sign it says.
    tail = response.rpartition("<answer>")[2]
    prediction = tail.partition("</answer>")[0].strip()
    well_formed = _TAGGED_LETTER_AT_END.search(response) is not None
    return Grade(float(prediction == answer), prediction, well_formed)


def grade_gpqa(response: str, answer: str) -> Grade:
    """The release's GPQA rule: the last lone A, B, C or D in any case, the article "a" included."""
    letters = re.findall(r"\b[ABCD]\b", response.upper())
    prediction = letters[-1] if letters else response.strip().strip(".").rstrip("/")
    return Grade(float(prediction == answer), prediction, prediction in set("ABCD"))


def grade_mmlu_pro(response: str, answer: str) -> Grade:
    """The release's MMLU-Pro rule: "answer is (X)", else "Answer: X", else the last lone A to J.

    The first two patterns match in any case but the letter is compared as written, so "answer is j"
    is read, and wrong.
    """
    said = re.search(r"answer is \(?([A-J])\)?", response, re.IGNORECASE) or re.search(
        r"answer:\s*([A-J])", response, re.IGNORECASE
    )
    letters = [said[1]] if said else re.findall(r"\b[A-J]\b", response)
    prediction = letters[-1] if letters else ""
    return Grade(float(prediction == answer), prediction, prediction in set("ABCDEFGHIJ"))
