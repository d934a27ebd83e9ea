r"""What counts as an equal answer: pairs of every kind that must be accepted, and pairs that must not be.

Each line is `answer | answer`, in both directions; docs/grading.md has the rules in words.
"""

import numpy as np
import pytest

from rosd_jax.evals.evaluate import scores
from rosd_jax.rewards import Grader
from rosd_jax.rewards.maths import checker
from rosd_jax.types import Problem

EQUAL = {
    "end punctuation": r"""
        7. | 7
        7。 | 7
        7; | 7
        7 , | 7
        (3,4). | (3,4)
        y-2. | y-2
        \text{No.} | No
        \frac{2}{5}。 | 0.4
        3!. | 6
        9। | 9
    """,
    "typed Unicode": r"""
        60° | 60^\circ
        ¼ | \frac{1}{4}
        2⅓ | \frac{7}{3}
        −½ | -0.5
        – 7 | -7
        y² | y^{2}
        2√3 | 2\sqrt{3}
        √(y+2) | \sqrt{y+2}
        π/6 | \frac{\pi}{6}
        3·4×2 | 24
        (−∞, 1]∪(4, ∞) | (-\infty,1]\cup(4,\infty)
        （３，４） | (3,4)
        ｛1,2｝ | \{2,1\}
        y ≤ 3 | y \le 3
        y≠3 | y \ne 3
        10⁻² | 0.01
        a₁+a₂ | a_1+a_2
        θ+ω | \theta+\omega
        𝑥+1 | x+1
        ±2 | 2, -2
        ∅ | \emptyset
        ８％ | 8\%
    """,
    "thousands": r"""
        7\,000 | 7000
        1\,234\,567 | 1234567
        2 220 | 2220
        2~220 | 2220
        2\ 220 | 2220
        2,\!220 | 2220
        2{,}220 | 2220
        2,220 | 2220
        12\,345.5 | 12345.5
        (1\,000, 2\,000) | (1000,2000)
        \frac{1,000}{3} | \frac{1000}{3}
        2{,}5 | 2.5
        8{\,}000 | 8000
        8{ }000{ }000 | 8000000
        8'000'000.5 | 8000000.5
        8_000 | 8000
    """,
    "units": r"""
        9 dollars | 9
        9 km/h | 9
        9 EUR | 9
        £9 | 9
        9 € | 9
        \$9.50 | 9.5
        12 years old | 12
        9 cm^2 | 9
        9 cm² | 9 \text{ square centimeters}
        9\ \mathrm{m\,s^{-1}} | 9\text{ m/s}
        9 \text{ miles per hour} | 9 mph
        9\text{ cm} | 9 \text{ centimetres}
        \frac{5}{7}\text{ degrees} | \frac{5}{7}^\circ
        9 hours | 9
        9 \text{ red marbles} | 9
        -9^\circ\text{C} | -9
        2\pi \text{ cm} | 2\pi
        30 degrees | 30^{\circ}
        9 厘米 | 9
        9 GB | 9
        9 kWh | 9
        9 sq ft | 9\text{ square feet}
        9 units^2 | 9
        US\$9 | \$9
        9 cents per day | 9
    """,
    "percent": r"""
        7.5\% | 7.5
        7.5\% | 0.075
        7.5 percent | 7.5\%
        7.5\text{ percent} | 7.5
        25% | \frac14
        7.5 per cent | 7.5\%
        7.5 pct | 7.5\%
        7.5 Percent | 7.5
        7.5\text{ percentage points} | 7.5
    """,
    "number words": r"""
        4\text{ million} | 4000000
        2.5 billion | 2.5\times10^9
        \$2 \text{ million} | 2000000
        3 dozen | 36
        7 hundred thousand | 700000
        3\text{ tenths} | 0.3
        3 \text{ halves} | \frac32
        6万 | 60000
        7 thousandths | 0.007
    """,
    "complex numbers": r"""
        (2+i)^2 | 3+4i
        \sqrt{-16} | 4i
        7-1i | 7-i
        i^{7} | -i
        \frac{1}{1-i} | \frac12+\frac12i
        e^{i\pi} | -1
        5i+2 | 2+5i
        \overline{2+3i} | 2-3i
        |3+4i| | 5
    """,
    "recurring decimals": r"""
        0.\overline{6} | \frac23
        0.\bar{6} | \frac23
        0.1\overline{6} | \frac16
        0.\overline{27} | \frac{3}{11}
        0.\dot{2}\dot{7} | \frac{3}{11}
        0.\dot{1}4285\dot{7} | \frac17
        0.666... | \frac23
        0.8333\ldots | \frac56
        1.272727\dots | \frac{14}{11}
        0.(6) | \frac23
        0.\overline{9} | 1
        .\overline{6} | \frac23
    """,
    "notation of numbers": r"""
        2.5e-7 | 2.5\times10^{-7}
        2.5 x 10^-7 | 2.5e-7
        2.5E-7 | 0.00000025
        6.1e23 | 6.1\cdot 10^{23}
        1e-05 | 0.00001
        1.5*10^-7 | 1.5e-07
        0.666667 | \frac23
        3.14159265 | \pi
        .25 | \frac14
        04 | 4
        4.0 | 4
        2 1/2 | 2.5
        1\frac{2}{3} | \frac53
        -1\frac{1}{2} | -1.5
        2.5\text{e}{-7} | 2.5e-7
        2.5\mathrm{E}{-7} | 2.5e-7
        2.5\text{e-7} | 2.5e-7
        2.5e{-7} | 2.5e-7
    """,
    "several lines": r"""
        \begin{cases}a=3\\b=4\end{cases} | a=3, b=4
        \begin{aligned}a&=3\\b&=4\end{aligned} | a=3, b=4
        \begin{gathered}a=3\\b=4\end{gathered} | b=4, a=3
        a=3\\b=4 | a=3,b=4
        \left\{\begin{array}{l}a=3\\b=4\end{array}\right. | a=3,b=4
        \begin{cases}x & x>0\\0 & x<0\end{cases} | \begin{cases}x,&\text{if }x>0\\0,&\text{if }x<0\end{cases}
        \begin{align*}x&=3\\y&=4\end{align*} | x=3,y=4
        \begin{gather*}x=3\\y=4\end{gather*} | x=3,y=4
        \left\{\begin{matrix}x=3\\y=4\end{matrix}\right. | x=3,y=4
        x=3 \quad y=4 | x=3,y=4
    """,
    "without braces": r"""
        \frac\pi3 | \frac{\pi}{3}
        \frac2\pi | \frac{2}{\pi}
        3^\frac12 | \sqrt{3}
        \frac{\sqrt5}2 | \frac{\sqrt{5}}{2}
        \frac\sqrt52 | \frac{\sqrt{5}}{2}
        \frac43 | \frac{4}{3}
        \sqrt12 | 2\sqrt3
        \tfrac x2 | 0.5x
        2^10 | 1024
    """,
    "degrees": r"""
        \sin 30^\circ | 0.5
        \cos(60^{\circ}) | \frac12
        \tan 60° | \sqrt3
        \sin^2 45^\circ | \frac12
        2\sin 15^\circ\cos 15^\circ | \frac12
        \cos 36^\circ | \frac{1+\sqrt5}{4}
        \sin\pi/6 | \frac12
        \sin 30\text{ degrees} | \frac12
        \sin(30\text{ degrees}) | \frac12
    """,
    "words": r"""
        true | True
        TRUE | \text{true}
        \text{WEST} | west
        \textbf{Yes} | yes
        \text{Evelyn} | evelyn
        \text{Parabola} | parabola
        no solution | \text{No solution}
        \text{(D)} | D
        \text{PQ} | PQ
    """,
    "wrapped": r"""
        **8** | 8
        $8$ | 8
        \boxed{8} | 8
        The answer is 8 | 8
        The final answer is $\boxed{8}$. I hope it is correct. | 8
        Answer: 8. | 8
        #### 8 | 8
        `8` | 8
        \text{The answer is } 8 | 8
        \\frac{1}{2} | \frac12
        \\{1,2\\} | \{1,2\}
        9 | Final answer: the answer is 9
        9 | 4+5=9 #### 9
        9 | '9'
    """,
    "bases": r"""
        61_7 | 61_{7}
        61_{\text{seven}} | 61_7
        61 \text{ (base 7)} | 61_7
        61 \text{ base } 7 | 61_7
        (61)_7 | 61_7
        61 | 61_7
        2F_{16} | 2\text{F}_{16}
    """,
    "relations": r"""
        x=8 | 8
        x = 3+5 = 8 | 8
        f(x)=2x | 2x
        m+n=8 | 8
        y=3x-1 | 3x-y=1
        3x+2y=6 | \frac x2+\frac y3=1
        x \in [-1,4) | [-1,4)
        -1 \le x < 4 | [-1,4)
        4 > x \ge -1 | -1 \le x < 4
        x>2 | (2,\infty)
        x<1 \text{ or } x>2 | (-\infty,1)\cup(2,\infty)
        \mathbb{R}\setminus\{3\} | (-\infty,3)\cup(3,\infty)
        x\ne3 | (3,\infty)\cup(-\infty,3)
        [0,1]\cup[1,2] | [0,2]
        2x-4>0 | x-2>0
    """,
    "structures": r"""
        1,2 | 2,1
        3 \text{ and } 4 | 3,4
        x=3 \text{ or } x=4 | 3,4
        \{1,2,2\} | \{2,1\}
        \{4\} | 4
        2\pm\sqrt3 | 2-\sqrt3, 2+\sqrt3
        \{1\pm\sqrt2, 0\} | \{0, 1-\sqrt2, 1+\sqrt2\}
        \langle 1,2\rangle | (1,2)
        (x,y)=(1,2) | x=1, y=2
        \begin{bmatrix}1\\2\end{bmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        \frac12\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}0.5\\1\end{pmatrix}
    """,
    "expressions": r"""
        (x+1)^2 | x^2+2x+1
        \frac{x^2-1}{x-1} | x+1
        \sqrt{x^2} | |x|
        \sin^2 t+\cos^2 t | 1
        \binom{n}{2} | \frac{n(n-1)}{2}
        \frac{(n+1)!}{n!} | n+1
        \log_2 32 | 5
        \ln e^3 | 3
        \sin^{-1}\frac12 | \frac{\pi}{6}
        \frac{dy}{dx} | \frac{dy}{dx}
        \int_0^1 f(x)\,dx | \int_{0}^{1} f(x) dx
        P(1+r)^n | (1+r)^n P
        \frac{d}{d+1} | d/(d+1)
        GMm/r^2 | \frac{GmM}{r^2}
        10^{1000000} | 10^{1000000}
    """,
}

