"""How work runs: threads, the order of jobs, a GPU, compiled kernels or plain torch. Knows no tensor and no file.

version.py        the version of loftq-cli
gpu.py            which device computes, its memory, and copies to it and back
kernel_choice.py  whether compiled kernels are worth loading
workers.py        threads that share the work
schedule.py       the order in which jobs run, and which run side by side
"""
