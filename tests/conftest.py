import os

# Before torch is imported, also by what a test starts: two processes of as many threads as cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