DIFFERENT = {
    "letter case": r"""
        \frac{V}{v} | \frac{v}{V}
        \frac{Gm}{r^2} | \frac{GM}{r^2}
        2\pi R | 2\pi r
        P-p | 0
        K! | k!
        \ln K | \ln k
        \log_2 N | \log_2 n
        x_A | x_a
        \theta | \Theta
        \gamma | \Gamma
        \Sigma | \sigma
        C | c
        e | E
        \text{Aa} | \text{aa}
        \text{AABb} | \text{aabb}
        \text{AABB} | \text{aabb}
        \text{CO} | \text{Co}
        ABC | abc
        5 \text{ Mg} | 5 \text{ mg}
    """,
    "tiny numbers": r"""
        0.0000123 | 0.0000124
        1.6\times10^{-19} | 1.7\times10^{-19}
        -1.6\times10^{-19} | 1.6\times10^{-19}
        10^{-30} | 0
        (1/3)^{40} | (1/3)^{41}
        \frac{1}{900!} | \frac{1}{901!}
        e^{-1000} | e^{-1001}
        e^{-1000} | 0
        \pi\times10^{-50} | 2\pi\times10^{-50}
        (10^{-9},1) | (2\times10^{-9},1)
        [0,10^{-9}] | [0,10^{-8}]
        \{10^{-12}\} | \{10^{-13}\}
        \begin{pmatrix}10^{-9}\\1\end{pmatrix} | \begin{pmatrix}10^{-8}\\1\end{pmatrix}
        10^{-12}x | 10^{-11}x
        123456789.1 | 123456789.2
    """,
    "bases": r"""
        61_7 | 61_8
        61_{10} | 61_7
        43 | 61_7
        0.2_3 | 0.2_5
        2F_{16} | 2E_{16}
        61 \text{ (base 8)} | 61_7
        -61_7 | 61_7
    """,
    "several values": r"""
        x=3 \land x=4 | 4
        x=3 \text{ or } x=4 | 4
        3 \text{ or maybe } 4 | 4
        3 \lor 4 | 3
        3 \\ 4 | 4
        x=4 \\ x=3 | 3
        x=3 \& x=4 | 4
        3,4 | 4
        3; 4 | 3
        \{3,4\} | 4
        x = 3 = 4 | 4
        3=4 | 4
        \begin{cases}3\\4\end{cases} | 4
        3 \text{ (or } 4) | 3
        4 \text{ (not 3)} | 4
        3 4 | 4
        3\pm1 | 4
        3 \to 4 | 4
        \boxed{3} and \boxed{4} | 4
    """,
    "number words": r"""
        2 \text{ billion} | 2
        2\text{ million} | 2
        2 thousand | 2
        2 \text{ million} | 2 \text{ billion}
        2 dozen | 2
        3 \text{ tenths} | 3
        3 \text{ thirds} | 3
        3\text{ bn} | 3
        3万 | 3
        3亿元 | 3
        3\text{ Millionen} | 3
        3\text{ mill.} | 3
        3\text{ ten-thousandths} | 3
        3\text{ hundredths} | 3
    """,
    "units": r"""
        7 cm | 7 m
        7\text{ cm} | 7\text{ cm}^2
        7 km/h | 7 m/s
        £7 | €7
        8 cm | 7 cm
        7 dollars | 7 cents
        7m | 7
        7t | 7
        7mg | 7
        \frac{5}{3} m | \frac53
        n \text{ even} | n
        7 \text{ or less} | 7
        \text{at least } 7 | 7
        7 below zero | 7
        7 \text{ squared} | 7
        7^\circ 30' | 7
        \frac13 \mathrm{e}^{2} | \frac13
    """,
    "numbers": r"""
        0.3333 | \frac13
        0.666666 | \frac{2}{30}
        0.1250001 | \frac18
        3.14 | \pi
        5.000001 | 5
        1000001 | 1000000
        0.\overline{3} | 0.333
        0.\overline{12} | 0.\overline{21}
        1.6e-19 | 1.6e-18
        1, 204 | 204
        2 220 | 2221
        1,23 | 123
        1\frac{2}{3} | \frac23
        7\% | 0.7
        7\% | 0.07\%
        30 | \sin 30^\circ
        \sin 30 | \frac12
        9^{9^{9^{9}}} | 9^{9^{9^{8}}}
        10^{1000000} | 10^{1000001}
        0 | \emptyset
        i | 1
        3-4i | 3+4i
        \mathbf{i} | i
        2\mathrm{e}-7 | 2\times10^{-7}
        2e^{-7} | 2\times10^{-7}
        1'23 | 123
        1_0000 | 10000
    """,
    "words": r"""
        even | odd
        Yes | No
        east | seat
        \text{Navin} | \text{Evelyn}
        \text{(B)} | \text{(C)}
        5 | five times
    """,
    "structures": r"""
        (4,3) | (3,4)
        (3,4] | (3,4)
        [3,4] | (3,4)
        (3,4) | \{3,4\}
        3,4 | 3
        3,3,4 | 3,4
        \{3,4\} | \{3,5\}
        (1,2),(3,4) | (1,2),(4,3)
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
        (-\infty,1)\cup(2,\infty) | (-\infty,1]\cup(2,\infty)
        (0,\infty) | \mathbb{R}
        2+\sqrt3 | 2\pm\sqrt3
        \begin{cases}a=3\\b=4\end{cases} | a=4, b=3
    """,
    "relations": r"""
        x^2=9 | 9
        2x=8 | 8
        x=8 | y=8
        x>3 | x\ge3
        x>3 | x<3
        x>3 | 3
        y=2x | x=2y
        2x-4>0 | x-2<0
        x \equiv 2 \pmod 7 | 2
    """,
    "expressions": r"""
        x+1 | x-1
        \sqrt{x^2} | x
        \sqrt{a}\sqrt{b} | -\sqrt{ab}
        \frac{1}{2x} | \frac12x
        \frac{dM}{dt} | \frac{M}{t}
        I(0) | 0
        f(2) | f(3)
        f(x+y) | f(x)+f(y)
        y' | y
        \bar{x} | x
        \log 3 | \ln 3
        \int_0^1 x\,dx | x
        \sum_{k=1}^n k | k
        f \circ g | fg
    """,
}


