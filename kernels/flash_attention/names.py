"""Names under which `jax.checkpoint` policies know what this folder computes."""

SAVED = "attention"  # the result, and the sums that a kernel's backward pass reads
