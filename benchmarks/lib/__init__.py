"""Parts that several benchmarks share, and parts that are tested on their own."""
