"""Where the command starts: `rosd`, `python -m rosd_jax`, and `python run.py` in a checkout."""

from __future__ import annotations

import sys

from rosd_jax.train import stopping


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    # Before the imports below, which take seconds: a signal during them ends the process in good order.
    stopping.watch()
    try:
        from rosd_jax import cli
    except ModuleNotFoundError as error:
        print(
            f"error: training needs {error.name}; install the checkout or the wheel with its extra `train`, "
            "as in pip install 'PATH[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    cli.end(cli.main(sys.argv))


if __name__ == "__main__":
    main()
