"""The report page: hostile texts stay text, and a real browser shows what a reader looks for."""

import json
import subprocess
import sys
from functools import partial

import pytest
from browser import CHROMIUM, Browser

from rosd_jax.distill.notes import NOTES
from rosd_jax.errors import UserError
from rosd_jax.evals import page
from rosd_jax.evals.health import spikes
from rosd_jax.step_files import drop_after
from support import ROOT, nightly_but

HOSTILE = {
    "script": "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
    "end of script": "</script><script>document.title = 'owned'</script><!--",
    "line ends": "a\u2028document.title = 'owned'\u2029b",
    "bidi": "pay \u202egnp.exe\u202c and \u2067\u05d0\u05d1\u2069\u200f",
    "surrogate": "lone \ud83d here, and \ude00 there",
    "controls": "bell \x07, escape \x1b[31m, no-break \ufeff mark",
    "long": "x" * 200_000,
    "template": "${document.title = 'owned'} {{7*7}} `",
    "entities": "&lt;b&gt; &amp; <b>bold</b>",
}
QUOTE = "2 + 2 = 5 \U0001f600\U0001d54f <b>"
ASTRAL = "\U0001f600\U0001d54f before, "


def rollout(**fields):
    row = {
        "uid": "gym:chain/train/1",
        "sample": 0,
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "answer": "4",
        "response": "4",
        "token_ids": [1, 2, 3],
        "reward": 1.0,
        "reflection": None,
        "idea": None,
        "quote": None,
        "ambiguous": False,
        "error_span_chars": None,
        "active_tokens": 0,
        "note": "",
    }
    return row | fields


def trained(step, **fields):
    counts = {f"out_{note}": 0 for note in NOTES} | {"taught": 1, "seconds": 1.0}
    return {"step": step, "split": "train", "reward": 0.5, "loss": 0.01, **counts, **fields}


def in_loss(text, start, widths, divergence):
    """The fields of a rollout whose tokens from character `start` on are in the loss."""
    return {
        "response": text,
        "active_span_chars": [start, start + sum(widths)],
        "active_widths": widths,
        "divergence": divergence,
    }


def make_run(directory, steps, **config):
    """A run directory with the given rollouts by step."""
    (directory / "rollouts").mkdir(parents=True)
    for step, rows in steps.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (directory / "rollouts" / f"step_{step}.jsonl").write_text("".join(lines))
    lines = [json.dumps(trained(step)) + "\n" for step in steps]
    (directory / "metrics.jsonl").write_text("".join(lines))
    (directory / "config.json").write_text(json.dumps({"steps": 9, **config}))
    return directory


def step_content(path):
    """What a step's file tells the page."""
    text = path.read_text(encoding="ascii")
    assert text.startswith("rosdStep(") and text.endswith(");\n")
    return json.loads(text.removeprefix("rosdStep(").removesuffix(");\n"))


# --- the files ---


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_come_back_unchanged_from_safe_characters(tmp_path, text):
    fields = {"uid": text, "response": text, "quote": text, "idea": text, "reflection": text, "note": text}
    page.write_step_file(tmp_path, 3, [rollout(prompt=[{"role": text, "content": text}], **fields)])
    path = tmp_path / "report" / "step_3.js"
    assert not set(path.read_text(encoding="ascii")) & set("<>&\u2028\u2029")
    (problem,) = step_content(path)["problems"]
    (row,) = step_content(path)["rollouts"]
    assert problem["uid"] == text and problem["prompt"] == [[text, text]]
    assert row["response"] == [text] and {row[name] for name in ("quote", "idea", "reflection")} == {text}


def test_siblings_share_their_prompt_and_names_of_javascript_are_names(tmp_path):
    rows = [rollout(sample=k, uid=uid) for uid in ("__proto__", "a/b/train/7") for k in (0, 1)]
    page.write_step_file(tmp_path, 1, rows)
    content = step_content(tmp_path / "report" / "step_1.js")
    assert [(p["uid"], p["set"]) for p in content["problems"]] == [("__proto__", ""), ("a/b/train/7", "a/b")]
    assert [r["problem"] for r in content["rollouts"]] == [0, 0, 1, 1]


