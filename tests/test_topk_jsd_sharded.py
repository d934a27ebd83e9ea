"""The loss over eight devices is that of one, in both ways of splitting it, and exchanges what it must."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rosd_jax.kernels.topk_jsd import Sharding, topk_jsd_loss
from rosd_jax.kernels.topk_jsd.selection import select_top_k
from support import nightly_but

N, D, V = 22, 8, 128  # eight devices do not divide the rows
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# rows devices x other devices, axes of the rows, axis of the vocabulary
ROWS = ((8, 1), ("x",), None)
ROWS_2D = ((4, 2), ("x", "y"), None)
VOCAB_2 = ((4, 2), ("x",), "y")
VOCAB_4 = ((2, 4), ("x",), "y")
VOCAB_8 = ((1, 8), (), "y")


def make(shape, rows, vocab, types=AUTO):
    return Sharding(jax.make_mesh(shape, ("x", "y"), axis_types=(types,) * 2), rows, vocab)


def operands(n=N, v=V, dtype=np.float32, step=None, equal=False, infinite=False, seed=0):
    """Student hidden and head, teacher hidden and head, weights (two in five 0), tokens, log-probs.

    step: all are its multiples, so that logits tie. equal: the student's logits all tie. infinite:
    some of both models' logits overflow to -inf. A row of weight 0 is NaN.
    """
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(n, D)), rng.normal(size=(v, D))
    arrays = [hidden, head, hidden + 0.5 * rng.normal(size=(n, D)), head + 0.1 * rng.normal(size=(v, D))]
    if step:
        arrays = [np.round(x / step) * step for x in arrays]
    if equal:
        arrays[1] = np.broadcast_to(arrays[1][:1], (v, D))
    if infinite:
        arrays[0][:, 0] = arrays[2][:, 0] = 10.0
        arrays[1][::3, 0] = arrays[3][::2, 0] = -0.9 * np.finfo(dtype).max
        arrays[1][1::3, 0] = arrays[3][1::2, 0] = 0.1
    arrays[0][0] = np.nan
    weight = np.where(np.arange(n) % 5 < 2, 0.0, rng.random(n))
    tokens, sampler_logp = rng.integers(0, v, n).astype(np.int32), -8 * rng.random(n)
    to = partial(jnp.asarray, dtype=dtype)
    return *map(to, arrays), to(weight), jnp.asarray(tokens), to(sampler_logp)


def value_and_grads(*args, argnums=(0, 1), **options):
    student, (*teacher, weight, tokens, sampler_logp) = args[:2], args[2:]
    rows = {"tokens_N": tokens, "sampler_logp_N": sampler_logp}

    def loss(*student):
        return topk_jsd_loss(*student, *teacher, weight, **rows, **options)

    return jax.value_and_grad(loss, argnums, has_aux=True)(*student)


def run(*args, **options):
    """((loss, aux), gradients), compiled with little optimisation, to save time."""
    function = jax.jit(partial(value_and_grads, **options), compiler_options=QUICK)
    return jax.device_get(function(*args))


def assert_near(found, wanted, rtol, atol):
    """aux.chunks_run aside, and atol as part of each array's largest, or of 0.01."""
    (loss, aux), grads = found
    pairs = zip(
        jax.tree.leaves((loss, aux._replace(chunks_run=None), grads)),
        jax.tree.leaves((wanted[0][0], wanted[0][1]._replace(chunks_run=None), wanted[1])),
        strict=True,
    )
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = np.abs(theirs[np.isfinite(theirs)]).max(initial=0.01)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol * scale)


# ---- eight devices equal one ---------------------------------------------------------------------

