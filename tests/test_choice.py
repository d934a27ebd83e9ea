"""Multiple choice: one letter in any usual dress is read, and several choices are none."""

import json
import re
import time

import pytest

from rosd_jax.rewards import mcq
from rosd_jax.rewards.choice import read_choice
from support import data_dir, nightly_but

ONE = r"""
B | b | B. | (B) | B) | [B] | {B} | (b) | b) | B! | B: | `B` | **B** | __B__ | *B* | _B_ | "B" | 'B' | “B”
<B> | - B | # B | $B$ | $$B$$ | \(B\) | \[B\] | \boxed{B} | \text{B} | \mathbf{B} | \mathrm{B}
\textbf{B} | {\bf B} | $\mathbf{B}$ | \boxed{\text{B}} | \boxed{(B)} | \boxed{\mathbf{B}}
\boxed{\textbf{(B)}} | \mathbf{(B)} | \boxed{B: text} | \text{B. text} | <b>B</b>
<strong>B</strong>: text | （B） | Ｂ | B。 | 【B】 | B：text | B）text | B: text | B. text | B.text | B) text
(B) text | (B). text | B - text | B – text | B — text | B—text | **B** text | **B.** text | **B: text**
**(B)** text | \boxed{B} text | \boxed{B}. text | \boxed{\text{B}}: text | $B$: text | Option B | option b
**Option B**: text | \text{Option B} | Choice (B) | Choice: B | (Option B) | Option B is correct
The answer is B | the answer is: b | The answer is **B**. | The correct option is (B).
The answer is option (B): text | Answer: B | Final Answer: **B** | Final answer: \boxed{B}
My answer is B | So the answer is B. | I choose B | I think the answer is B | 答案是B | 答案：B | 选B | 选项B
正确答案是（B） | Antwort: B | La réponse est B | La respuesta es B | B because it is so | B, because it fits
B is correct. | B is the correct answer | B because A is wrong | B. A cell divides | B: A cell divides
B: I think so | B. I think so | B) E. coli | B: D-glucose | B: C-terminal | B: vitamin C
B: ascorbic acid (vitamin C) | B: glutamate (E) | B: 25 °C | B: 25 ℃ | B. C is wrong | B: $E = mc^2$
B: Both A and C | B. Both A and C are correct | B) A and C only | B: All of A, C and D
B. None of the above | B: -0.16 | B - -0.16 | (B) O=C(C)NS(=O)(F)c1 | B: <0, 1> | B: H2O and CO2
B、text | \framebox{B} | \large B | Response: B | 答え：B | 答えはB | B번 | (b) Both (a) and (c)
"""
NONE = r"""
 | 1 | ? | none | N/A | be: it | Because | ABCD | AB | AC | A/B | A,B | A, B | A, C | A; B | A B | A & B
A + B | A+B | A|B | A and B | A or B | A or (B) | A and/or B | A vs B | A not B | A, not B
A rather than B | A - B | A – B | A-B | A->B | A > B | (A) or (B) | (A) and (B) | (A), (B) | (A) (B)
(A)(B) | (A)/(B) | (A) & (B) | [A] [B] | (A), not (B) | A, (B) | A or maybe B | A) is wrong, so B)
A) or C) | A) B) | A) maybe B) | A) no B) yes | A. or B. | A. B. | A. B. C. | A.B | A. and (B) | A.. B
A: no, B: yes | A: B | A:B | A: yes. B: no. | A. no, B. yes | A. text or B. text | A: text or B
A: text, or (B): text | (A) text (B) text | A: text. Or maybe B: text | A. It could also be B.
A; maybe B. | A, then B | A? B? | Maybe A, maybe B | A: wrong. The answer is B
A: wrong, so the answer is (B) | A: no. Actually B | A. Option B is correct | A. I think B is right
A because B is right | A, but B is also correct | The answer is A or B | The answer is A and B
Option A or Option B | Options A and B | Both A and B | either A or B | neither A nor B | Not A but B
not A | A is wrong | A) is wrong | **A** or **B** | **A** and maybe **B** | **(A)** **(B)**
<b>A</b><b>B</b> | `A` `B` | $A$ or $B$ | $A$, $B$ | \boxed{A} or \boxed{B} | \boxed{A}, \boxed{B}
\boxed{A, B} | \boxed{A \text{ or } B} | \text{A and B} | \text{A}, \text{B} | A oder B | (A) oder (B)
A. oder B. | A和B | A或B | A、B | A、B、C | A：否，B：是 | (A)，(B) | A）B） | A cell divides | a cell
The answer is a cell | Vitamin C | Compound C | Plan B | B field | B = 5 T | E = mc^2 | **A** = 5 T
B-DNA | D-glucose | C (s) | U.S.A. | I and II | I, II
A: text (or B) | A. True B. False | A. Correction: B | (a) or (b) | (a), (b) | (a) and option (b)
A (wrong) B (right) | A、甲 B、乙
"""