def _pairs(tables):
    return [
        pytest.param(*(side.strip() for side in line.split(" | ")), id=f"{kind}: {line.strip()}")
        for kind, table in tables.items()
        for line in table.strip().splitlines()
    ]


@pytest.mark.parametrize(("a", "b"), _pairs(EQUAL))
def test_equal_answers_are_equal(a, b):
    assert checker.agree(a, b, "fixed")
    assert checker.agree(b, a, "fixed")


@pytest.mark.parametrize(("a", "b"), _pairs(DIFFERENT))
def test_different_answers_differ(a, b):
    assert not checker.agree(a, b, "fixed")
    assert not checker.agree(b, a, "fixed")


@pytest.mark.parametrize(
    "answer", ["", " ", "{", "}", "\\", "\\frac", "x^", "(", ",", "\\begin{cases}", "=", "\\text{"]
)
def test_fragments_equal_no_number(answer):
    assert not checker.agree(answer, "5", "fixed")


@pytest.mark.parametrize(
    ("response", "box"),
    [
        ("\\\\boxed{6}", "6"),
        ("\\\\[ \\\\boxed{6} \\\\]", "6"),
        ("\\\\fbox{6}", "6"),
        ("row \\\\\\boxed{6}", "6"),
        ("\\boxed 6.", "6"),
        ("$\\boxed6$", "6"),
        ("\\boxed -6, so", "-6"),
        ("\\boxed\\frac12.", "\\frac12"),
        ("\\[\\boxed 42\\]", "42"),
        ("\\framebox{6}", "6"),
        ("\\framebox[3cm][c]{6}", "6"),
        ("\\boxed{6} \\boxed{}", "6"),
        ("\\boxed{6} \\boxed{\\ }", "6"),
        ("\\boxed{6} in the form \\boxed{...}", "6"),
        ("\\boxed{\\emptyset}", "\\emptyset"),
        ("\\boxed{\\boxed{}}", ""),
        ("\\boxed{5} so $\\boxed{\\frac{1}{2}$.", "\\frac{1}{2}"),  # its brace is missing
        ("\\boxed{5} so \\boxed{12", "5"),  # cut off: no telling what would have followed
        ("\\boxed{6}}", "6"),
        ("a \\boxed environment, \\boxed{6}", "6"),
        ("\\boxedtext{5} \\boxed", ""),
    ],
)
def test_boxes_in_every_spelling(response, box):
    assert checker.predict(response, mode="fixed", thinking_open=False) == box


