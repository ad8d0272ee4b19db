"""Offline stage 2: same as `qwen3-distill score`.

python scripts/score.py --config configs/default.yaml
"""

import sys

from qwen3_distill.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
