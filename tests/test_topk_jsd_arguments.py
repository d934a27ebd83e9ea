"""What the loss takes and what it refuses: each argument gives the right number or one clear sentence."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

from rosd_jax.kernels.topk_jsd import (
    Sharding,
    sampled_token_loss_from_logits,
    topk_jsd_from_logits,
    topk_jsd_loss,
    topk_jsd_rows,
)
from support import nightly_but

N, D, V = 5, 4, 11
WEIGHT = np.array([0.5, 0, 1.5, 2, 1], np.float32)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def models(dtype=np.float32):
    """Student hidden and head, teacher hidden and head, by name."""
    rng = np.random.default_rng(0)
    shapes = {"student_hidden_ND": (N, D), "student_head_VD": (V, D)}
    shapes |= {"teacher_hidden_ND": (N, D), "teacher_head_VD": (V, D)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def operands(dtype=np.float32):
    """The models, k and weights of which one is 0."""
    return models(dtype) | {"weight_N": jnp.asarray(WEIGHT, dtype), "k": 3}


def logits(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "student_logits_NV": jnp.asarray(rng.normal(size=(N, V)), dtype),
        "teacher_logits_NV": jnp.asarray(rng.normal(size=(N, V)), dtype),
        "weight_N": jnp.asarray(WEIGHT),
    }


def value_and_grads(given, scale=1.0):
    """Scale times the loss, and its gradients in the student's hidden states and head by name."""

    def loss(student):
        return scale * topk_jsd_loss(**given | student)[0]

    student = {name: x for name, x in given.items() if name.startswith("student")}
    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(student)


def close(found, wanted, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, wanted)


# ---- refused -------------------------------------------------------------------------------------

REFUSED = [
    ({"k": 0}, "k is 0; it must be at least 1, or None for the vocabulary"),
    ({"k": -3}, "k is -3; it must be at least 1"),
    ({"k": 3.0}, "k is 3.0; it must be an integer known when the program is compiled"),
    ({"k": True}, "k is True; it must be an integer"),
    ({"k": jnp.int32(3)}, "k is Array(3, dtype=int32); it must be an integer known"),
    ({"alpha": -0.1}, "alpha is -0.1; it must lie in [0, 1]"),
    ({"alpha": 1.1}, "alpha is 1.1; it must lie in [0, 1]"),
    ({"alpha": float("nan")}, "alpha is nan; it must lie in [0, 1]"),
    ({"alpha": None}, "alpha is None; it must be a number"),
    ({"alpha": "half"}, "alpha is 'half'; it must be a number"),
    ({"alpha": jnp.float32(0.5)}, "alpha is Array(0.5, dtype=float32); it must be a number known"),
    ({"temperature": -1}, "temperature is -1.0; it must be above 0 and finite"),
    ({"temperature": float("inf")}, "temperature is inf; it must be above 0 and finite"),
    ({"temperature": float("nan")}, "temperature is nan; it must be above 0 and finite"),
    ({"num_tokens": 0}, "num_tokens is 0; it must lie in [1, 11]"),
    ({"num_tokens": 7.0}, "num_tokens is 7.0; it must be an integer"),
    ({"chunk": 2.0}, "chunk is 2.0; it must be an integer"),
    ({"ratio_cap": -1.0}, "ratio_cap is -1.0; it must be above 0"),
    ({"tail": ["bucket"]}, "tail is ['bucket']; it must be 'bucket' or 'renorm'"),
    (
        {"weight_N": jnp.ones(N, jnp.complex64)},
        "weight_N is complex64; it must be boolean or integer or real",
    ),
    ({"weight_N": 1.0}, "weight_N has shape (); it must be (5,)"),
    ({"weight_N": jnp.ones((N, 1))}, "weight_N has shape (5, 1); it must be (5,)"),
    ({"tokens_N": jnp.zeros(N)}, "tokens_N is float32; it must be integer"),
    ({"tokens_N": jnp.zeros(N, bool)}, "tokens_N is bool; it must be integer"),
    ({"sampler_logp_N": jnp.zeros(N, bool)}, "sampler_logp_N is bool; it must be real"),
    ({"student_hidden_ND": jnp.ones(D)}, "student hidden states and head have shapes (4,) and (11, 4)"),
    ({"student_head_VD": jnp.ones(D)}, "student hidden states and head have shapes (5, 4) and (4,)"),
    ({"student_hidden_ND": jnp.ones((1, N, D))}, "they must be [N, D] and [V, D]"),
    ({"student_head_VD": jnp.ones((D, V))}, "student hidden states and head have shapes (5, 4) and (4, 11)"),
    ({"teacher_hidden_ND": jnp.ones(D)}, "teacher hidden states and head have shapes (4,) and (11, 4)"),
    ({"teacher_hidden_ND": jnp.ones((N + 1, D))}, "teacher_hidden_ND has 6 rows and student_hidden_ND 5"),
    ({"teacher_head_VD": jnp.ones((V + 1, D))}, "teacher_head_VD has 12 rows and student_head_VD 11"),
    (
        {"student_hidden_ND": jnp.ones((N, D), int), "student_head_VD": jnp.ones((V, D), int)},
        "student_hidden_ND is int32; it must be bfloat16, float32 or float64",
    ),
    (
        {"teacher_hidden_ND": jnp.ones((N, D), int), "teacher_head_VD": jnp.ones((V, D), int)},
        "teacher_hidden_ND is int32; it must be bfloat16, float32 or float64",
    ),
    (
        {name: jnp.ones((0, D)) for name in ("student_hidden_ND", "teacher_hidden_ND")}
        | {"weight_N": jnp.ones(0)},
        "there are 0 rows; pass at least 1",
    ),
    (
        {name: jnp.ones((0, D)) for name in ("student_head_VD", "teacher_head_VD")},
        "the vocabulary has 0 tokens; it must have at least 1",
    ),
]


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_gpu"])
@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_the_loss_refuses_in_a_sentence(change, message, implementation):
    with pytest.raises(ValueError, match=re.escape(message)):
        topk_jsd_loss(**operands() | change, implementation=implementation)