HOSTILE = [
    "9^{9^{9^{9}}}",
    "((10^9)!)!",
    "1e999999999",
    "5!" + "!" * 900,
    "{" * 450 + "5" + "}" * 450,
    "(" * 450 + "5" + ")" * 450,
    "x^" * 450 + "2",
    "\\frac" * 190,
    "\\sqrt{" * 150 + "2" + "}" * 150,
    "|" * 900,
    "-" * 990 + "5",
    "\\begin{cases}" * 70,
    "\\text{" * 160 + "5" + "}" * 160,
    "5" * 999,
    "\\pm" * 300 + "5",
    "5,\ud800",
    "\x00",
    "(x+1)" * 190,
    "\\sin" * 240 + "x",
    "0.\\overline{" + "1" * 900 + "}",
    "\\" * 999,
    "5\\text{" + "a " * 450 + "}",
]


def test_hostile_answers_end_soon_and_match_nothing():
    with Grader(timeout_s=5) as grader:
        problem = Problem("set/1", "set", "math", (), "5\\sqrt{3}")
        grades = grader.grade_all(
            [f"\\boxed{{{text}}}" for text in HOSTILE], [problem] * len(HOSTILE), thinking_open=False
        )
        assert [grade.score for grade in grades] == [0] * len(HOSTILE)
        assert grader.timeouts == 0
        assert grader.grade_all(["\\boxed{\\sqrt{75}}"], [problem], thinking_open=False)[0].score == 1


