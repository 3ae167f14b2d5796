import sys

# Forks, signals, limits and /proc, as Linux has them.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
