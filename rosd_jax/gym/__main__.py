"""Trains the shipped model: python -m rosd_jax.gym --out=DIR [--steps=N] [--lr=RATE] [--seed=N]."""

from rosd_jax.gym.pretrain import main

if __name__ == "__main__":
    main()