# ---- the majority vote


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout_s=20) as grader:
        yield grader


def _vote(grader, boxed, gold, kind="math"):
    problems = [Problem("set/1", "set", kind, (), gold)] * len(boxed)
    grades = grader.grade_all([f"\\boxed{{{text}}}" for text in boxed], problems, thinking_open=False)
    votes = grader.votes([grade.prediction for grade in grades], problems)
    return votes, scores(np.array([[grade.score for grade in grades]]), [votes])


@pytest.mark.parametrize(
    ("boxed", "gold", "maj", "distinct"),
    [
        (["0.4", "\\frac{2}{5}", "2/5", "3", "3"], "\\frac25", 1, 2),
        (["(3,4)", "(3, 4)", "\\left(3,4\\right)", "5", "5"], "(3,4)", 1, 2),
        (["8", "8\\text{ cm}", "8 cm", "4", "4"], "8", 1, 2),
        (["6", "6.0", "06", "7", "7"], "7", 0, 2),
        (["x", "X", "X"], "x", 0, 2),
        (["", "", "9"], "9", 1, 1),
        (["3 cm", "3 m", "3 m"], "3 m", 1, 2),
    ],
)
def test_equal_answers_are_one_vote(grader, boxed, gold, maj, distinct):
    _, numbers = _vote(grader, boxed, gold)
    assert (numbers["maj"], numbers["distinct"]) == (maj, distinct)


