"""
Compiled hot paths and the libbpf bridge; imported through `accel` and `ebpf` only.
"""
