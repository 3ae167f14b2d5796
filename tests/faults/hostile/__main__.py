"""Run the hostile files: python -m tests.faults.hostile [part of their names]"""

import sys
import tempfile
from pathlib import Path

from tests.faults.hostile import CASES
from tests.faults.hostile.case import judge


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [case for name, case in CASES.items() if wanted in name]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(chosen):
            ended, problems = judge(case, Path(folder) / str(number))
            if problems:
                failed += 1
                line = ended.errors[-1][:300] if ended.errors else ""
                print(f"{case.name}: {'; '.join(problems)} | {line}", flush=True)
    print(f"{len(chosen)} hostile files, {failed} with problems")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
