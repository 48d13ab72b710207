import os

# Before torch is imported, also by what a test starts: two processes of as many threads as cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where more threads than cores run all the same, those that wait give their core away.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
