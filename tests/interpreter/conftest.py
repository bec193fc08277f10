"""A process of its own: `TRITON_INTERPRET=1 python -m pytest tests/interpreter`.

Triton settles when it is imported whether it interprets, so in any other process the folder
holds no tests.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
