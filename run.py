"""The command in a checkout: the same as `rosd` of the package. rosd_jax/cli.py says what it does."""

from rosd_jax.__main__ import main

if __name__ == "__main__":
    main()
