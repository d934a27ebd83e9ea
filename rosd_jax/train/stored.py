"""The stored config of an earlier run as a config file: --config=rosd_jax/train/stored.py:DIR/config.json.

The command uses it if --workdir names a run and --config is not given.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from rosd_jax.config import default_config
from rosd_jax.errors import UserError
from rosd_jax.fields import flat
from rosd_jax.train.workdir import read_config


def get_config(path: str) -> ConfigDict:
    """The default config, updated from the file at `path`. Flags can then override fields.

    Raises UserError for a file without a config, and for a field that is unknown or has another type.
    """
    config = default_config()
    known = dict(flat(config.to_dict()))
    for field, value in flat(read_config(Path(path))):
        try:
            # Checked here, because ml_collections accepts null for a field of any type.
            if field not in known or (value is None and known[field] is not None):
                raise KeyError(field)
            config.update_from_flattened_dict({field: value})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} sets {field} to {value!r}, which this version does not accept; pass --config with "
                "the experiment's file, or use another --workdir"
            ) from error
    return config
