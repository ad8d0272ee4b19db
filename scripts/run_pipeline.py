"""The whole run: same as `qwen3-distill run`.

python scripts/run_pipeline.py --config configs/default.yaml
"""

import sys

from qwen3_distill.cli.main import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
