"""`python -m agent_lightning` is `agl`."""

import sys

from agent_lightning.api.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