SHAPES = ("step", "equal", "infinite", "v", "n")
GRID = [
    {},
    {"alpha": 0.0, "ratio_cap": 1.5},
    {"alpha": 0.3, "step": 1.0},
    {"alpha": 1.0, "temperature": 0.7},
    {"alpha": 0.0, "tail": "renorm"},
    {"alpha": 0.3, "tail": "renorm", "step": 1.0},
    {"alpha": 1.0, "tail": "renorm", "num_tokens": 77},
    {"alpha": 0.3, "k": None, "num_tokens": 120, "ratio_cap": 1.5},
    {"alpha": 1.0, "k": None},
    {"k": 1, "step": 1.0},
    {"k": 20, "equal": True, "step": 0.5},  # more than one of eight shards holds, all tied
    {"k": 33, "equal": True, "step": 0.5, "tail": "renorm"},  # ends inside a shard
    {"k": 100, "step": 1.0, "num_tokens": 110, "ratio_cap": 1.5},
    {"k": 9, "infinite": True},
    {"k": 100, "infinite": True, "tail": "renorm"},  # -inf is chosen
]
EVERYWHERE = (0, 2, 5, 10, 12)  # on every mesh; the others on two


def places(case):
    return (ROWS, ROWS_2D, VOCAB_2, VOCAB_4, VOCAB_8) if case in EVERYWHERE else (ROWS, VOCAB_4)


def split(case):
    shape = {key: value for key, value in GRID[case].items() if key in SHAPES}
    options = {"k": 20, "chunk": 3} | {key: value for key, value in GRID[case].items() if key not in shape}
    return shape, options


@cache
def oracle(case):
    shape, options = split(case)
    with jax.enable_x64(True):
        return run(*operands(dtype=np.float64, **shape), implementation="reference", **options)


CASES = [(case, place) for case in range(len(GRID)) for place in places(case)]
# Each way of splitting, each kind of tail, ties across shards, and -inf among the chosen.
KEPT = [(1, ROWS), (7, VOCAB_4), (10, VOCAB_8), (12, ROWS_2D), (12, VOCAB_2), (14, VOCAB_4)]


@pytest.mark.parametrize(
    ("case", "place"),
    nightly_but(CASES, keep=[CASES.index(case) for case in KEPT]),
    ids=lambda x: "-".join(map(str, GRID[x].items())) if isinstance(x, int) else f"{x[0]}{x[2]}",
)
def test_eight_devices_give_the_reference(case, place):
    shape, options = split(case)
    with jax.enable_x64(True):
        found = run(*operands(dtype=np.float64, **shape), sharding=make(*place), **options)
    assert np.isfinite(found[0][0])
    assert_near(found, oracle(case), 1e-9, 1e-11)


@pytest.mark.parametrize("place", nightly_but(zip([ROWS, VOCAB_2, VOCAB_8]), keep=[1]), ids=str)
def test_in_float32_eight_devices_are_one(place):
    options = {"k": 20, "chunk": 3, "ratio_cap": 1.5}
    found = run(*operands(), sharding=make(*place), **options)
    assert_near(found, run(*operands(), **options), 1e-5, 1e-5)


@pytest.mark.parametrize("place", nightly_but(zip([ROWS, VOCAB_2]), keep=[1]), ids=str)
def test_blocks_of_rows_and_bins_of_scores_change_nothing(place):
    """Enough rows and tokens for a chunk to be computed in blocks, and the top k from bins."""
    args = operands(n=320, v=12800, step=0.5)
    options = {"k": 20, "chunk": 40}
    found = run(*args, sharding=make(*place), **options)
    assert_near(found, run(*args, **options), 2e-5, 1e-5)
    assert found[0][1].chunks_run == (1 if place is ROWS else 2)


