"""The command `onerec` for launchers of modules: `accelerate launch -m onerec_hf pipeline --config quickstart ...`."""

import sys

from onerec_hf.command_line import main

if __name__ == "__main__":
    sys.exit(main())
