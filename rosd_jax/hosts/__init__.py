"""A run on several hosts: one process on each, which all execute the same program.

    place.py       which process this is: from flags, a TPU slice, SLURM or Open MPI
    supervisor.py  a parent process on each host, so that a host that fails ends all of them with a sentence
    hosts.py       how the processes share the work of a host, and agree

Every process holds the same state on the host: the same prompts, texts, rewards and plans. Work that differs
between hosts (grading, whose time limits depend on the machine) is divided, and its results are exchanged;
all else follows from equal inputs. So all processes take the same decisions, and start the same programs on
the devices in the same order.
"""

from rosd_jax.hosts.hosts import Hosts
from rosd_jax.hosts.place import Place

__all__ = ["Hosts", "Place"]
