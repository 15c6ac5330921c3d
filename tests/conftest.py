"""One thread for torch: two workers with two threads each run many times slower on two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