def listed(text: str) -> list[str]:
    return [item for line in text.strip("\n").split("\n") for item in re.split(r" \| ", line)]


@pytest.mark.parametrize("written", listed(ONE) + ["B\ntext", "B\n\nA cell divides", "\u200bB\ufeff"])
def test_one_letter_is_read_in_any_usual_dress(written):
    grade = mcq.grade(f"So.\n<answer>{written}</answer>", "B", mode="fixed", thinking_open=False)
    assert (grade.score, grade.prediction, grade.well_formed) == (1, "B", True)


@pytest.mark.parametrize(
    "written", listed(NONE) + ["A\nB", "A and\nB", "A: text\nB: text", "(A) text\n(B) text"]
)
def test_several_choices_or_none_are_none(written):
    for gold in "ABCDE":
        grade = mcq.grade(f"So.\n<answer>{written}</answer>", gold, mode="fixed", thinking_open=False)
        assert (grade.score, grade.prediction, grade.well_formed) == (0, "", False)


@pytest.mark.parametrize(
    "tags",
    [
        "<Answer>{}</Answer>",
        "<ANSWER>{}</ANSWER>",
        "< answer >{}</ answer >",
        "<answer>{}</ANSWER >",
        "<answer>{}<\\/answer>",
        "＜answer＞{}＜/answer＞",
    ],
)
def test_the_tag_may_be_spelled_in_any_way_but_must_close(tags):
    assert mcq.grade(tags.format("B"), "B", mode="fixed", thinking_open=False).score == 1
    assert mcq.grade(tags.format("B").rpartition("<")[0], "B", mode="fixed", thinking_open=False).score == 0
    assert mcq.grade(tags.format("B"), "B", mode="official", thinking_open=False).score == 0


FORMS = (
    "{}: {}",
    "{}. {}",
    "({}) {}",
    "{}) {}",
    "{}\n{}",
    "{} - {}",
    "**{}: {}**",
    "\\boxed{{{}}}: {}",
    "The answer is {}: {}",
)


@pytest.mark.parametrize("domain", ["biology", "chemistry", "material", "physics"])
def test_the_texts_of_real_options_name_no_second_choice(domain):
    lines = data_dir(f"sciknoweval-{domain}", "test.json").read_text().splitlines()
    options = [o for line in lines for o in re.findall(r"^([A-J]): *(.+)$", json.loads(line)["prompt"], re.M)]
    answers = [(form.format(*option), option[0]) for option in options for form in FORMS]
    assert len(answers) > 1000
    missed = [(text, letter) for text, letter in answers if read_choice(text) != letter]
    assert len(missed) <= 0.001 * len(answers), missed[:5]


@pytest.mark.parametrize(
    "piece", ["(", "A) ", "(A) ", "* ", "the ", "or ", "A and ", "so A ", "A\n", "<b>", "\\boxed{"]
)
@pytest.mark.parametrize("start", nightly_but(["", "B: ", "B because "], keep=[1]))
def test_a_long_answer_is_read_in_linear_time(start, piece):
    began = time.process_time()
    read_choice(start + piece * (200_000 // len(piece)))
    assert time.process_time() - began < 10
