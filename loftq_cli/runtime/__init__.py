"""How work runs: threads, the order of jobs, a GPU, compiled kernels or plain torch. Knows no tensor and no file.

version.py        the version of loftq-cli
gpu.py            the computing device, the memory of a GPU, and copies to a GPU and back
kernel_choice.py  whether compiled kernels are worth loading
allocator.py      memory that freed buffers leave to the next
workers.py        threads that share the work
schedule.py       the order of jobs, and the jobs that run side by side
"""
