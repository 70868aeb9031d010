"""`sharpen ARGS` where accelerate shards CPUs: torchrun ... sharded_cli.py ARGS."""

from sharpen.__main__ import entry
from workers.training_shards import shard_on_cpus

if __name__ == "__main__":
    shard_on_cpus()
    entry()