LOGITS_REFUSED = [
    ({"student_logits_NV": jnp.ones(V)}, "student and teacher logits have shapes (11,) and (5, 11)"),
    ({"teacher_logits_NV": jnp.ones(V)}, "student and teacher logits have shapes (5, 11) and (11,)"),
    ({"student_logits_NV": jnp.ones((N, V), int)}, "student_logits_NV is int32; it must be bfloat16"),
    ({"weight_N": jnp.ones(N + 1)}, "weight_N has shape (6,); it must be (5,)"),
    ({"temperature": 0}, "temperature is 0.0; it must be above 0 and finite"),
]


@pytest.mark.parametrize("function", [topk_jsd_from_logits, topk_jsd_rows, sampled_token_loss_from_logits])
@pytest.mark.parametrize(("change", "message"), LOGITS_REFUSED, ids=lambda x: str(x)[:40])
def test_logits_are_refused_in_a_sentence(change, message, function):
    given = {"tokens_N": jnp.zeros(N, jnp.int32)}
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**logits() | given | change)


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_float64_of_one_model_alone_is_refused(who, implementation):
    with jax.enable_x64(True):
        wide = {name: x for name, x in operands(np.float64).items() if name.startswith(who)}
        with pytest.raises(ValueError, match="float64 must be that of both"):
            topk_jsd_loss(**operands() | wide, implementation=implementation)


def test_a_traced_option_is_refused_in_a_sentence():
    run = jax.jit(lambda alpha: topk_jsd_loss(**operands(), alpha=alpha))
    with pytest.raises(
        ValueError, match="alpha is .* it must be a number known when the program is compiled"
    ):
        run(0.5)


# ---- taken ---------------------------------------------------------------------------------------

MASK = np.array([True, False, True, True, False])
SAME = [  # what is given, what it must equal
    ({"k": V}, {"k": None}),
    ({"k": V + 1}, {"k": None}),
    ({"k": 10**9}, {"k": None}),
    ({"k": V + 1, "tail": "renorm"}, {"k": None}),
    ({"k": 9, "num_tokens": 8}, {"k": None, "num_tokens": 8}),
    ({"k": np.int64(3)}, {}),
    ({"alpha": 1}, {"alpha": 1.0}),
    ({"alpha": np.float32(0.25), "temperature": np.float64(0.5)}, {"alpha": 0.25, "temperature": 0.5}),
    ({"weight_N": MASK}, {"weight_N": np.float32(MASK)}),
    ({"weight_N": np.int32([1, 0, 2, 3, 0])}, {"weight_N": np.float32([1, 0, 2, 3, 0])}),
    ({"weight_N": [0.5, 0, 1.5, 2, 1]}, {"weight_N": WEIGHT}),
    ({"weight_N": WEIGHT.astype(np.float16)}, {"weight_N": WEIGHT}),
    ({"tokens_N": np.arange(N)}, {}),
]


