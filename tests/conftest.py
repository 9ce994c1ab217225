import os

from hypothesis import settings

# The native kernels are tested where they were built; servers that tests start run as users start them.
os.environ.setdefault("ANYBIT_CPU_KERNELS", "auto")
# Triton kernels are interpreted where there is no GPU; Triton reads this when it is first imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test is timed: a machine may be busy with something else.
settings.register_profile("anybit", deadline=None)
settings.load_profile("anybit")
