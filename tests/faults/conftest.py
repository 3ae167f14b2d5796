import sys

# The tests need Linux: forks, signals, limits and /proc.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