@pytest.mark.parametrize("implementation", nightly_but(["reference", "xla"], keep=[1]))
@pytest.mark.parametrize(("given", "wanted"), SAME, ids=lambda x: str(x)[:40])
def test_what_is_taken_gives_what_it_means(given, wanted, implementation):
    named = {"implementation": implementation}
    close(value_and_grads(operands() | given | named), value_and_grads(operands() | wanted | named))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_loss_is_linear_in_the_weights_negative_ones_too(implementation):
    given = operands() | {"implementation": implementation}
    found = value_and_grads(given | {"weight_N": -3 * given["weight_N"]})
    close(found, jax.tree.map(lambda x: -3 * x, value_and_grads(given)))
    mixed = given["weight_N"].at[2].multiply(-1)
    divergence_N = topk_jsd_loss(**given)[1].divergence_N
    close(topk_jsd_loss(**given | {"weight_N": mixed})[0], mixed @ divergence_N)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_nan_weight_is_never_hidden(implementation):
    given = operands() | {"implementation": implementation}
    value, grads = value_and_grads(given | {"weight_N": given["weight_N"].at[3].set(jnp.nan)})
    hidden_grad = grads["student_hidden_ND"]
    assert np.isnan(value) and np.isnan(hidden_grad).all(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_float64_operands_are_computed_in_float64(implementation):
    with jax.enable_x64(True):
        given = operands(np.float64)
        found = value_and_grads(given | {"implementation": implementation})
        close(found, value_and_grads(given | {"implementation": "reference"}), 1e-11, 1e-13)
        assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float64)}
        # An option that NumPy holds in float64 must not widen narrower operands.
        narrow = value_and_grads(operands() | {"alpha": np.float64(0.3), "implementation": implementation})
        assert {x.dtype for x in jax.tree.leaves(narrow)} == {np.dtype(np.float32)}


# ---- float16 and bfloat16 ------------------------------------------------------------------------


def relative_error(found, wanted):
    def to(tree):
        return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])

    return np.linalg.norm(to(found) - to(wanted)) / np.linalg.norm(to(wanted))


def gradient(narrow, dtype, implementation, weight, scale):
    """That of scale x loss, over scale, in float64; of operands rounded to `narrow` and given in `dtype`."""
    given = {name: x.astype(dtype) for name, x in models(narrow).items()}
    given |= {"weight_N": jnp.full(N, weight, jnp.float32), "k": 3, "implementation": implementation}
    return jax.tree.map(lambda x: np.asarray(x, np.float64) / scale, value_and_grads(given, scale)[1])


@pytest.mark.parametrize("implementation", [None, "xla", "pallas_gpu"])
def test_float16_is_refused_where_gradients_would_underflow(implementation):
    half, named = operands(np.float16), {"implementation": implementation}
    with pytest.raises(ValueError, match="student_hidden_ND is float16, .*; use bfloat16 or float32"):
        topk_jsd_loss(**half, **named)
    with pytest.raises(ValueError, match="student_logits_NV is float16, .*; use bfloat16 or float32"):
        topk_jsd_from_logits(**logits(np.float16), **named)
    with pytest.raises(ValueError, match="student_logits_NV is float16, .*; use bfloat16 or float32"):
        topk_jsd_rows(**logits(np.float16), **named)
    with pytest.raises(ValueError, match="grad_dtype is float16, .*; use bfloat16 or float32"):
        topk_jsd_rows(**logits(), grad_dtype=jnp.float16, **named)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float64])
def test_a_grad_dtype_that_is_none_is_refused(dtype):
    with jax.enable_x64(True), pytest.raises(ValueError, match="it must be bfloat16 or float32"):
        topk_jsd_rows(**logits(), grad_dtype=dtype)


def test_float16_is_right_where_it_is_taken():
    """A teacher takes no gradient; the reference keeps float32 until the cotangent has multiplied it."""
    teacher = {name: x for name, x in operands(np.float16).items() if name.startswith("teacher")}
    wide = {name: x.astype(jnp.float32) for name, x in teacher.items()}
    close(value_and_grads(operands() | teacher), value_and_grads(operands() | wide))
    (_, _), grad = topk_jsd_rows(**logits(np.float16), k=3, grad_dtype=jnp.float32)
    rounded = {name: x.astype(jnp.float16).astype(jnp.float32) for name, x in logits().items()}
    (_, _), wanted = topk_jsd_rows(**rounded, k=3)
    assert grad.dtype == jnp.float32
    close(grad, wanted)
    found = gradient(jnp.float16, jnp.float16, "reference", weight=1e-7, scale=2.0**20)
    wanted = gradient(jnp.float16, jnp.float32, "reference", weight=1e-7, scale=1.0)
    assert relative_error(found, wanted) < 1e-3


@pytest.mark.parametrize(("weight", "scale"), [(1.0, 1.0), (1e-8, 1.0), (1e-8, 2.0**16), (1e-30, 1.0)])
def test_bfloat16_gradients_lose_digits_alone_at_any_scale(weight, scale):
    found = gradient(jnp.bfloat16, jnp.bfloat16, None, weight, scale)
    wanted = gradient(jnp.bfloat16, jnp.float32, "reference", weight, scale)
    assert relative_error(found, wanted) < 5e-3


