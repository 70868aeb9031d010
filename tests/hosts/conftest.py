"""Real runs of hosts: `make test-hosts`, in an environment that has them; nothing elsewhere."""

import os

if os.environ.get("SHARPEN_HOSTS") != "1":
    collect_ignore_glob = ["test_*.py"]