def test_a_vote_is_the_spelling_that_came_first(grader):
    assert _vote(grader, ["3", "0.5", "1/2", "3.0", "\\frac12"], "3")[0] == ["3", "0.5", "0.5", "3", "0.5"]


def test_votes_of_one_problem_say_nothing_of_another(grader):
    problems = [Problem(f"set/{i}", "set", "math", (), "1") for i in (1, 2, 1, 2)]
    assert grader.votes(["1", "1.0", "1.00", "1"], problems) == ["1", "1.0", "1", "1.0"]
    with pytest.raises(ValueError):
        grader.votes(["1"], problems)


def test_only_mathematics_is_compared_and_only_in_fixed_mode(grader):
    problem = Problem("set/1", "set", "gym", (), "1")
    assert grader.votes(["1", "1.0"], [problem] * 2) == ["1", "1.0"]
    with Grader("official") as official:
        assert official.votes(["1", "1.0"], [Problem("set/1", "set", "math", (), "1")] * 2) == ["1", "1.0"]


def test_few_comparisons_find_the_votes(grader, monkeypatch):
    asked = []
    answer_all = grader._pool.answer_all
    monkeypatch.setattr(grader._pool, "answer_all", lambda q: asked.extend(q) or answer_all(q))
    problems = [Problem(f"set/{i // 16}", "set", "math", (), "1") for i in range(64)]
    votes = grader.votes(["2", "2.0", "1+1", "3"] * 16, problems)
    assert votes == ["2", "2", "2", "3"] * 16
    assert len(asked) == 4 * 3  # of four problems, each different prediction against the first
