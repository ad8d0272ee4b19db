"""Offline stage 3: same as `qwen3-distill train`.

python scripts/train.py --config configs/default.yaml
"""

import sys

from qwen3_distill.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
