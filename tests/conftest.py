import os

# The native kernels are tested where they were built; servers that tests start run as users start them.
os.environ.setdefault("ANYBIT_CPU_KERNELS", "auto")