@pytest.mark.parametrize("place", nightly_but(zip([ROWS, VOCAB_4]), keep=[1]), ids=str)
def test_trips_are_those_of_the_fullest_device_and_an_empty_mask_makes_none(place):
    args = list(operands(n=32))
    function = jax.jit(partial(value_and_grads, k=20, chunk=2, sharding=make(*place)), compiler_options=QUICK)
    shards = 8 if place is ROWS else 2
    for live in (0, 1, 3, 8, 32):  # all of them in front: the first device's
        args[4] = jnp.where(jnp.arange(32) < live, 0.5, 0.0).at[0].set(0)
        args[0] = args[0].at[0].set(jnp.nan)
        (loss, aux), grads = function(*args)
        most = max(int((args[4] != 0).reshape(shards, -1).sum(1).max()), 0)
        assert aux.chunks_run == -(-most // 2)
        assert (loss == 0) == (live < 2) == (not any(grad.any() for grad in grads))
        assert aux.divergence_N.shape == (32,) and np.isfinite(loss)


@pytest.mark.parametrize("place", [ROWS, VOCAB_4], ids=str)
@pytest.mark.parametrize("who", [0, 2])
def test_a_live_nan_row_is_never_hidden(place, who):
    args = list(operands())
    args[who] = args[who].at[4].set(jnp.nan)
    (loss, aux), _ = run(*args, k=20, chunk=3, sharding=make(*place))
    assert np.isnan(loss) and np.flatnonzero(np.isnan(aux.divergence_N)).tolist() == [4]


@pytest.mark.parametrize("shards", [2, 8])
def test_the_selection_over_shards_is_that_of_the_whole_row(shards):
    mesh = jax.make_mesh((shards,), ("y",), axis_types=(AUTO,), devices=jax.devices()[:shards])
    row, live = PartitionSpec(None, "y"), jnp.ones(3, bool)

    @partial(jax.jit, static_argnums=1)
    def select(scores, k):
        def local(scores):
            return select_top_k(scores, live, k, "y")

        return jax.shard_map(local, mesh=mesh, in_specs=row, out_specs=row, check_vma=False)(scores)

    @settings(max_examples=30, deadline=None)
    @given(
        scores=hnp.arrays(
            np.float32, (3, 40), elements=st.sampled_from([-np.inf, -3e38, -1.0, -0.0, 0.0, 1e-30, 1.0, 3e38])
        ),
        k=st.sampled_from([1, 7, 39]),
    )
    def holds(scores, k):
        order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, order, True, axis=-1)
        np.testing.assert_array_equal(select(scores, k), chosen)

    holds()


# ---- composition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", nightly_but(zip([ROWS_2D, VOCAB_2]), keep=[1]), ids=str)
def test_explicit_axes_keep_each_gradient_where_its_operand_lies(place):
    args = operands(n=20)
    sharding = make(*place, types=EXPLICIT)

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec(*axes)))

    laid = [put(x, *axes) for x, axes in zip(args, [("x",), (None, "y")] * 2 + [("x",)] * 3, strict=True)]
    function = jax.jit(partial(value_and_grads, k=20, chunk=2, sharding=sharding), compiler_options=QUICK)
    with jax.set_mesh(sharding.mesh):
        found = function(*laid)
    for grad, operand in zip(found[1], laid[:2], strict=True):
        assert grad.sharding.is_equivalent_to(operand.sharding, 2)
    assert_near(jax.device_get(found), run(*args, k=20, chunk=2), 1e-5, 1e-5)


def test_in_a_scan_the_cotangent_scales_and_nothing_needs_jit():
    args, sharding = operands(n=24), make(*VOCAB_2)
    (loss, _), grads = value_and_grads(*args, k=20, sharding=sharding)
    parts = [x.reshape(2, 12, *x.shape[1:]) for x in (args[0], args[2], args[4])]

    def thrice(head):
        def part(total, x):
            return (
                total + 3 * topk_jsd_loss(x[0], head, x[1], args[3], x[2], k=20, sharding=sharding)[0],
                None,
            )

        return jax.lax.scan(jax.checkpoint(part), jnp.float32(0), tuple(parts))[0]

    tripled, tripled_grad = jax.jit(jax.value_and_grad(thrice), compiler_options=QUICK)(args[1])
    np.testing.assert_allclose(tripled, 3 * loss, rtol=1e-5)
    np.testing.assert_allclose(tripled_grad, 3 * grads[1], rtol=1e-4, atol=1e-6)


# ---- cost ----------------------------------------------------------------------------------------

CHUNK = 6  # differs from every other size
COLLECTIVE = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
CALLED = r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"


def compiled(place, argnums):
    """Value only where argnums is empty."""
    args, sharding = operands(n=24, v=512), make(*place)
    options = {"k": 5, "chunk": CHUNK, "sharding": sharding, "ratio_cap": 2.0}
    if argnums:
        function = partial(value_and_grads, argnums=argnums, **options)
    else:
        rows = {"tokens_N": args[5], "sampler_logp_N": args[6]}

        def function(*args):
            return topk_jsd_loss(*args[:5], **rows, **options)

    return jax.jit(function).lower(*args).compile().as_text()