def test_the_response_is_cut_where_the_span_is(tmp_path):
    text = ASTRAL + QUOTE + " after"
    span = [len(ASTRAL), len(ASTRAL) + len(QUOTE)]
    spans = [span, tuple(span), None, [3, 2], [0, 999], "0:1", [0.0, 1.0]]
    page.write_step_file(tmp_path, 1, [rollout(response=text, error_span_chars=span) for span in spans])
    found = [row["response"] for row in step_content(tmp_path / "report" / "step_1.js")["rollouts"]]
    assert found == [[ASTRAL, QUOTE, " after"]] * 2 + [[text]] * 5


def heats_of(tmp_path, rows):
    page.write_step_file(tmp_path, 1, rows)
    return [row["heat"] for row in step_content(tmp_path / "report" / "step_1.js")["rollouts"]]


def test_tokens_in_the_loss_are_counted_as_javascript_counts(tmp_path):
    basic = rollout(**in_loss("abcde", 1, [1, 0, 2], [0.25, 1.234e-5, None]))
    text = "a\U0001f600b\U0001d54f\ud83d"
    other = rollout(**in_loss(text, 1, [1, 1, 0, 2], [0.1, 0.2, 0.3, 0.4]))
    wanted = [
        {"start": 1, "widths": [1, 0, 2], "nats": [25_000, 1, None]},
        {"start": 1, "widths": [2, 1, 0, 3], "nats": [10_000, 20_000, 30_000, 40_000]},
    ]
    assert heats_of(tmp_path, [basic, other]) == wanted


def test_divergences_that_do_not_fit_the_response_are_left_out(tmp_path):
    row = rollout(**in_loss("abcde", 1, [1, 2], [0.1, 0.2]))
    changes = (
        {"active_span_chars": None},
        {"active_span_chars": [1, 9]},
        {"active_span_chars": [1, 5]},
        {"active_widths": [1, 2, 0]},
        {"active_widths": [4, -1]},
        {"active_widths": [1.0, 2.0]},
        {"divergence": "high"},
        {"response": "a"},
    )
    assert heats_of(tmp_path, [rollout(), *(row | change for change in changes)]) == [None] * 9
    for odd in ("high", True, 1e308, 10**400, float("nan")):
        (heat,) = heats_of(tmp_path, [row | {"divergence": [odd, 1]}])
        assert heat["nats"] == [None, 100_000]


def test_foreign_rows_of_other_types_are_shown_as_they_are(tmp_path):
    odd = {"uid": 3, "prompt": "2 + 2?", "answer": ["4"], "response": None, "reward": "high", "token_ids": 7}
    make_run(tmp_path / "run", {1: [odd, {}, rollout(reward=float("nan"), sample="x")]})
    assert page.remake(tmp_path / "run") == ("training set",)
    content = step_content(tmp_path / "run" / "report" / "step_1.js")
    assert content["problems"][0] == {"uid": "3", "set": "", "prompt": [], "answer": '["4"]'}
    assert [row["reward"] for row in content["rollouts"]] == [None] * 3


def test_old_steps_are_not_written_again_and_missing_ones_are(tmp_path):
    run = make_run(tmp_path / "run", {1: [rollout()], 2: [rollout()]})
    page.write_step_file(run, 1, [rollout(response="kept")])
    page.write_page(run, ["gym:chain"])
    first, second = (step_content(run / "report" / f"step_{step}.js") for step in (1, 2))
    assert first["rollouts"][0]["response"] == ["kept"] and second["rollouts"][0]["response"] == ["4"]


def test_resuming_drops_the_files_of_later_steps(tmp_path):
    drop_after(tmp_path / "report", page.SUFFIX, 5)
    for step in (1, 9, 10, 11):
        page.write_step_file(tmp_path, step, [rollout()])
    (tmp_path / "report" / "step_12.js.tmp").write_text("rosd")
    (tmp_path / "report" / "notes.txt").write_text("mine")
    drop_after(tmp_path / "report", page.SUFFIX, 9)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"step_1.js", "step_9.js", "notes.txt"}


def test_every_note_has_a_sentence_and_a_colour():
    assert list(page.WHY) == list(NOTES)
    template = (ROOT / "rosd_jax" / "evals" / "page.html").read_text()
    for kind in range(len(NOTES) + 1):  # of the taught ones first, in the light and in the dark scheme
        assert template.count(f"--f{kind}:") == 2


