"""Offline stage 1: same as `qwen3-distill generate`.

python scripts/generate.py --config configs/default.yaml
"""

import sys

from qwen3_distill.cli.main import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