def in_loops(text):
    """The text of all computations that a while loop of a compiled program reaches."""
    bodies = dict(re.findall(r"^%?(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    reached, front = set(), re.findall(r"body=%?([\w.\-]+)", text)
    while front:
        name = front.pop()
        if name not in reached:
            reached.add(name)
            front += re.findall(CALLED, bodies[name])
            for branches in re.findall(r"branch_computations=\{(.*?)\}", bodies[name]):
                front += re.findall(r"[\w.\-]+", branches)
    assert reached
    return "\n".join(bodies[name] for name in reached)


def collectives(text):
    """(kind, shape) of each array that is exchanged; one collective may carry several."""
    return sorted(
        (kind, tuple(map(int, re.findall(r"\d+", dims))))
        for types, kind in re.findall(COLLECTIVE, text)
        for dims in re.findall(r"\w+\[([\d,]*)\]", types)
    )


@pytest.mark.parametrize("place", [ROWS_2D, VOCAB_2], ids=str)
@pytest.mark.optimized
def test_matmuls_and_what_is_exchanged(place):
    texts = {argnums: compiled(place, argnums) for argnums in ((), (0,), (0, 1))}
    assert [len(re.findall(r" dot\(", text)) for text in texts.values()] == [2, 3, 4]

    def head(text):
        return [dims for kind, dims in collectives(text) if kind == "reduce-scatter"]

    local = 512 // 2 // 4 if place is VOCAB_2 else 512 // 8
    assert [head(text) for text in texts.values()] == [[], [], [(local, D)]]
    for argnums, text in texts.items():
        found = collectives(in_loops(text))
        if place is ROWS_2D:
            assert found == []
            continue
        of_rows = [
            ("all-gather", (2, CHUNK)),  # how many tie in each shard
            ("all-gather", (CHUNK, 2 * 5)),  # the top k of each shard
            ("all-reduce", (1, CHUNK)),  # the sampled token's log-prob
            ("all-reduce", (2, CHUNK)),  # student's and teacher's largest score
            ("all-reduce", (2, CHUNK)),  # and sum of exponents
            ("all-reduce", (6, CHUNK)),  # divergence, its slope, two masses, two tails
        ]
        assert found == sorted([*of_rows, *([("all-reduce", (CHUNK, D))] if argnums else [])])


@pytest.mark.parametrize("place", nightly_but(zip([ROWS, VOCAB_4]), keep=[1]), ids=str)
def test_where_the_devices_do_not_divide_the_head_its_gradient_is_whole(place):
    args = operands(n=16, v=36)
    options = {"k": 5, "chunk": 2}
    found = run(*args, sharding=make(*place), **options)
    assert_near(found, run(*args, **options), 1e-5, 1e-5)


def test_a_kernel_is_lowered_for_each_device_with_its_own_rows():
    args = [x.astype(jnp.bfloat16) for x in operands(n=128, v=1024)[:5]]

    def loss(*args):
        return topk_jsd_loss(*args, k=5, sharding=make(*ROWS_2D), implementation="pallas_tpu")[0]

    text = jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert kernels and all("tensor<16x1024xf32>" in line for line in kernels)


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    (((8, 1), ("x", "z"), None), {}, "axes of the mesh, ('x', 'y')"),
    (((8, 1), ("x", "x"), None), {}, "each at most once"),
    (((4, 2), ("x", "y"), "y"), {}, "each at most once"),
    (((4, 2), ("x",), "y"), {"v": 129}, "the vocabulary is 129; the 2 devices of sharding.vocab 'y'"),
    (VOCAB_2, {"implementation": "pallas_tpu"}, "only 'xla' can split the vocabulary"),
    (VOCAB_2, {"implementation": "pallas_gpu"}, "only 'xla' can split the vocabulary"),
    (ROWS, {"implementation": "reference"}, "'reference', which cannot be sharded"),
]


@pytest.mark.parametrize(("place", "options", "message"), MISTAKES, ids=lambda x: str(x)[:30])
def test_a_mistake_is_named(place, options, message):
    options = dict(options)
    args = operands(v=options.pop("v", V))
    with pytest.raises(ValueError, match=re.escape(message)):
        topk_jsd_loss(*args[:5], k=20, sharding=make(*place), **options)