# ---- derivatives ---------------------------------------------------------------------------------

HIGHER = {
    "hessian": lambda loss, x: jax.hessian(loss)(x),
    "jacfwd of grad": lambda loss, x: jax.jacfwd(jax.grad(loss))(x),
    "grad of grad": lambda loss, x: jax.grad(lambda x: jax.grad(loss)(x).sum())(x),
    "grad of jit of grad": lambda loss, x: jax.grad(lambda x: jax.jit(jax.grad(loss))(x).sum())(x),
    "linearize of grad": lambda loss, x: jax.linearize(jax.grad(loss), x),
    "grad of vmap of grad": lambda loss, x: jax.grad(lambda x: jax.vmap(jax.grad(loss))(x[None]).sum())(x),
    "grad of grad of checkpoint": lambda loss, x: jax.grad(lambda x: jax.grad(jax.checkpoint(loss))(x).sum())(
        x
    ),
}
FORWARD = {
    "jvp": lambda loss, x: jax.jvp(loss, (x,), (x,)),
    "jacfwd": lambda loss, x: jax.jacfwd(loss)(x),
    "linearize": lambda loss, x: jax.linearize(loss, x)[1](x),
}
HIDDEN, LOGITS = "student_hidden_ND", "student_logits_NV"


def losses(**options):
    """Name of the function, loss of one array, array."""
    given, rows = operands(), logits()
    yield "topk_jsd_loss", lambda x: topk_jsd_loss(**given | {HIDDEN: x}, **options)[0], given[HIDDEN]

    def from_logits(x):
        return topk_jsd_from_logits(**rows | {LOGITS: x}, k=3, **options)[0]

    yield "topk_jsd_from_logits", from_logits, rows[LOGITS]


@pytest.mark.parametrize("order", HIGHER)
@pytest.mark.parametrize("implementation", [None, "xla", "pallas_tpu", "pallas_gpu"])
def test_a_second_derivative_is_refused_in_a_sentence(implementation, order):
    for name, loss, x in losses(implementation=implementation):
        message = f"{name} has first derivatives only, .*; implementation='reference' has all orders"
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(partial(HIGHER[order], loss), x)


def test_a_second_derivative_over_a_mesh_is_refused_in_a_sentence():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    given = operands() | {"sharding": Sharding(mesh, ("x",))}

    def loss(x):
        return topk_jsd_loss(**given | {HIDDEN: x})[0]

    with pytest.raises(NotImplementedError, match="topk_jsd_loss with sharding has first derivatives only"):
        jax.eval_shape(jax.hessian(loss), given[HIDDEN])


@pytest.mark.parametrize("mode", FORWARD)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_forward_mode_is_refused_in_a_sentence(implementation, mode):
    for _, loss, x in losses(implementation=implementation):
        with pytest.raises(TypeError, match="can't apply forward-mode"):
            jax.jit(partial(FORWARD[mode], loss))(x)


def test_an_outer_derivative_that_leaves_the_gradient_out_is_a_first_one():
    """A step down the loss whose own derivative is not wanted, as in first-order meta-learning."""
    for _, loss, x in losses():

        def inner(x, loss=loss):
            return jax.grad(loss)(lax.stop_gradient(x))

        found = jax.jit(jax.grad(lambda x, loss=loss, inner=inner: loss(x - inner(x))))(x)
        grad = jax.jit(jax.grad(loss))
        close(found, grad(x - grad(x)))


def test_the_reference_has_all_orders_and_both_modes():
    with jax.enable_x64(True):
        given = operands(np.float64) | {"implementation": "reference"}
        loss = jax.jit(lambda x: topk_jsd_loss(**given | {HIDDEN: x})[0])
        grad, x = jax.jit(jax.grad(loss)), given[HIDDEN]
        way = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
        slope = jax.jvp(loss, (x,), (way,))[1]
        np.testing.assert_allclose(slope, jnp.vdot(grad(x), way), rtol=1e-9)
        curve = jnp.einsum("ndme,me->nd", jax.jit(jax.hessian(loss))(x), way)
        wanted = (grad(x + 1e-6 * way) - grad(x - 1e-6 * way)) / 2e-6
        np.testing.assert_allclose(curve, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_checkpoint_changes_no_gradient(implementation):
    for _, loss, x in losses(implementation=implementation):
        close(jax.jit(jax.grad(jax.checkpoint(loss)))(x), jax.jit(jax.grad(loss))(x))