def test_spikes_are_said_with_step_and_size():
    usual = [trained(step, loss=0.01 + step / 1e4) for step in range(1, 21)]
    assert spikes(usual) == [] == spikes(usual[:3])
    rows = [*usual[:9], trained(10, loss=0.5), *usual[10:15], trained(16, loss=0.2), *usual[16:]]
    (said,) = spikes(rows)
    assert (
        said.startswith("the loss was 45 times its median at step 10 (0.5, 0.01") and "1 other step" in said
    )
    assert spikes([trained(1, seconds=900.0), *usual]) == [], "the first step compiles"


# --- the command ---


def command(*arguments):
    code = "import runpy, sys; sys.argv = sys.argv[1:]\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print('jax' in sys.modules, file=sys.stderr)"
    line = [sys.executable, "-c", code, ROOT / "run.py", "--mode=report", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    *said, used_jax = done.stderr.strip().split("\n")
    assert used_jax == "False", done.stderr
    return done.returncode, done.stdout, "\n".join(said)


def test_the_command_makes_all_again_without_jax(tmp_path):
    run = make_run(
        tmp_path / "run", {1: [rollout()]}, data={"train": "gym:chain"}, eval={"sets": "gym:chain"}
    )
    other = make_run(tmp_path / "other", {1: [rollout()]})
    (run / "report").mkdir()
    (run / "report" / "step_7.js").write_text("of a run that was there before")
    status, printed, said = command(f"--workdir={run}", f"--compare={other}")
    assert (status, said) == (0, "") and "Training: 1 steps" in printed and "report.html" in printed
    assert {p.name for p in (run / "report").iterdir()} == {"step_1.js"}
    text = (run / "report.html").read_text()
    start = text.index('type="application/json">') + len('type="application/json">')
    data = json.loads(text[start : text.index("</script>", start)])
    assert [shown["name"] for shown in data["runs"]] == ["run", "other"] and data["rollouts"] == [1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--mode=report needs --workdir=DIR"),
        (["--workdir=HERE/none"], "HERE/none is not a directory"),
        (["--workdir=HERE"], "HERE has no metrics.jsonl"),
        (["--workdir=HERE/run", "--compare=HERE/run,HERE/none"], "HERE/none is not a directory"),
        (["--workdir=HERE/run", "--config=configs/quickstart.py"], "takes --workdir and --compare only"),
        (["--workdir=HERE/bad"], "HERE/bad/rollouts/step_1.jsonl line 1 must be a JSON object"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, arguments, words):
    make_run(tmp_path / "run", {1: [rollout()]})
    make_run(tmp_path / "bad", {1: [[1]]})
    status, _, said = command(*(argument.replace("HERE", str(tmp_path)) for argument in arguments))
    assert status == 2 and words.replace("HERE", str(tmp_path)) in said and said.count("\n") == 0


def test_a_folder_without_metrics_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        page.remake(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- in a browser ---


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with Browser() as browser:
        yield browser


def text_of(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)})?.textContent")


def texts_of(browser, selector):
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run in which every text is hostile, one kind a rollout of step 1."""
    rows = [
        rollout(
            uid=text[:5000],
            prompt=[{"role": text[:5000], "content": text}],
            answer=text,
            response=f"before {text} after",
            error_span_chars=[7, 7 + len(text)],
            quote=text,
            idea=text,
            reflection=text,
            note="" if name == "script" else text[:5000],
            reward=0.0,
        )
        for name, text in HOSTILE.items()
    ]
    steps = {1: rows, 2: [in_tokens(row) for row in rows]}
    run = make_run(tmp_path_factory.mktemp("hostile") / "<b>run", steps, **{"<i>": "</script><script>"})
    row = {"step": 1, "avg": 0.5, "avg_se": 0.1, "k": 1}
    with open(run / "metrics.jsonl", "a") as file:
        for text in HOSTILE.values():
            file.write(json.dumps({**row, "split": f"eval/{text}"}) + "\n")
    page.remake(run)
    return run / "report.html"


def in_tokens(row):
    """The row with tokens of three characters in the loss, from the fourth character on."""
    count = (len(row["response"]) - 4) // 3
    return row | in_loss(row["response"], 4, [3] * count, [0.01] * count)


SHOWN = {
    "line ends": "aU+2028document.title = 'owned'U+2029b",
    "bidi": "pay U+202Egnp.exeU+202C and U+2067\u05d0\u05d1U+2069U+200F",
    "surrogate": "lone U+D83D here, and U+DE00 there",
    "controls": "bell U+0007, escape U+001B[31m, no-break U+FEFF mark",
}


@pytest.mark.parametrize("width", nightly_but([400, 1600], keep=[0]))
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_shown_and_do_nothing(browser, hostile, name, width):
    browser.open(hostile, f"step=1&row={list(HOSTILE).index(name)}", width=width)
    wanted = SHOWN.get(name, HOSTILE[name])
    for selector in ("mark.error", ".prompt", ".quote", ".idea", ".reflection", ".gold"):
        assert text_of(browser, f"#detail {selector}") == wanted, selector
    assert text_of(browser, "#detail .response") == f"before {wanted} after"
    assert browser.run("document.title") == "<b>run · ROSD" and text_of(browser, "h1") == "<b>run"
    made = "img, b, i, iframe, #list script, #detail script"
    assert browser.run(f"document.querySelectorAll('{made}').length") == 0
    for element in ("document.documentElement", "document.getElementById('detail')"):
        assert browser.run(f"{element}.scrollWidth - {element}.clientWidth") <= 0, "nothing scrolls sideways"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokens_are_shown_and_do_nothing(browser, hostile, name):
    browser.open(hostile, f"step=2&row={list(HOSTILE).index(name)}", width=400)
    wanted = SHOWN.get(name, HOSTILE[name])
    assert text_of(browser, "mark.error") == wanted
    assert text_of(browser, "#detail .response") == f"before {wanted} after"
    titles = browser.run("[...document.querySelectorAll('#detail .response .token')].map((e) => e.title)")
    assert all(title.endswith(": 0.01 nats") for title in titles) and titles
    said = "".join(titles)
    assert not any(character in said for character in "\u202e\u2067\u200f\u2028\x07\x1b\ufeff\n")
    assert browser.run("document.title") == "<b>run · ROSD"
    assert browser.run("document.querySelectorAll('#detail .response :not(span, mark)').length") == 0
    detail = "document.getElementById('detail')"
    assert browser.run(f"{detail}.scrollWidth - {detail}.clientWidth") <= 0, "nothing scrolls sideways"


def test_only_the_page_may_run_scripts(browser, hostile):
    browser.open(hostile)
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    browser.run("document.body.append(Object.assign(document.createElement('script'), {text: 'owned = 1'}))")
    browser.wait_for("document.images[0].complete")
    assert browser.run("document.title + typeof owned") == "<b>run · ROSDundefined"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    wrong = partial(rollout, reward=0.0, reflection="said")
    response = ASTRAL + QUOTE + " after"
    span = [len(ASTRAL), len(ASTRAL) + len(QUOTE)]
    second = [
        wrong(
            sample=0, response=response, error_span_chars=span, quote=QUOTE, idea="It is 4.", active_tokens=2
        ),
        wrong(sample=1, quote="nowhere", idea="It is 4.", note="quote_missing"),
        wrong(sample=2, note="no_idea", response="a needle in a haystack"),
        rollout(sample=3, note="correct_left_out"),
        rollout(uid="physics/train/1", sample=0, note="all_right"),
    ]
    directory = make_run(tmp_path_factory.mktemp("page") / "run", {1: [rollout()], 2: second, 3: [rollout()]})
    page.remake(directory)
    return directory / "report.html"


def test_the_error_is_marked_in_place_after_characters_outside_the_basic_plane(browser, run):
    browser.open(run, "step=2&row=0")
    assert text_of(browser, "mark.error") == QUOTE == text_of(browser, "#detail .quote")
    assert text_of(browser, "#detail .response") == ASTRAL + QUOTE + " after"
    assert text_of(browser, "#detail .idea") == "It is 4."
    assert text_of(browser, ".verdict") == "Wrong, reward 0. Taught: 2 of 3 tokens are in the loss."


# The tokens " go", "od 😀𝕏", "", " bad", "\n" and "" are in the loss. The error cuts two of them.
IN_LOSS = "all good \U0001f600\U0001d54f bad\n"
HEAT = dict(
    widths=[3, 5, 0, 4, 1, 0],
    divergence=[0.1, 0.001, 0.00007, 0.693147, None, 0.000002],
)


@pytest.fixture(scope="module")
def strip(tmp_path_factory):
    start = IN_LOSS.index("od")
    fields = dict(reward=0.0, reflection="said", quote="od", error_span_chars=[start - 1, start + 2])
    wrong = rollout(**in_loss(IN_LOSS, 3, **HEAT), **fields, active_tokens=6)
    directory = make_run(tmp_path_factory.mktemp("strip") / "run", {1: [wrong, rollout()]})
    page.remake(directory)
    return directory / "report.html"


def test_a_bar_under_each_token_in_the_loss_shows_its_divergence(browser, strip):
    browser.open(strip, "step=1&row=0")
    assert text_of(browser, "#detail .response") == IN_LOSS and text_of(browser, "mark.error") == "ood"
    token = "#detail .response .token"
    assert texts_of(browser, token) == [" g", "o", "od", " \U0001f600\U0001d54f", "", " bad", "\n", ""]
    titles = browser.run(f"[...document.querySelectorAll('{token}')].map((e) => e.title)")
    assert titles == [
        "“ g”: 0.1 nats",
        "“o”: 0.1 nats",
        "“od”: 0.001 nats",
        "“ \U0001f600\U0001d54f”: 0.001 nats",
        "a token without text of its own: 0.00007 nats",
        "“ bad”: 0.693 nats",
        "“↵”: not a finite number",
        "a token without text of its own: less than 0.00001 nats",
    ]
    known = f"[...document.querySelectorAll('{token}:not(.unknown)')]"
    sizes = browser.run(f"{known}.map((e) => getComputedStyle(e).backgroundSize)")
    heights = [float(size.split(" ")[-1].removesuffix("px")) for size in sizes]
    assert heights[0] == heights[1] == pytest.approx(2 + 8 * 0.75)
    assert heights[2] == heights[3] == pytest.approx(2 + 8 * 0.25) and heights[4] == heights[6] == 2
    assert heights[5] == max(heights) < 10
    empty = f"document.querySelectorAll('{token}')[4].getBoundingClientRect().width"
    assert browser.run(empty) > 3, "a token without text can be pointed at"
    assert texts_of(browser, ".scale .token") == ["0.0001 or less", "0.001", "0.01", "0.1", "1"]
    assert "mean 0.159 nats, highest 0.693 nats" in text_of(browser, ".token-read")
    browser.press("j")
    assert browser.run("document.querySelector('.token, .scale, .token-read')") is None


@pytest.mark.parametrize(
    "span_source, idea_source, heads",
    [
        (
            "reflector",
            "reflector",
            ["Response, with the error that the reflector quoted", "The reflector's idea"],
        ),
        (
            "moved",
            "swapped",
            [
                "Response, with the error's span moved to a random place",
                "The idea of another problem, which replaces the reflector's",
            ],
        ),
        (
            "oracle",
            "oracle",
            [
                "Response, with the true first error",
                "The true right line, which replaces the reflector's idea",
            ],
        ),
    ],
)
def test_an_ablation_says_where_span_and_idea_come_from(browser, tmp_path, span_source, idea_source, heads):
    """All tokens but those of the marked "is" are in the loss."""
    loss = in_loss("it is 5", 0, [3, 2, 2], [0.1, None, 0.2])
    said = dict(reward=0.0, reflection="said", quote="5", idea="add", error_span_chars=[3, 5])
    sources = dict(span_source=span_source, idea_source=idea_source)
    directory = make_run(tmp_path / "run", {1: [rollout(**loss, **said, **sources, active_tokens=2)]})
    page.remake(directory)
    browser.open(directory / "report.html", "step=1&row=0")
    found = texts_of(browser, "#detail h3")
    assert [head for head in found if head in heads] == heads
    titles = browser.run("[...document.querySelectorAll('#detail .response .token')].map((e) => e.title)")
    assert titles == ["“it ”: 0.1 nats", "“is”: not in the loss", "“ 5”: 0.2 nats"]
    assert text_of(browser, "mark.error") == "is"
    assert text_of(browser, ".token-read").startswith("2 tokens in the loss: mean 0.15 nats")


def test_the_keyboard_and_the_pointer_tell_the_divergence_of_a_token(browser, strip):
    browser.open(strip, "step=1&row=0")
    for key, wanted in ((".", 1), (".", 2), (".", 3), (",", 2), (",", 1), (",", 1)):
        browser.press(key)
        assert text_of(browser, ".token-read").startswith(f"Token {wanted} of 6 in the loss, ")
    assert texts_of(browser, ".token.current") == [" g", "o"], "the error begins inside this token"
    place = browser.run(
        "JSON.stringify(document.querySelector('[data-token=\"3\"]').getBoundingClientRect())"
    )
    x, y = (json.loads(place)[side] + 4 for side in ("x", "y"))
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert text_of(browser, ".token-read") == "Token 4 of 6 in the loss, “ bad”: 0.693 nats."
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert text_of(browser, ".token-read").startswith("6 tokens in the loss")


def test_bars_are_seen_in_both_schemes(browser, strip):
    for scheme in ("light", "dark"):
        browser.colours(scheme)
        browser.open(strip, "step=1&row=0")
        low, high, ground = browser.run(COLOURS)
        assert contrast(low, ground) > 1.5 and contrast(high, low) > 2 and contrast(high, ground) > 7, scheme


def contrast(*colours):
    """The ratio of two colours of the sRGB space, by the formula of the WCAG."""
    lights = []
    for colour in colours:
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


# The lowest and the highest colour of the scale, and the ground that they are on.
COLOURS = """(() => {
  const paint = document.createElement("canvas").getContext("2d");
  return ["--heat-low", "--heat-high", "--page"].map((name) => {
    paint.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255);
  });
})()"""


@pytest.mark.parametrize(
    "state, rows",
    [
        ("step=2", [0, 1, 2, 3, 4]),
        ("step=2&note=quote_missing", [1]),
        ("step=2&note=taught", [0]),
        ("step=2&verdict=wrong", [0, 1, 2]),
        ("step=2&verdict=right&set=gym:chain", [3]),
        ("step=2&set=physics", [4]),
        ("step=2&q=NEEDLE", [2]),
        ("step=2&q=%F0%9F%98%80", [0]),
        ("step=2&q=nowhere&verdict=right", []),
        ("step=77", [0]),  # there is no such step, so it is the last
    ],
)
def test_the_address_chooses_what_is_listed(browser, run, state, rows):
    browser.open(run, state)
    assert browser.run("[...document.querySelectorAll('.item')].map((e) => e.id)") == [
        f"row-{i}" for i in rows
    ]
    assert text_of(browser, "#count").startswith(f"{len(rows)} of ")
    assert browser.run("document.querySelectorAll('[aria-selected=true]').length") == (1 if rows else 0)


def test_why_a_rollout_left_the_loss_is_said_in_words(browser, run):
    browser.open(run, "step=2&note=quote_missing")
    verdict = text_of(browser, ".verdict")
    assert f"Not in the loss: {NOTES['quote_missing']}. {page.WHY['quote_missing']}" in verdict
    assert browser.run("document.querySelector('mark.error')") is None


def test_the_keyboard_moves_through_rollouts_and_steps_and_searches(browser, run):
    browser.open(run, "step=2")

    def chosen():
        return browser.run("document.querySelector('[aria-selected=true]').id")

    for key, wanted in (("j", "row-1"), ("j", "row-2"), ("k", "row-1")):
        browser.press(key)
        assert chosen() == wanted
    browser.run("document.getElementById('list').focus()")
    browser.press("ArrowDown")
    assert chosen() == "row-2" and "row=2" in browser.run("location.hash")
    browser.press("/")
    for key in "jk/":  # typed, not obeyed
        browser.press(key)
    assert browser.run("document.getElementById('q').value") == "jk/"
    assert text_of(browser, "#count") == "0 of 5 rollouts"
    browser.run("document.getElementById('q').value = ''")
    browser.run("document.getElementById('q').dispatchEvent(new Event('input'))")
    browser.press("Escape")
    browser.press("ArrowLeft")
    browser.wait_for("document.getElementById('count').textContent == '1 of 1 rollouts'")
    assert browser.run("document.getElementById('step').value") == "1"


def test_a_key_scrolls_to_the_error_of_a_long_response(browser, tmp_path):
    response = "fine\n" * 2000 + "wrong" + "\nfine" * 2000
    row = rollout(response=response, error_span_chars=[10_000, 10_005], reward=0.0)
    run = make_run(tmp_path / "run", {1: [row]})
    page.remake(run)
    browser.open(run / "report.html")
    place = "document.querySelector('mark.error').getBoundingClientRect().top"
    frame = "document.getElementById('detail').getBoundingClientRect()"
    assert browser.run(f"{place} > {frame}.bottom")
    browser.press("e")
    assert browser.run(f"{place} > {frame}.top && {place} < {frame}.bottom")


def test_the_nearest_steps_with_a_reason_are_offered(browser, tmp_path):
    noted = rollout(note="no_idea", reward=0.0)
    run = make_run(tmp_path / "run", {1: [noted], 2: [rollout()], 3: [noted]})
    rows = [trained(1, out_no_idea=1, taught=0), trained(2), trained(3, out_no_idea=1, taught=0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.remake(run)
    browser.open(run / "report.html", "step=2&note=no_idea")
    assert texts_of(browser, "#detail button") == ["step 1", "step 3"]
    browser.run("document.querySelector('#detail button').click()")
    browser.wait_for("document.getElementById('count').textContent == '1 of 1 rollouts'")
    assert "step=1" in browser.run("location.hash")
    assert texts_of(browser, ".legend button") == ["taught 33 %", f"{NOTES['no_idea']} 67 %"]


def test_a_page_without_its_folder_says_so(browser, run, tmp_path):
    alone = tmp_path / "report.html"
    alone.write_text(run.read_text())
    browser.open(alone)
    assert "Keep the folder “report” next to this page" in text_of(browser, "#detail")
    assert "Reward" in texts_of(browser, ".chart .title")


def test_a_run_without_steps_or_evaluations_is_shown(browser, tmp_path):
    run = make_run(tmp_path / "run", {})
    page.remake(run)
    browser.open(run / "report.html")
    assert "No training step has been taken." in text_of(browser, "#fates")
    assert "There was no evaluation." in text_of(browser, "#outcomes")
    assert browser.run("document.getElementById('rollouts').hidden")


def test_runs_are_compared_chart_by_chart(browser, run, tmp_path):
    other = make_run(tmp_path / "other", {1: [rollout()], 5: [rollout()]})
    here = make_run(tmp_path / "here", {1: [rollout()]})
    page.remake(here, [other])
    browser.open(here / "report.html")
    assert texts_of(browser, "#curves .chart:first-child .legend > span") == ["here", "other"]


@pytest.mark.parametrize("reflected", [0.0, 0.5])
def test_a_run_without_a_reflector_says_what_the_teacher_saw(browser, tmp_path, reflected):
    run = make_run(tmp_path / "run", {1: [rollout(**in_loss("4", 0, [1], [0.1]))]})
    (run / "metrics.jsonl").write_text(json.dumps(trained(1, reflected=reflected)) + "\n")
    page.remake(run)
    browser.open(run / "report.html")
    asked = reflected > 0
    said = text_of(browser, "#detail")
    assert ("The reflector was not asked about this rollout" in said) == asked
    assert ("another rollout that solves it. There is no reflector." in said) == (not asked)
    assert ("Rollouts reflected" in texts_of(browser, "#curves .title")) == asked


def test_it_is_readable_in_both_schemes(browser, run):
    grounds = []
    for scheme in ("light", "dark"):
        browser.colours(scheme)
        browser.open(run, "step=2")
        grounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
        ratio = browser.run(CONTRAST)
        assert ratio > 7, scheme
    assert grounds[0] != grounds[1]


CONTRAST = """(() => {
  const light = (colour) => {
    const parts = colour.match(/\\d+/g).slice(0, 3).map((c) => c / 255);
    const [r, g, b] = parts.map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(...[document.body, document.querySelector("mark.error")].map((e) => {
    const style = getComputedStyle(e);
    const both = [light(style.color), light(style.backgroundColor)].sort();
    return (both[1] + 0.05) / (both[0] + 0.05);
  }));
})()"""
