"""Parts of `scripts/bench_rollout.py`: the work to do, the engines that do it, the report."""
